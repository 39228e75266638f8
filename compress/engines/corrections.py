"""Vectors of single layers, corrected so that their outputs come near the dense model's again.

A `Unit` is one layer that occurs in both models. The dense one is watched; then the other model
runs, and each layer is corrected when it is called, so that those behind it see what it gives by
then. A correction is kept only where it lowers the error of the layer's outputs on inputs that it
was not made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from compress.formats.arrays import cast_like
from compress.solvers.channel_corrections import Moments, least_squares_gain, match_batch_norm
from compress.tensor import DTYPES, Array, TensorInfo

BN, BIAS, SCALE = "bn", "bias", "scale"
KINDS = (BN, BIAS, SCALE)
_STATISTICS = ("running_mean", "running_var")
_LEAST = 1e-6  # share of an error that a correction has to take away: less is rounding
_Cut = tuple[torch.Tensor, torch.Tensor]
_HELD_BYTES = 8 << 20  # of a unit's input in a batch that judge it, or one sample


@dataclass(frozen=True)
class Settings:
    """What may be corrected, and how.

    estimate  give BatchNorms the statistics of their inputs, instead of matching the dense ones
    gate      keep a correction only where it helps
    """

    kinds: frozenset[str] = frozenset(KINDS)
    estimate: bool = False
    gate: bool = True


@dataclass(frozen=True)
class Share:
    """A batch's samples; the first `learn` of them are to be learned from, the rest held out."""

    samples: int
    learn: int

    def cut(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The values [samples * k, ...] of those to learn from, and of some of the others."""
        each = len(values) // self.samples
        place = each * self.learn
        nbytes = max(1, each * values[:1].numel() * values.element_size())
        few = max(1, _HELD_BYTES // nbytes) * each
        return values[:place], values[place : place + few]


@dataclass(eq=False)
class Unit:
    """A layer in both models.

    tensors  attribute -> the stored tensor that a correction may rewrite
    """

    name: str
    kind: str
    dense: nn.Module
    now: nn.Module
    tensors: Mapping[str, TensorInfo]
    calls: int = 0
    odd: bool = False  # it was not called as one layer of samples is
    moments: Moments | None = None  # of the dense model: a BatchNorm's input, else the output
    learned: list[torch.Tensor] = field(default_factory=list)  # dense outputs, of SCALE alone
    held: list[torch.Tensor] = field(default_factory=list)  # dense outputs that judge

    @property
    def usable(self) -> bool:
        """Whether there is something to learn from and something to judge by."""
        learned = self.moments is not None and self.moments.count > 0
        return learned and not self.odd and sum(map(len, self.held)) > 0

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Values as [n, channels]."""
        axis = 1 if isinstance(self.now, _BatchNorm | _ConvNd | nn.GroupNorm) else -1
        return values.movedim(axis, -1).reshape(-1, values.shape[axis])


@dataclass(frozen=True)
class Judged:
    """What became of a unit: relative errors on held-out samples, before and after.

    unit  the stored name of the layer
    """

    unit: str
    kind: str
    before: float
    after: float
    kept: bool


class _Enough(BaseException):
    """Ends a forward pass that has shown what it was run for; no user code should catch it."""


def find_units(
    dense: nn.Module, now: nn.Module, stored: Callable[[str], TensorInfo | None], settings: Settings
) -> list[Unit]:
    """Layers of `now` (and the same of `dense`) whose vectors may be rewritten.

    stored  the tensor behind a parameter or buffer, None where it must stay as it is
    """
    twins = dict(dense.named_modules())
    found: list[Unit] = []
    taken: set[str] = set()
    for name, module in now.named_modules():
        kind = _kind(module)
        if kind is None or kind not in settings.kinds or name not in twins:
            continue
        attributes = {BN: ("weight", "bias"), BIAS: ("bias",), SCALE: ("weight",)}[kind]
        if kind == BN and settings.estimate:
            attributes = _STATISTICS
        infos = {a: stored(f"{name}.{a}" if name else a) for a in attributes}
        tensors = {a: info for a, info in infos.items() if info is not None}
        names = {info.name for info in tensors.values()}
        if len(tensors) == len(attributes) and not names & taken:
            taken |= names
            found.append(Unit(name, kind, twins[name], module, tensors))
    return found


def _kind(module: nn.Module) -> str | None:
    """What can be corrected in a layer, if anything."""
    own = module._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if isinstance(module, _BatchNorm):
        complete = weight is not None and bias is not None and module.running_mean is not None
        return BN if complete else None
    if weight is None or isinstance(module, nn.Embedding):
        return None
    if weight.ndim >= 2:
        return BIAS if bias is not None and bias.ndim == 1 else None
    is_norm = type(module).__name__.lower().endswith("norm")
    return SCALE if is_norm and weight.ndim == 1 and bias is None else None


@torch.no_grad()
def watch(
    units: Sequence[Unit], run_dense: Callable[[int], Any], shares: Sequence[Share]
) -> list[Unit]:
    """The units that can be corrected, in the order of their calls, knowing the dense model's.

    run_dense  runs the dense model, or a part of it, on a batch's samples
    """
    order: list[Unit] = []
    for number, share in enumerate(shares):
        with _watched(units, share, order):
            run_dense(number)
    return [unit for unit in order if unit.usable and unit.calls == len(shares)]


class Corrector:
    """Corrects units part by part of a model, and keeps account.

    forced  layers that are corrected even where their own outputs lose by it
    values  the new values of stored tensors, in their dtype and shape
    judged  one entry a unit that was looked at and differs from the dense one
    """

    def __init__(self, settings: Settings, forced: frozenset[str] = frozenset()) -> None:
        self.settings, self.forced = settings, forced
        self.values: dict[str, Array] = {}
        self.judged: list[Judged] = []
        self.units = 0

    @torch.no_grad()
    def correct(
        self,
        units: Sequence[Unit],
        run: Callable[[int], Any],
        shares: Sequence[Share],
        judge: Callable[[], float] | None = None,
    ) -> None:
        """Correct units that were watched, in one part of a model (a block, or all of it).

        run    runs the part on a batch's samples; it may be called often, and ended early
        judge  the error of the part's output on held-out samples, where there are many batches;
               without it units are judged by their own outputs
        """
        self.units += len(units)
        if units and len(shares) == 1:
            self._on_the_way(units, run, shares[0])
            return
        for unit in units:
            self._one_by_one(unit, run, shares, judge)

    def _on_the_way(self, units: Sequence[Unit], run: Callable[[int], Any], share: Share) -> None:
        """All units in one pass: each is corrected just before it runs."""

        def hook(unit: Unit) -> Any:
            def solve(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
                parts = [share.cut(given[0])]
                self._solve(unit, parts, lambda: _error(unit, parts))

            return solve

        handles = [unit.now.register_forward_pre_hook(hook(unit)) for unit in units]
        try:
            run(0)
        finally:
            for handle in handles:
                handle.remove()

    def _one_by_one(
        self, unit: Unit, run: Callable[[int], Any], shares: Sequence[Share],
        judge: Callable[[], float] | None,
    ) -> None:  # fmt: skip
        """One unit, from a pass of every batch that ends where it is called."""
        inputs: list[torch.Tensor] = []

        def take(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            inputs.append(given[0])
            raise _Enough

        handle = unit.now.register_forward_pre_hook(take)
        try:
            for number in range(len(shares)):
                with suppress(_Enough):
                    run(number)
        finally:
            handle.remove()
        parts = [share.cut(one) for one, share in zip(inputs, shares, strict=True)]
        self._solve(unit, parts, judge or (lambda: _error(unit, parts)))

    def _solve(self, unit: Unit, parts: Sequence[_Cut], judge: Callable[[], float]) -> None:
        """Correct a unit that is given (inputs to learn from, held-out ones) in each batch."""
        learn = [part for part, _ in parts if len(part)]
        before = judge()
        old = {a: getattr(unit.now, a).detach().clone() for a in unit.tensors}
        new = _proposal(unit, learn, self.settings)
        stored = {a: _as_stored(values, unit.tensors[a]) for a, values in new.items()}
        for attribute, values in stored.items():
            getattr(unit.now, attribute).copy_(torch.from_numpy(values.astype(np.float32)))
        if all(torch.equal(getattr(unit.now, a), old[a]) for a in old):
            return  # it needs nothing
        after = judge()
        place = next(iter(unit.tensors.values())).name.rpartition(".")[0]
        helps = after < before * (1 - _LEAST) or place in self.forced
        kept = bool(np.isfinite(after)) and (helps or not self.settings.gate)
        self.judged.append(Judged(place, unit.kind, before, after, kept))
        if not kept:
            for attribute, values in old.items():
                getattr(unit.now, attribute).copy_(values)
            return
        for attribute, array in stored.items():
            if not torch.equal(getattr(unit.now, attribute), old[attribute]):
                self.values[unit.tensors[attribute].name] = array


def _proposal(
    unit: Unit, learn: Sequence[torch.Tensor], settings: Settings
) -> dict[str, torch.Tensor]:
    """New values by attribute, float64."""
    module: Any = unit.now
    dense = unit.moments
    if dense is None:
        return {}
    if unit.kind == SCALE:
        outputs = [unit.rows(module.forward(part)) for part in learn]
        factor = least_squares_gain([unit.rows(part) for part in unit.learned], outputs)
        offset = _offset(module, learn[0])
        return {"weight": (module.weight.double() + offset) * factor - offset}
    if unit.kind == BIAS:
        now = _moments(unit, [module.forward(part) for part in learn])
        return {"bias": module.bias.double() + (dense.mean - now.mean)}
    now = _moments(unit, learn)
    if torch.equal(now.mean, dense.mean) and torch.equal(now.variance, dense.variance):
        return {}
    if settings.estimate:
        return {"running_mean": now.mean, "running_var": now.variance}
    deviation = (module.running_var.double() + module.eps).sqrt()
    gain, bias = match_batch_norm(
        module.weight.double(), module.bias.double(), module.running_mean.double(), deviation,
        dense, now,
    )  # fmt: skip
    return {"weight": gain, "bias": bias}


def _offset(module: Any, sample: torch.Tensor) -> float:
    """0 where a norm multiplies by its weight, 1 where by 1 + weight (as Gemma's does)."""
    weight = module.weight.detach().clone()
    module.weight.zero_()
    silent = not bool(module.forward(sample[:1]).any())
    module.weight.copy_(weight)
    return 0.0 if silent else 1.0


def _moments(unit: Unit, parts: Sequence[torch.Tensor]) -> Moments:
    total = Moments.of(unit.rows(parts[0]))
    for part in parts[1:]:
        total = total.with_(Moments.of(unit.rows(part)))
    return total


def _error(unit: Unit, parts: Sequence[_Cut]) -> float:
    """Relative error of the unit's outputs, against the dense model's of the same samples."""
    module: Any = unit.now
    error = norm = 0.0
    for (_, inputs), wanted in zip(parts, unit.held, strict=True):
        if len(inputs):
            gap = module.forward(inputs) - wanted
            error += float(gap.square().sum(dtype=torch.float64))
            norm += float(wanted.square().sum(dtype=torch.float64))
    return float(np.sqrt(error / norm if norm > 0 else error))


def _as_stored(values: torch.Tensor, info: TensorInfo) -> Array:
    """Float64 values in the stored dtype and shape; finite ones stay finite."""
    dtype = DTYPES[info.dtype]
    if dtype == np.float64:
        return values.numpy().reshape(info.shape)
    return cast_like(values.float().numpy().reshape(1, -1), dtype).reshape(info.shape)


@contextmanager
def _watched(units: Sequence[Unit], share: Share, order: list[Unit]) -> Iterator[None]:
    """Keep what one batch's calls say of the dense model; `order` takes units as called."""

    def hook(unit: Unit) -> Any:
        def note(_: nn.Module, given: Any, keywords: Any, output: Any) -> None:
            if unit not in order:
                order.append(unit)
            unit.calls += 1
            single = len(given) == 1 and not keywords and isinstance(output, torch.Tensor)
            if single and len(given[0]) % share.samples == 0:
                _remember(unit, *share.cut(given[0]))
            else:
                unit.odd = True

        return note

    handles = [unit.dense.register_forward_hook(hook(unit), with_kwargs=True) for unit in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _remember(unit: Unit, learn: torch.Tensor, held: torch.Tensor) -> None:
    """Note what the dense layer makes of its inputs.

    The same products of the same shapes as of the other model, so that equals come out equal.
    """
    module: Any = unit.dense
    if len(learn):
        learned = module.forward(learn)
        moments = Moments.of(unit.rows(learn if unit.kind == BN else learned))
        unit.moments = moments if unit.moments is None else unit.moments.with_(moments)
        if unit.kind == SCALE:
            unit.learned.append(learned)
    unit.held.append(module.forward(held) if len(held) else held)
