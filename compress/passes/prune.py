"""Pruning with an exact count: by magnitude (global or by tensor) or by inputs; also N:M.

Global magnitude pruning with a minimum threshold (arXiv 2209.14624), with three differences: the
count is exact whatever ties there are, weights that are zero already count as pruned (so pruning
twice changes nothing), and the floor of every tensor and the global threshold are solved for
together instead of in turns.

With statistics of the inputs, `score=wanda` and `score=obs` (compress/solvers/input_masks.py) give
every tensor the same sparsity. OBS's mask assumes that kept weights will take over what pruned
ones did, as `quantize solver=obs` has them do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from compress import kernels
from compress.calibrate.statistics import DIAGONAL, SECOND_MOMENT, TensorStatistics
from compress.errors import UsageError, from_os_error, show
from compress.passes.base import Context, Pass, Terms, option, refuse
from compress.passes.mask_by_inputs import MaskByInputs
from compress.solvers import lamp, n_of_m, radix_select
from compress.solvers.input_masks import kept_of
from compress.solvers.magnitude_counts import (
    count_kept,
    count_low,
    count_magnitudes,
    count_pattern,
    protected_mask,
    protected_places,
    scored,
)
from compress.solvers.radix_select import Spill, TensorCut, TileCounts
from compress.tensor import Tensor, TensorInfo

MAX_GROUP = 64  # of N:M; hardware knows 2:4, and above this a group is hardly a pattern


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
        "what ranks weights: |w|, the scale-aware LAMP, |w| times the size of its inputs (wanda), "
        "or what losing it costs once others take over (obs); the last two need a calibration",
        choices=("magnitude", "lamp", "wanda", "obs"),
    )
    pattern: str = option("unstructured", "unstructured, or N:M (e.g. 2:4) kept of M in a row")

    damping: float = option(
        0.01,
        "score=obs: added to the diagonal of the second moments, as a share of its mean",
        low=0,
    )

    # Written by `bind` and `decide`.
    statistics: TensorStatistics | None = field(default=None, repr=False, compare=False)
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
        if self.by_inputs:
            for name, default in (("scope", "global"), ("min_keep", 0)):
                if getattr(self, name) != default:
                    raise UsageError(
                        f"prune: {name}={getattr(self, name)} has no meaning with"
                        f" score={self.score}, which prunes every tensor alike",
                        hint=f"leave {name} out",
                    )
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
            if getattr(self, name) != default and not (name == "score" and self.by_inputs):
                raise UsageError(
                    f"prune: {name}={getattr(self, name)} has no meaning with pattern {n}:{m}",
                    hint=f"leave {name} out",
                )

    @property
    def share(self) -> float:
        """The sparsity asked for, default filled in."""
        return 0.5 if self.sparsity is None else float(self.sparsity)

    @property
    def by_inputs(self) -> bool:
        """Whether the score is made with statistics of the inputs."""
        return self.score in ("wanda", "obs")

    @property
    def needs(self) -> frozenset[str]:
        """Wanda needs the diagonal of the inputs' second moments, OBS all of them."""
        return frozenset({"wanda": {DIAGONAL}, "obs": {SECOND_MOMENT}}.get(self.score, set()))

    def bind(self, info: TensorInfo, earlier: Sequence[Pass], context: Context) -> Prune:
        """With the tensor's statistics, where the score is made with them."""
        return replace(self, statistics=context.statistics) if self.by_inputs else self

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
        if self.scope == "tensor" or self.by_inputs:
            return 0, min(info.size, max(kept_of(info.size, self.share), terms.outliers[1]))
        return 0, info.size

    def row_wise(self, info: TensorInfo) -> bool:
        """Whether rows are pruned on their own: not where others of a column take over."""
        return self.score != "obs"

    # ------------------------------------------------------------ surveys

    @property
    def wants_survey(self) -> bool:
        """One sweep; a second one where float32 weights share the bin of a threshold."""
        return self.cuts is None

    def workspace(self, info: TensorInfo) -> int:
        """The second moments, kept for a site and its successor, and their factor with copies."""
        if self.score != "obs":
            return 0
        rows, columns = info.matrix_shape
        return 6 * 4 * columns * columns + 12 * rows * columns

    def surveys_whole(self, info: TensorInfo) -> bool:
        """OBS counts by blocks of columns over all rows."""
        return self.score == "obs"

    def survey_bytes(self, infos: list[TensorInfo]) -> int:
        """One sweep; a second over tensors whose magnitudes do not fit 15 bits, at most."""
        if not self.wants_survey:
            return 0
        if self.by_inputs:
            return sum(i.nbytes for i in infos)
        wide = {i.dtype for i in infos} not in ({"BF16"}, {"F16"})
        return sum(i.nbytes * (2 if wide and i.dtype != "BF16" else 1) for i in infos)

    def surveys(self, info: TensorInfo) -> bool:
        """Whether the next sweep has to read this tensor."""
        return self.sweep is None or info.name in self.sweep.plan.prefixes

    def survey(self, tensor: Tensor) -> TileCounts | None:
        """Counts of a tile's magnitudes. Raises InputError for a NaN or an infinity."""
        if self.sweep is not None:
            prefix = self.sweep.plan.prefixes.get(tensor.info.name)
            return None if prefix is None else count_low(tensor, prefix)
        if self.by_inputs:
            return count_kept(tensor, self._by_inputs(tensor).kept(tensor))
        if self.n_of_m is not None:
            return count_pattern(tensor, *self.n_of_m)
        return count_magnitudes(tensor)

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
        if self.n_of_m is not None or self.by_inputs:
            return self._decided_counts(spill)
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

    def _decided_counts(self, spill: Spill) -> Prune:
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
        if self.by_inputs:
            return tensor.with_(mask=self._by_inputs(tensor).mask(tensor))
        if self.n_of_m is not None:
            mask = n_of_m.mask(scored(tensor), *self.n_of_m, protected_mask(tensor))
            return tensor.with_(mask=mask)
        cut = self.cuts[tensor.info.name]
        values = scored(tensor)
        rows, columns = protected_places(tensor)
        if rows.size:  # they take no part in the ranking, nor in the ties
            values = values.copy()
            values[rows, columns] = 0
        mask = np.empty(values.shape, np.bool_)
        ties = cut.ties_in(tensor.first_row, values.shape[0])
        kernels.threshold_mask(values, cut.key, ties, mask)
        if rows.size:
            mask[rows, columns] = True
        return tensor.with_(mask=mask)

    def _by_inputs(self, tensor: Tensor) -> MaskByInputs:
        if self.statistics is None:
            raise UsageError(
                f"prune: tensor {show(tensor.info.name)}: score={self.score} has no statistics",
                hint="give --text F to calibrate on the way, or --stats F",
            )
        return MaskByInputs(self.score, self.share, self.n_of_m, self.damping, self.statistics)

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


def _threshold(spill: Spill, cuts: Mapping[str, TensorCut]) -> float:
    """The largest magnitude that a tensor without a floor of its own loses: all cuts' least."""
    keys = []
    for tensor in spill.tensors():
        cut = cuts[tensor.name]
        if cut.kept > tensor.protected:
            keys.append(radix_select.float_of_key(cut.key, tensor.kind))
    return max(keys, default=0.0)
