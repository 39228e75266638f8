"""Calibration of a user's own torch module: its linear layers and convolutions.

The whole model is in memory. Images go through the user's `preprocess`; token ids are given as they
are. What the module returns counts as logits over its last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compress.calibrate.calibrate import Request
from compress.calibrate.inputs import IMAGES
from compress.calibrate.sites import SiteCollector
from compress.calibrate.statistics import OUTPUT_FISHER
from compress.calibrate.writer import StatisticsWriter
from compress.engines.module import UserModule, load_module
from compress.errors import UsageError, show
from compress.run import Progress
from compress.tensor import Array

_SITES, _FISHER = "sites", "fisher"
_IMAGES = 32  # a batch: their patches and all layers' inputs are in memory together


def collect_module(request: Request, writer: StatisticsWriter, progress: Progress) -> list[str]:
    """Collect what is wanted of the user's own torch module. Returns warnings.

    Raises UsageError where the module is none, refuses its input, or has no layer for a tensor that
    needs statistics; InputError where the checkpoint does not fit it.
    """
    spec = request.module
    if spec is None:
        raise UsageError("no module given", hint="use --module FILE.py:FACTORY")
    if IMAGES in request.inputs.arrays:
        request = replace(request, batch_tokens=min(request.batch_tokens, _IMAGES))
    model = load_module(spec, request.checkpoint)
    layers = {n: m for n, m in model.weights().items() if request.wanted.get(n)}
    request.check_reached(layers)
    if _SITES not in writer.steps:
        _sites(model, layers, request, writer, progress)
        writer.commit(_SITES)
    fisher = [name for name in request.of_kind(OUTPUT_FISHER) if name in layers]
    if fisher and _FISHER not in writer.steps:
        chosen = {name: layers[name] for name in fisher}
        for name, values in output_fisher(model, chosen, request, progress).items():
            writer.add_tensor(name, OUTPUT_FISHER, values)
        writer.commit(_FISHER)
    missing = [name for name in request.wanted if name not in layers]
    if not missing:
        return []
    return [f"{len(missing)} tensors are no layers that calibration sees, e.g. {missing[0]}"]


@torch.no_grad()
def _sites(
    model: UserModule, layers: Mapping[str, nn.Module], request: Request,
    writer: StatisticsWriter, progress: Progress,
) -> None:  # fmt: skip
    collector = SiteCollector(layers, request.wanted)
    batches = request.batches()
    with collector.attached(), _watched(layers) as check:
        for number, (held_out, _, arrays) in enumerate(batches):
            progress("calibrating", number, len(batches))
            with collector.batch(held_out=held_out):
                model.call(arrays)
                check()
    progress("calibrating", len(batches), len(batches))
    collector.write(writer)


@contextmanager
def _watched(layers: Mapping[str, nn.Module]) -> Iterator[Callable[[], None]]:
    """Yields a check, after a pass, that no layer's input was written over later in that pass."""
    seen: list[tuple[str, torch.Tensor, int]] = []

    def check() -> None:
        for name, inputs, version in seen:
            if inputs._version != version:
                raise UsageError(
                    f"tensor {show(name)}: the module writes over this layer's input later on",
                    hint="use an operation that is not in place there (relu, not relu_)",
                )
        seen.clear()

    handles = [
        layer.register_forward_pre_hook(
            lambda _, given, name=name: seen.append((name, given[0], given[0]._version))
        )
        for name, layer in layers.items()
    ]
    try:
        yield check
    finally:
        for handle in handles:
            handle.remove()


def output_fisher(
    model: UserModule, layers: Mapping[str, nn.Module], request: Request, progress: Progress
) -> dict[str, Array]:
    """float32 [rows] by name: mean squared gradient of log p(y) by each output, y drawn from p.

    p is the softmax over the last axis of the model's output. A convolution's outputs are meant
    over places. One sample a pass, as `compress.calibrate.fisher` has it for transformers.
    """
    generator = torch.Generator().manual_seed(request.seed)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    seen: list[tuple[str, torch.Tensor]] = []

    def hook(name: str) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
        def note(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            seen.append((name, output))
            return output.clone()  # which the model may write over

        return note

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    model.inner.requires_grad_(True)  # outputs have gradients only behind something that has
    try:
        batches = request.fisher_batches()
        for number, arrays in enumerate(batches):
            progress("calibrating: outputs", number, len(batches))
            seen.clear()
            with torch.enable_grad():
                likelihood = torch.log_softmax(model.call(arrays).float(), dim=-1)
                flat = likelihood.reshape(-1, likelihood.shape[-1])
                drawn = torch.multinomial(flat.detach().exp(), 1, generator=generator)
                scalar = flat.gather(1, drawn).sum()
            live = [(name, output) for name, output in seen if output.requires_grad]
            gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(
                scalar, [o for _, o in live], allow_unused=True
            )
            for (name, output), gradient in zip(live, gradients, strict=True):
                if gradient is None:
                    continue
                axis = -1 if isinstance(layers[name], nn.Linear) else 1
                by_row = gradient.movedim(axis, -1).reshape(-1, output.shape[axis])
                found = by_row.square().sum(dim=0, dtype=torch.float64)
                sums[name] = sums[name] + found if name in sums else found
                counts[name] = counts.get(name, 0) + len(by_row)
    finally:
        model.inner.requires_grad_(False)
        for handle in handles:
            handle.remove()
    return {name: (total / counts[name]).float().numpy() for name, total in sums.items()}
