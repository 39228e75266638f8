"""The Fisher diagonal of linear layers' outputs, by one sweep forward and one back over blocks.

For labels y drawn from the model's own output, F = E[(d log p(y) / d output)^2]: to second order
the KL divergence that an error e of the outputs causes is sum F e^2 / 2, over tokens and outputs
(Martens 2020, "New insights and perspectives on the natural gradient method"). A sample's
log-likelihood is the sum over its tokens, whose terms are uncorrelated, so that one backward pass
a sample gives every place's share. For an encoder without a head the output is the mean-pooled,
normalised embedding, whose gradients along random directions give the Gauss-Newton diagonal of
1 - cosine.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.calibrate.calibrate import Request
from compress.engines.blocks import Batch, BlockModel
from compress.errors import UsageError, show
from compress.tensor import Array

_DRAWS = 4  # directions, of embeddings
_IN_MEMORY = 1 << 28


def output_fisher(
    model: BlockModel, request: Request, names: Sequence[str], folder: Path
) -> dict[str, Array]:
    """float32 [rows] for each of the named linear layers: the mean of F over tokens.

    folder  where block inputs wait for the way back when they take more than 256 MB
    Raises UsageError for a model with neither logits nor hidden states as its output.
    """
    generator = torch.Generator().manual_seed(request.seed)
    batches = [
        model.start({name: torch.from_numpy(a) for name, a in arrays.items()})
        for arrays in request.fisher_batches()
    ]
    kept = _Kept(model.depth, [tuple(batch.hidden.shape) for batch in batches], folder)
    sums = _Sums(set(names))
    try:
        for index in range(model.depth):
            with model.loaded(index):
                for number, batch in enumerate(batches):
                    kept.put(index, number, batch.hidden)
                    model.advance(index, batch)
        outside = {n: m for n, m in model.outside_linears().items() if n in sums.names}
        gradients = [_from_output(model, batch, outside, sums, generator) for batch in batches]
        for index in reversed(range(model.depth)):
            modules = {n: m for n, m in model.linears(index).items() if n in sums.names}
            with model.loaded(index):
                for number, batch in enumerate(batches):
                    gradients[number] = _through_block(
                        model, index, batch, kept.get(index, number), gradients[number], modules,
                        sums,
                    )  # fmt: skip
    finally:
        kept.close()
    return sums.means(names)


class _Sums:
    """Sums of squared gradients by tensor, float64."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def add_all(
        self,
        outputs: Sequence[tuple[str, torch.Tensor]],
        gradients: Sequence[torch.Tensor | None],
    ) -> None:
        """Add the gradients with respect to outputs; None where an output has no part in it."""
        for (name, _), gradient in zip(outputs, gradients, strict=True):
            if gradient is not None:
                self._add(name, gradient)

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        flat = gradient.reshape(-1, gradient.shape[-1])
        found = flat.square().sum(dim=0, dtype=torch.float64)
        self._sums[name] = self._sums[name] + found if name in self._sums else found
        self._counts[name] = self._counts.get(name, 0) + len(flat)

    def means(self, names: Sequence[str]) -> dict[str, Array]:
        """float32 [rows] by tensor, of those that were seen."""
        return {
            name: (self._sums[name] / self._counts[name]).numpy().astype(np.float32)
            for name in names
            if name in self._sums
        }


