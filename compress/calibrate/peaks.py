"""Super weights by running a model: peaks of its blocks, their causes zeroed, and again.

One round runs the blocks but the last over a few short samples, one block's weights in memory at a
time, and records what `compress.solvers.massive_activations` decides by. What it finds is zeroed
in the next round, so that what it hid shows; at most ten rounds, the last of which finds nothing.
The samples begin as the calibration's do, with the tokenizer's own first token: without it, the
massive activations move to the first delimiter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.calibrate.inputs import IDS
from compress.checkpoint import Checkpoint
from compress.engines.blocks import Batch, BlockModel
from compress.errors import InputError, UsageError, show
from compress.solvers.massive_activations import (
    MIN_COMPANION_RATIO,
    MIN_PEAK_SHARE,
    MIN_RATIO,
    BlockPeaks,
    Cause,
    ChannelPeak,
    Unexplained,
    causes,
    global_peak,
    leading_parts,
)
from compress.tensor import Array, Role, TensorInfo

ROUNDS = 10
SAMPLES, LENGTH = 8, 128  # what is run of the calibration's inputs, at most
CHANNELS = 64  # looked into, a block
LARGEST = 100  # weights that the causal check draws from, a tensor
_SEED = 0

Places = Mapping[str, Sequence[tuple[int, int]]]  # tensor -> (row, column)


@dataclass(frozen=True)
class Forward:
    """What running the model found.

    causes       with the round that found each, from 1
    unexplained  massive channels of the first round that no few weights make
    rounds       that were run
    tokens       in each
    """

    causes: tuple[tuple[Cause, int], ...]
    unexplained: tuple[Unexplained, ...]
    rounds: int
    tokens: int

    def places(self) -> dict[str, list[tuple[int, int]]]:
        """Rows and columns, by tensor."""
        return _places((c.tensor, c.row, c.column) for c, _ in self.causes)


def find_by_forward(
    checkpoint: Checkpoint, inputs: Mapping[str, Array], downs: Sequence[TensorInfo], most: int
) -> Forward:
    """The entries of `downs` (down projections) that make massive activations.

    inputs  `input_ids` int32 [samples, longest], -1 beyond the end of a shorter sample
    most    accepted of one tensor, the strongest first
    Raises UsageError where the model is no stack of blocks or the inputs are no tokens, InputError
    where values are not finite.
    """
    model = BlockModel(checkpoint)
    samples = _samples(inputs)
    by_name = {info.name: info for info in downs}
    found: dict[tuple[str, int, int], tuple[Cause, int]] = {}
    first: list[Unexplained] = []
    number, peak = 0, 0.0
    for number in range(1, ROUNDS + 1):
        zeroed = _places(found)
        records = _peaks(model, samples, by_name, zeroed)
        peak = global_peak(records) if number == 1 else peak
        now, left = causes(records, peak)
        first = left if number == 1 else first
        counts = Counter({name: len(places) for name, places in zeroed.items()})
        before = len(found)
        for cause in now:
            key = (cause.tensor, cause.row, cause.column)
            if key not in found and counts[cause.tensor] < most:
                counts[cause.tensor] += 1
                found[key] = (cause, number)
        if len(found) == before:
            break
    tokens = sum(int(sample[IDS].numel()) for sample in samples)
    return Forward(tuple(found.values()), tuple(first), number, tokens)


def _places(found: Iterable[tuple[str, int, int]]) -> dict[str, list[tuple[int, int]]]:
    """Rows and columns, by tensor."""
    places: dict[str, list[tuple[int, int]]] = {}
    for name, row, column in found:
        places.setdefault(name, []).append((row, column))
    return places


def _samples(inputs: Mapping[str, Array]) -> list[dict[str, torch.Tensor]]:
    """The first few inputs, one a batch and short: what is massive is so on the first tokens."""
    ids = inputs.get(IDS)
    rows = [] if ids is None or ids.ndim != 2 else [row[row >= 0][:LENGTH] for row in ids]
    rows = [row for row in rows if row.size][:SAMPLES]
    if not rows:
        raise UsageError(
            "super-weights: method=forward runs a language model, and the statistics hold no token"
            " ids",
            hint="calibrate with --text or --ids and this recipe, or use method=score",
        )
    return [{IDS: torch.from_numpy(row.astype(np.int64))[None]} for row in rows]


# ---------------------------------------------------------------- one round


def _peaks(
    model: BlockModel,
    samples: Sequence[Mapping[str, torch.Tensor]],
    downs: Mapping[str, TensorInfo],
    zeroed: Places,
) -> list[BlockPeaks]:
    """Records of every block but the last, with some weights taken for zeros."""
    batches = [model.start(sample) for sample in samples]
    records = []
    for index in range(model.depth - 1):
        with model.loaded(index), _zeroed(model, index, downs, zeroed):
            here = {n: m for n, m in model.linears(index).items() if n in downs}
            with _watched(here) as watched:
                for batch in batches:
                    model.advance(index, batch)
            products = [_Product(downs[n], here[n], calls) for n, calls in watched.items()]
            hidden = torch.cat([b.hidden.flatten(0, -2) for b in batches])
            if not bool(hidden.isfinite().all()):
                raise InputError(
                    f"{show(str(model.checkpoint.path))}: the output of block {index} is not"
                    " finite in float32",
                    hint="the checkpoint is damaged, or its config is not its own",
                )
            records.append(_record(hidden, [p for p in products if p.covers(len(hidden))]))
    return records


class _Product:
    """A down projection in a block: X [tokens, columns], Y [tokens, rows] and the module's W."""

    def __init__(
        self, info: TensorInfo, module: nn.Module, calls: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self.info = info
        self._weight = module.get_parameter("weight")
        self._x = [x.flatten(0, -2) for x, _ in calls]
        self._y = [y.flatten(0, -2) for _, y in calls]
        self.tokens = sum(len(x) for x in self._x)

    def covers(self, tokens: int) -> bool:
        """Whether it was given every token; an expert of a mixture is given some of them."""
        return self.tokens == tokens

    def outputs(self) -> torch.Tensor:
        """|Y|, [tokens, rows]."""
        return torch.cat(self._y).abs()

    def parts(self, token: int, row: int) -> tuple[tuple[int, float], ...]:
        """What leads the sum of one output."""
        for x in self._x:
            if token < len(x):
                break
            token -= len(x)
        transposed = self.info.role is Role.CONV1D
        weights = self._weight[:, row] if transposed else self._weight[row]
        return leading_parts(x[token].double().numpy() * weights.detach().double().numpy())


def _record(hidden: torch.Tensor, products: Sequence[_Product]) -> BlockPeaks:
    """What is kept of one block: hidden is its output [tokens, channels]."""
    sizes = hidden.abs()
    tops, tokens = sizes.max(0)
    # A norm at the block's end keeps an entry from standing out of the other tokens; there it
    # presses its own token's other channels down instead.
    own = sizes.median(1).values[tokens]
    usual = torch.minimum(own, sizes.median())
    peak = float(tops.max())
    ratios = torch.where(usual > 0, tops / usual, torch.zeros_like(tops))
    order = torch.argsort(tops, descending=True, stable=True)[:CHANNELS].tolist()
    chosen = [
        c
        for c in order
        if float(ratios[c]) >= MIN_COMPANION_RATIO and float(tops[c]) >= MIN_PEAK_SHARE * peak
    ]
    outputs = [_Outputs.of(product) for product in products] if chosen else []
    channels = []
    for channel in chosen:
        token = int(tokens[channel])
        one = ChannelPeak(channel, float(tops[channel]), float(ratios[channel]))
        massive = [made for made in outputs if made.is_massive(token, channel)]
        if massive:
            product = max(massive, key=lambda made: float(made.sizes[token, channel])).product
            one = replace(one, tensor=product.info.name, parts=product.parts(token, channel))
        channels.append(one)
    return BlockPeaks(peak, tuple(channels))


@dataclass(frozen=True)
class _Outputs:
    """What a down projection adds: |Y|, [tokens, rows], and its median."""

    product: _Product
    sizes: torch.Tensor
    median: float

    @classmethod
    def of(cls, product: _Product) -> _Outputs:
        sizes = product.outputs()
        return cls(product, sizes, float(sizes.median()))

    def is_massive(self, token: int, channel: int) -> bool:
        """Whether one output is far out of all outputs."""
        if channel >= self.sizes.shape[1]:
            return False
        one = float(self.sizes[token, channel])
        least = max(MIN_RATIO * self.median, MIN_PEAK_SHARE * float(self.sizes[token].max()))
        return one > 0 and one >= least


@contextmanager
def _watched(
    modules: Mapping[str, nn.Module],
) -> Iterator[dict[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Inputs and outputs of modules, call by call, by name."""
    calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in modules}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            calls[name].append((arguments[0], output))

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _zeroed(
    model: BlockModel, index: int, downs: Mapping[str, TensorInfo], places: Places
) -> Iterator[None]:
    """Zeros at some places of the weights of a loaded block."""
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for name, module in model.linears(index).items():
        if places.get(name):
            weight = module.get_parameter("weight").data
            matrix = weight.T if downs[name].role is Role.CONV1D else weight
            rows, columns = torch.tensor(list(places[name])).T
            kept.append((matrix, torch.stack([rows, columns]), matrix[rows, columns].clone()))
            matrix[rows, columns] = 0
    try:
        yield
    finally:
        for matrix, (rows, columns), values in kept:
            matrix[rows, columns] = values


# ---------------------------------------------------------------- the causal check


@dataclass(frozen=True)
class Effect:
    """What zeroing does to the model's output on the samples.

    measure  "kl": mean KL divergence of the next-token distributions, in nats; "hidden": mean
             squared change of the last hidden state over its mean square (models without a head)
    found    with every weight that was found zeroed at once
    drawn    with as many drawn from the 100 largest of the same tensors
    """

    measure: str
    weights: int
    found: float
    drawn: float


def causal_check(
    checkpoint: Checkpoint,
    inputs: Mapping[str, Array],
    downs: Sequence[TensorInfo],
    found: Places,
) -> Effect:
    """The effect of zeroing `found`, beside that of as many large weights drawn (seeded)."""
    model = BlockModel(checkpoint)
    by_name = {info.name: info for info in downs}
    samples = _samples(inputs)
    batches = [model.start(sample) for sample in samples]
    variants: tuple[Places, ...] = ({}, found, _drawn(checkpoint, by_name, found))
    states = [[batch.hidden for batch in batches] for _ in variants]
    for index in range(model.depth):
        with model.loaded(index), torch.no_grad():
            for places, hidden in zip(variants, states, strict=True):
                with _zeroed(model, index, by_name, places):
                    hidden[:] = [
                        model.call_block(index, batch, state)
                        for batch, state in zip(batches, hidden, strict=True)
                    ]
    sums = [0.0, 0.0]
    measure = "kl"
    with torch.no_grad():
        for number, batch in enumerate(batches):
            outputs = [_output(model, batch, hidden[number]) for hidden in states]
            measure = outputs[0][0]
            for variant in (0, 1):
                sums[variant] += _distance(measure, outputs[0][1], outputs[variant + 1][1])
    weights = sum(len(places) for places in found.values())
    return Effect(measure, weights, sums[0] / len(batches), sums[1] / len(batches))


def _drawn(checkpoint: Checkpoint, downs: Mapping[str, TensorInfo], found: Places) -> Places:
    """As many places a tensor as were found, out of its largest others."""
    generator = np.random.default_rng(_SEED)
    drawn: dict[str, list[tuple[int, int]]] = {}
    for name, places in found.items():
        info = downs[name]
        sizes = np.abs(info.to_matrix(checkpoint.read(info)).astype(np.float32))
        for row, column in places:
            sizes[row, column] = 0
        count = min(LARGEST, sizes.size - len(places))
        largest = np.sort(np.argpartition(-sizes.ravel(), count - 1)[:count])
        chosen = generator.choice(largest, size=min(len(places), count), replace=False)
        drawn[name] = [divmod(int(i), sizes.shape[1]) for i in chosen]
    return drawn


def _output(model: BlockModel, batch: Batch, hidden: torch.Tensor) -> tuple[str, torch.Tensor]:
    output = model.finish(batch, hidden)
    logits = getattr(output, "logits", None)
    if logits is not None and logits.ndim == 3:
        return "kl", logits.float()
    return "hidden", output[0].float()


def _distance(measure: str, reference: torch.Tensor, other: torch.Tensor) -> float:
    if measure == "kl":
        p, q = reference.log_softmax(-1), other.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())
    return float((other - reference).square().mean() / reference.square().mean())
