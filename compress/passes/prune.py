"""Magnitude pruning with an exact count, global or by tensor, unstructured or N:M.

Global magnitude pruning with a minimum threshold (arXiv 2209.14624), with three differences: the
count is exact whatever ties there are, weights that are zero already count as pruned (so pruning
twice changes nothing), and the floor of every tensor and the global threshold are solved for
together instead of in turns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from compress import kernels
from compress.errors import InputError, UsageError, from_os_error, show
from compress.passes.base import Pass, Terms, option, refuse
from compress.solvers import lamp, n_of_m, radix_select
from compress.solvers.radix_select import BFLOAT16, FLOAT16, FLOAT32, Spill, TensorCut, TileCounts
from compress.tensor import Array, Tensor, TensorInfo

MAX_GROUP = 64  # of N:M; hardware knows 2:4, and above this a group is hardly a pattern

_KINDS: dict[np.dtype[Any], int] = {
    np.dtype(ml_dtypes.bfloat16): BFLOAT16,
    np.dtype(np.float16): FLOAT16,
    np.dtype(np.float32): FLOAT32,
}
# First bin of the infinities and NaNs.
_NOT_FINITE = {BFLOAT16: 0x7F80, FLOAT16: 0x7C00, FLOAT32: 0x7F80}


def kept_of(size: int, sparsity: float) -> int:
    """Weights to keep of `size`: size - sparsity * size, the pruned count rounded half up.

    The sparsity is taken as the decimal number that was written, so 0.3 of 10 is 3.
    """
    return size - math.floor(Fraction(repr(float(sparsity))) * size + Fraction(1, 2))


@dataclass(frozen=True)
class _Sweep:
    """The state of a survey: what the first sweep counted, and what the second one looks for."""

    spill: Spill
    plan: radix_select.Plan


@dataclass(frozen=True)
class _Survey:
    """Counts of the tiles so far."""

    spill: Spill


@dataclass(frozen=True)
class Prune(Pass):
    """Zero the smallest weights."""

    name: ClassVar[str] = "prune"
    writes: ClassVar[str] = "mask"

    sparsity: float | None = option(
        None,
        "share of weights to zero, existing zeros included (0.5; with N:M 1 - N/M)",
        low=0,
        high=1,
    )
    scope: str = option(
        "global", "rank weights over all targets, or in each tensor", choices=("global", "tensor")
    )
    min_keep: int | float = option(
        0.0, "keep at least this many weights of each tensor (below 1: this share of it)", low=0
    )
    score: str = option(
        "magnitude",
        "what ranks weights: |w|, or the scale-aware LAMP",
        choices=("magnitude", "lamp"),
    )
    pattern: str = option("unstructured", "unstructured, or N:M (e.g. 2:4) kept of M in a row")

    # Written by `decide`.
    sweep: _Sweep | None = field(default=None, repr=False, compare=False)
    cuts: Mapping[str, TensorCut] | None = field(default=None, repr=False, compare=False)
    found: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.sparsity is None:
            parsed = _parse_pattern(self.pattern)
            default = 1 - parsed[0] / parsed[1] if parsed else 0.5
            object.__setattr__(self, "sparsity", default)

    # ------------------------------------------------------------ before any work

    def validate(self) -> None:
        """Raises UsageError for a sparsity of 1, a malformed pattern, options that conflict."""
        parsed = _parse_pattern(self.pattern)
        if parsed is not None and not 0 < parsed[0] < parsed[1] <= MAX_GROUP:
            raise UsageError(f"prune: pattern {self.pattern}: expected 0 < N < M <= {MAX_GROUP}")
        if not 0 <= self.share < 1:
            raise UsageError(
                f"prune: sparsity={self.share:g} leaves nothing", hint="use a number below 1"
            )
        if isinstance(self.min_keep, float) and self.min_keep >= 1:
            raise UsageError(
                f"prune: min_keep={self.min_keep:g}: a share of a tensor lies below 1",
                hint=f"for a count of weights write min_keep={int(self.min_keep)}",
            )
        if parsed is None:
            if self.pattern != "unstructured":
                raise UsageError(
                    f"prune: unknown pattern {show(self.pattern)}",
                    hint="use unstructured, or N:M such as 2:4",
                )
            if self.score == "lamp" and self.scope == "tensor":
                raise UsageError(
                    "prune: score=lamp only decides how much to prune of each tensor, "
                    "which scope=tensor fixes",
                    hint="drop score=lamp, or use scope=global",
                )
            return
        n, m = parsed
        if abs(self.share - (1 - n / m)) > 1e-9:  # room for written decimals
            raise UsageError(
                f"prune: sparsity={self.share:g} contradicts pattern {n}:{m}, "
                f"which prunes {1 - n / m:g}",
                hint="leave sparsity out",
            )
        for name, default in (("scope", "global"), ("score", "magnitude"), ("min_keep", 0)):
            if getattr(self, name) != default:
                raise UsageError(
                    f"prune: {name}={getattr(self, name)} has no meaning with pattern {n}:{m}",
                    hint=f"leave {name} out",
                )

    @property
    def share(self) -> float:
        """The sparsity asked for, default filled in."""
        return 0.5 if self.sparsity is None else float(self.sparsity)

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(N, M) of a semi-structured pattern."""
        return _parse_pattern(self.pattern)

    def check(self, info: TensorInfo) -> None:
        """Raises UsageError for integers and for columns that M does not divide."""
        if not info.is_float:
            raise refuse(info, f"dtype {info.dtype} cannot be pruned", "leave it out of targets")
        if self.n_of_m is None:
            return
        columns, m = info.matrix_shape[1], self.n_of_m[1]
        if columns % m:
            raise refuse(
                info,
                f"pattern {self.pattern} needs a multiple of {m} columns, this has {columns}",
                "add it to ignore, or choose another pattern",
            )

    def check_all(self, infos: list[TensorInfo]) -> None:
        """Raises UsageError where the floors ask for more weights than the sparsity leaves."""
        if self.n_of_m is not None or not self.min_keep:
            return
        sizes = [info.size for info in infos]
        groups = [sizes] if self.scope == "global" else [[size] for size in sizes]
        for index, group in enumerate(groups):
            budget = kept_of(sum(group), self.share)
            asked = sum(_floor(self.min_keep, size) for size in group)
            if asked <= budget:
                continue
            where = "" if self.scope == "global" else f"tensor {show(infos[index].name)}: "
            count = "1 tensor" if len(group) == 1 else f"{len(group)} tensors"
            raise UsageError(
                f"prune: {where}min_keep={self.min_keep:g} keeps {asked} weights of {count}, but "
                f"sparsity={self.share:g} leaves {budget} of {sum(group)}",
                hint=f"lower sparsity, or min_keep to at most {_largest_floor(self, sizes)}",
            )

    def predict(self, info: TensorInfo, terms: Terms) -> Terms:
        """Bounds of kept weights; exact once decided."""
        return replace(terms, nonzeros=self._bounds(info, terms), passes=(*terms.passes, self.name))

    def _bounds(self, info: TensorInfo, terms: Terms) -> tuple[int, int]:
        if self.cuts is not None:
            kept = self.cuts[info.name].kept
            return kept, kept
        if self.n_of_m is not None:
            n, m = self.n_of_m
            # Protected entries stay even where a group has more than N of them.
            return 0, min(info.size, info.size // m * n + terms.outliers[1])
        if self.scope == "tensor":
            return 0, min(info.size, max(kept_of(info.size, self.share), terms.outliers[1]))
        return 0, info.size

    def row_wise(self, info: TensorInfo) -> bool:
        """Always: ties are dealt out by tile."""
        return True

    # ------------------------------------------------------------ surveys

    @property
    def wants_survey(self) -> bool:
        """One sweep; a second one where float32 weights share the bin of a threshold."""
        return self.cuts is None

    def survey_bytes(self, infos: list[TensorInfo]) -> int:
        """One sweep; a second over tensors whose magnitudes do not fit 15 bits, at most."""
        if not self.wants_survey:
            return 0
        wide = {i.dtype for i in infos} not in ({"BF16"}, {"F16"})
        return sum(i.nbytes * (2 if wide and i.dtype != "BF16" else 1) for i in infos)

    def surveys(self, info: TensorInfo) -> bool:
        """Whether the next sweep has to read this tensor."""
        return self.sweep is None or info.name in self.sweep.plan.prefixes

    def survey(self, tensor: Tensor) -> TileCounts | None:
        """Counts of a tile's magnitudes. Raises InputError for a NaN or an infinity."""
        if self.sweep is not None:
            prefix = self.sweep.plan.prefixes.get(tensor.info.name)
            return None if prefix is None else _count_low(tensor, prefix)
        if self.n_of_m is not None:
            return _count_pattern(tensor, *self.n_of_m)
        return _count(tensor)

    def merge(self, a: Any, b: Any) -> Any:
        """Append b's tiles to a's, on disk. Raises ResourceError where there is no room."""
        if a is None or b is None:
            return b if a is None else a
        survey = _collect(a)
        try:
            for tile in b.spill.tiles() if isinstance(b, _Survey) else [b]:
                survey.spill.add(tile)
        except OSError as error:
            raise from_os_error(error, doing="counting weights in a temporary file") from error
        return survey

    def decide(self, statistic: Any, infos: list[TensorInfo]) -> Prune:
        """The pass with a cut for every tensor, or with what a second sweep must count."""
        spill = _collect(statistic).spill
        if self.sweep is not None:
            return self._decided(self.sweep.spill, self.sweep.plan, spill)
        if self.n_of_m is not None:
            return self._decided_pattern(spill)
        plan = self._plan(spill)
        if plan.prefixes:
            return replace(self, sweep=_Sweep(spill, plan))
        return self._decided(spill, plan, None)

    def _plan(self, spill: Spill) -> radix_select.Plan:
        """How many weights each tensor keeps, as far as the first sweep tells."""
        sizes = nonzeros = 0
        floors: dict[str, int] = {}
        kept: dict[str, int] = {}
        for tensor in spill.tensors():
            sizes += tensor.size
            nonzeros += tensor.nonzeros
            floor = min(_floor(self.min_keep, tensor.size), tensor.nonzeros)
            floors[tensor.name] = max(floor, tensor.protected)
            own = min(kept_of(tensor.size, self.share), tensor.nonzeros)
            kept[tensor.name] = max(own, tensor.protected)
        if self.scope == "tensor":
            return radix_select.plan_counts(spill, kept)
        budget = min(kept_of(sizes, self.share), nonzeros)
        if self.score == "lamp":
            return radix_select.plan_counts(spill, lamp.counts(spill, budget, floors))
        return radix_select.plan_global(spill, budget, floors)

    def _decided(self, spill: Spill, plan: radix_select.Plan, low: Spill | None) -> Prune:
        cuts = radix_select.cuts(plan, spill, low)
        found = self._summary(spill, {name: cut.kept for name, cut in cuts.items()})
        if self.scope == "global" and self.score == "magnitude":
            found["threshold"] = _threshold(spill, cuts)
        return replace(self, sweep=None, cuts=cuts, found=found)

    def _decided_pattern(self, spill: Spill) -> Prune:
        kept = {t.name: int(t.counts.sum()) for t in spill.tensors()}
        cuts = {name: TensorCut(0, count) for name, count in kept.items()}
        return replace(self, cuts=cuts, found=self._summary(spill, kept))

    def _summary(self, spill: Spill, kept: Mapping[str, int]) -> dict[str, Any]:
        """What `facts` reports."""
        total = zeros = protected = asked = 0
        dense = []
        for tensor in spill.tensors():
            total += tensor.size
            zeros += tensor.zeros
            protected += tensor.protected
            asked += kept_of(tensor.size, self.share)
            if kept[tensor.name] == tensor.size:
                dense.append(tensor.name)
        asked = kept_of(total, self.share) if self.scope == "global" else asked
        left = sum(kept.values())
        notes = []
        if left + zeros == total:
            notes.append("already sparse enough: nothing changed" if zeros else "nothing pruned")
        elif dense:
            notes.append(f"{len(dense)} tensors stay wholly dense")
        if left > asked and self.n_of_m is None:
            notes.append("protected weights alone exceed what the sparsity leaves")
        return {
            "requested_sparsity": self.share,
            "sparsity": 1 - left / total if total else 0.0,
            "weights": total,
            "kept": left,
            "zeros_before": zeros,
            "protected": protected,
            "threshold": None,
            "notes": notes,
        }

    # ------------------------------------------------------------ work

    def apply(self, tensor: Tensor) -> Tensor:
        """The tile with its mask: False for what is pruned and for every existing zero."""
        if self.cuts is None:
            raise RuntimeError("prune: apply before decide")
        if self.n_of_m is not None:
            mask = n_of_m.mask(_scored(tensor), *self.n_of_m, _protected_mask(tensor))
            return tensor.with_(mask=mask)
        cut = self.cuts[tensor.info.name]
        values = _scored(tensor)
        rows, columns = _protected(tensor)
        if rows.size:  # they take no part in the ranking, nor in the ties
            values = values.copy()
            values[rows, columns] = 0
        mask = np.empty(values.shape, np.bool_)
        ties = cut.ties_in(tensor.first_row, values.shape[0])
        kernels.threshold_mask(values, cut.key, ties, mask)
        if rows.size:
            mask[rows, columns] = True
        return tensor.with_(mask=mask)

    def facts(self) -> dict[str, Any]:
        """Requested and achieved sparsity, the threshold, counts and notes."""
        return dict(self.found or {})


def _parse_pattern(pattern: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", pattern)
    if match is None:
        return None
    n, m = int(match[1]), int(match[2])
    return (n, m) if m else None


def _floor(min_keep: float, size: int) -> int:
    """Weights that min_keep asks of a tensor; a share is rounded up."""
    if isinstance(min_keep, int):
        return min(min_keep, size)
    return min(math.ceil(Fraction(repr(min_keep)) * size), size)


def _largest_floor(pass_: Prune, sizes: list[int]) -> str:
    """The largest feasible min_keep, written as it would be typed."""

    def fits(min_keep: float) -> bool:
        groups = [sizes] if pass_.scope == "global" else [[size] for size in sizes]
        return all(
            sum(_floor(min_keep, size) for size in group) <= kept_of(sum(group), pass_.share)
            for group in groups
        )

    steps = 1 if isinstance(pass_.min_keep, int) else 10_000
    low, high = 0, math.ceil(pass_.min_keep * steps)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (middle, high) if fits(middle if steps == 1 else middle / steps) else (low, middle)
        )
    return str(low) if steps == 1 else f"{low / steps:g}"


def _collect(statistic: Any) -> _Survey:
    """A tile's counts, or none, as the start of a survey."""
    if isinstance(statistic, _Survey):
        return statistic
    try:
        survey = _Survey(Spill())
        if statistic is not None:
            survey.spill.add(statistic)
    except OSError as error:
        raise from_os_error(error, doing="counting weights in a temporary file") from error
    return survey


def _scored(tensor: Tensor) -> Array:
    """[rows, columns] in bfloat16, float16 or float32: what magnitudes are compared as.

    8-bit floats widen exactly; float64 is rounded to float32 and its largest values clipped.
    """
    values = np.ascontiguousarray(tensor.source)
    if values.dtype in _KINDS:
        return values
    if values.dtype.itemsize == 1:
        return values.astype(np.float16)
    _refuse_not_finite(tensor, np.flatnonzero(~np.isfinite(values))[:1])
    limit = np.finfo(np.float32).max
    clipped: Array = np.clip(values, -limit, limit).astype(np.float32)
    return clipped


def _protected(tensor: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of protected entries that are not zero."""
    outliers = tensor.outliers
    if outliers is None or not outliers.rows.size:
        none = np.empty(0, np.int64)
        return none, none
    live = tensor.source[outliers.rows, outliers.columns].astype(np.float32) != 0
    return outliers.rows[live], outliers.columns[live]


def _protected_mask(tensor: Tensor) -> NDArray[np.bool_] | None:
    rows, columns = _protected(tensor)
    if not rows.size:
        return None
    mask = np.zeros(tensor.source.shape, np.bool_)
    mask[rows, columns] = True
    return mask


def _count(tensor: Tensor) -> TileCounts:
    """The first sweep's counts of one tile."""
    values = _scored(tensor)
    kind = _KINDS[values.dtype]
    counts = np.zeros(radix_select.BINS, np.uint64)
    kernels.magnitude_histogram(values, counts)
    if counts[_NOT_FINITE[kind] :].any():
        _refuse_not_finite(tensor, np.array([kernels.finite_index(values)]))
    zeros = int(counts[0])
    if zeros and kind == FLOAT32:  # the bin also holds the smallest subnormals
        zeros = values.size - int(np.count_nonzero(values))
    counts[0] -= np.uint64(zeros)
    rows, columns = _protected(tensor)
    shift = 16 if kind == FLOAT32 else 0
    np.subtract.at(counts, _keys(values[rows, columns]) >> shift, np.uint64(1))
    return _tile(tensor, kind, zeros, rows.size, counts)


def _count_low(tensor: Tensor, prefix: int) -> TileCounts:
    """The second sweep's counts of one tile: the low 16 bits of the keys in one bin."""
    values = _scored(tensor)
    counts = np.zeros(radix_select.LOW_BINS, np.uint64)
    kernels.magnitude_histogram_low(values, prefix, counts)
    rows, columns = _protected(tensor)
    keys = _keys(values[rows, columns])
    np.subtract.at(counts, keys[keys >> 16 == prefix] & 0xFFFF, np.uint64(1))
    if prefix == 0:
        counts[0] = 0  # zeros are never kept
    return _tile(tensor, FLOAT32, 0, rows.size, counts)


def _tile(
    tensor: Tensor, kind: int, zeros: int, protected: int, counts: NDArray[np.uint64]
) -> TileCounts:
    rows = tensor.source.shape[0]
    size = tensor.source.size
    bins, filled = radix_select.sparse(counts)
    return TileCounts(
        tensor.info.name, tensor.first_row, rows, kind, size, zeros, protected, bins, filled
    )


def _keys(values: Array) -> NDArray[np.int64]:
    """Magnitude keys of a few entries."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.dtype.itemsize == 2:
        return (flat.view(np.uint16) & 0x7FFF).astype(np.int64)
    return (flat.view(np.uint32) & 0x7FFFFFFF).astype(np.int64)


def _refuse_not_finite(tensor: Tensor, bad: NDArray[np.int64]) -> None:
    """Raises InputError for the first of the flat indices into the tile, if there is one."""
    if not bad.size:
        return
    columns = tensor.source.shape[1]
    row, column = divmod(int(bad[0]), columns)
    value = float(tensor.source[row, column])
    row += tensor.first_row
    raise InputError(
        f"tensor {show(tensor.info.name)}: weight {row * columns + column} (row {row}, column "
        f"{column}) is {value}",
        hint="such weights cannot be ranked: repair the checkpoint, or ignore this tensor",
    )


def _threshold(spill: Spill, cuts: Mapping[str, TensorCut]) -> float:
    """The largest magnitude that a tensor without a floor of its own loses: all cuts' least."""
    keys = []
    for tensor in spill.tensors():
        cut = cuts[tensor.name]
        if cut.kept > tensor.protected:
            keys.append(radix_select.float_of_key(cut.key, tensor.kind))
    return max(keys, default=0.0)


def _count_pattern(tensor: Tensor, n: int, m: int) -> TileCounts:
    """How many weights of a tile an N:M mask keeps, as a histogram of one bin."""
    values = _scored(tensor)
    bad = kernels.finite_index(values)
    if bad >= 0:
        _refuse_not_finite(tensor, np.array([bad]))
    kept, zeros = n_of_m.count(values, n, m, _protected_mask(tensor))
    counts = np.zeros(radix_select.BINS, np.uint64)
    counts[1] = kept
    return _tile(tensor, _KINDS[values.dtype], zeros, 0, counts)