@contextmanager
def _outputs(modules: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The outputs of the modules' calls, in order."""
    seen: list[tuple[str, torch.Tensor]] = []

    def hook(name: str) -> Any:
        def note(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            seen.append((name, output))

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _from_output(
    model: BlockModel, batch: Batch, modules: Mapping[str, nn.Module], sums: _Sums,
    generator: torch.Generator,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of each drawn scalar with respect to the last block's output."""
    hidden = batch.hidden.detach().requires_grad_()
    with torch.enable_grad(), _outputs(modules) as seen:
        output = model.finish(batch, hidden)
        main, aside = _scalars(output, model, generator)
    live = [(name, value) for name, value in seen if value.requires_grad]
    gradients = []
    for scalar in main:
        made = torch.autograd.grad(
            scalar, [hidden, *(v for _, v in live)], retain_graph=True, allow_unused=True
        )
        gradients.append(made[0])
        sums.add_all(live, made[1:])
    for scalar in aside if live else ():
        sums.add_all(
            live,
            torch.autograd.grad(scalar, [v for _, v in live], retain_graph=True, allow_unused=True),
        )
    return gradients


def _through_block(
    model: BlockModel,
    index: int,
    batch: Batch,
    inputs: torch.Tensor,
    gradients: list[torch.Tensor],
    modules: Mapping[str, nn.Module],
    sums: _Sums,
) -> list[torch.Tensor]:
    """The same with respect to a block's input."""
    hidden = inputs.requires_grad_()
    with torch.enable_grad(), _outputs(modules) as seen:
        output = model.call_block(index, batch, hidden)
    back = []
    for number, gradient in enumerate(gradients):
        made = torch.autograd.grad(
            output, [hidden, *(v for _, v in seen)], gradient,
            retain_graph=number + 1 < len(gradients), allow_unused=True,
        )  # fmt: skip
        sums.add_all(seen, made[1:])
        back.append(made[0])
    return back


def _scalars(
    output: Any, model: BlockModel, generator: torch.Generator
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What is derived: one log-likelihood, or the embedding along some directions.

    The second list is for a pooler alone, which has no part in the mean-pooled embedding.
    """
    logits = getattr(output, "logits", None)
    if logits is not None:
        likelihood = torch.log_softmax(logits.float(), dim=-1)
        flat = likelihood.reshape(-1, likelihood.shape[-1])
        drawn = torch.multinomial(flat.detach().exp(), 1, generator=generator)
        return [flat.gather(1, drawn).sum()], []
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        raise UsageError(
            f"{show(str(model.checkpoint.path))}: {type(model.model).__name__} gives neither"
            " logits nor hidden states",
            hint="its outputs have no likelihood to derive; use a recipe without it",
        )
    pooled = getattr(output, "pooler_output", None)
    main = _along(states.float().mean(dim=1), generator)
    return main, [] if pooled is None else _along(pooled.float(), generator)


def _along(embeddings: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
    """Embeddings [samples, size], normalised, along random directions."""
    normalised = nn.functional.normalize(embeddings, dim=-1)
    directions = nn.functional.normalize(
        torch.randn(_DRAWS, *normalised.shape, generator=generator), dim=-1
    )
    # The square of one entry of a unit vector is 1 / size on average.
    scale = float(normalised.shape[-1] ** 0.5)
    return [(normalised * direction).sum() * scale for direction in directions]


class _Kept:
    """Block inputs, in memory or in a file."""

    def __init__(self, depth: int, shapes: Sequence[tuple[int, ...]], folder: Path) -> None:
        self._shapes = shapes
        self._starts = np.cumsum([0, *(4 * int(np.prod(shape)) for shape in shapes)])
        self._memory: dict[tuple[int, int], Array] = {}
        self._path: Path | None = None
        if depth * int(self._starts[-1]) > _IN_MEMORY:
            self._path = folder / "block-inputs"
            self._file = open(self._path, "w+b", buffering=0)  # noqa: SIM115  closed by `close`

    def put(self, index: int, number: int, hidden: torch.Tensor) -> None:
        """Keep the input of block `index` for a batch."""
        values = np.ascontiguousarray(hidden.numpy())
        if self._path is None:
            self._memory[index, number] = values
            return
        self._file.seek(self._place(index, number))
        view = values.reshape(-1).view(np.uint8).data
        while view:
            view = view[self._file.write(view) :]

    def get(self, index: int, number: int) -> torch.Tensor:
        """A copy of it."""
        if self._path is None:
            return torch.from_numpy(self._memory[index, number].copy())
        values = np.empty(self._shapes[number], np.float32)
        view = values.reshape(-1).view(np.uint8).data
        self._file.seek(self._place(index, number))
        while view:
            done = self._file.readinto(view)
            if not done:
                raise OSError(errno.EIO, "became shorter", str(self._path))
            view = view[done:]
        return torch.from_numpy(values)

    def close(self) -> None:
        """Remove the file."""
        if self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)

    def _place(self, index: int, number: int) -> int:
        return int(index * self._starts[-1] + self._starts[number])
