"""`quantize`: integer codes with one scale (and zero point) per group of columns.

Scales come from kept, unprotected weights alone; a pruned weight gets the code of zero and so
decodes to exactly zero. With `search=mse` the scale of each group is the one with the least
squared error among shrunk candidates, and never worse than plain rounding's.

With `bpw`, `size` or `max_kl` the widths are chosen by tensor (compress/passes/quantize_budget.py).

With `solver=obs` later columns of a row absorb the rounding (and the pruning) of earlier ones, as
the second moments of the inputs tell (compress/solvers/obs_sweep.py): the weights' own error rises
and the outputs' falls.

Sums left in `Tensor.notes` (additive over the tiles of a tensor, float):

    squared_error        of the decoded tile against its source, protected entries exact
    plain_squared_error  the same for plain rounding: same bytes, no search
    squared_norm         of the source
    floored_scales       groups whose scale fell below the smallest normal number of scale_dtype
                         (such a group loses precision: a wider scale_dtype keeps it)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from compress import kernels
from compress.calibrate.statistics import (
    CROSS_MOMENT,
    INPUTS,
    SECOND_MOMENT,
    TensorStatistics,
)
from compress.errors import InputError, UsageError, show
from compress.kernels.reference_quantize import SMALLEST_NORMAL
from compress.passes import quantize_budget, quantize_overrides
from compress.passes.base import CodesSpec, Context, Outlook, Pass, Terms, option, refuse
from compress.passes.width_losses import Losses, losses
from compress.patterns import matches_any, require_matches
from compress.solvers.group_quantizer import CannotQuantize, quantize_matrix, working_dtype
from compress.solvers.obs_codes import obs_codes, with_dense_outputs
from compress.tensor import Array, Codes, Tensor, TensorInfo

SQUARED_ERROR = "squared_error"
PLAIN_SQUARED_ERROR = "plain_squared_error"
SQUARED_NORM = "squared_norm"
FLOORED_SCALES = "floored_scales"

SCALE_TAGS = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
PER_CHANNEL, PER_TENSOR = -1, 0


@dataclass(frozen=True)
class Quantize(Pass):
    """Round weights to 2-8 bits, with scales searched for the least squared error."""

    name: ClassVar[str] = "quantize"
    writes: ClassVar[str] = "codes"

    bits: int = option(4, "bits per weight, of all targets unless there is a budget", low=2, high=8)
    group: int = option(
        128,
        "columns that share a scale; -1: one scale per row, 0: one per tensor",
        low=-1,
        aliases=("group_size",),
    )
    symmetric: bool = option(True, "no zero points; false: an integer zero point per group")
    solver: str = option(
        "round",
        "round each weight by itself, or let later columns absorb the errors of earlier ones "
        "(obs: GPTQ and SparseGPT in one; needs a calibration)",
        choices=("round", "obs"),
    )
    search: str = option(
        "mse",
        "choose each scale by least squared error, or plain rounding from the range",
        choices=("mse", "none"),
    )
    signed_scale: bool = option(
        True, "let the search try negative scales, which put the extra code on the other side"
    )
    scale_dtype: str = option("fp16", "stored type of the scales", choices=("fp16", "bf16", "fp32"))
    on_indivisible: str = option(
        "error",
        "where the group does not divide the columns: refuse, let the last group be short, "
        "or use one scale per row",
        choices=("error", "short", "channel"),
    )
    damping: float = option(
        0.01, "of solver=obs: share of its mean that is added to the moments' diagonal", low=0
    )
    act_order: bool = option(
        False, "of solver=obs: columns with large inputs first, all scales chosen beforehand"
    )
    follow: bool = option(
        False,
        "of solver=obs: fit the dense outputs for inputs as the compressed layers before give them "
        "(runs the model layer by layer)",
    )
    bpw: float | None = option(
        None,
        "budget: bits per weight of the targets with all that is stored for them; widths by tensor",
        low=0,
    )
    size: int | str | None = option(
        None, "budget: bytes of the whole output, e.g. 12MB (report and manifest apart)"
    )
    max_kl: float | None = option(
        None,
        "budget: nats per token that the model may move from the source's predictions, measured",
        low=0,
    )
    widths: tuple[int, ...] = option((2, 3, 4, 5, 6, 8), "of a budget: the widths to choose from")
    groups: tuple[int, ...] = option((), "of a budget: groups to choose from (else the one group)")
    fuse: bool = option(
        True, "of a budget: tensors that engines join into one matrix share their width"
    )
    sensitivity: str = option(
        "auto",
        "of a budget: what a width costs, as measured on the whole model (kl), by the gradients of "
        "the outputs (fisher), by the outputs' or the weights' error; auto: the best at hand",
        choices=("auto", *quantize_budget.SENSITIVITIES),
    )
    overrides: tuple[Mapping[str, Any], ...] = option(
        (), "other options for some targets: {targets: [...], bits: 8}; the first match wins"
    )

    # Written by `bind`.
    statistics: TensorStatistics | None = field(default=None, repr=False, compare=False)
    # Written by `foresee` and `decide`: (bits, group) by tensor, and what is to be said of them.
    outlook: Outlook | None = field(default=None, repr=False, compare=False)
    chosen: Mapping[str, tuple[int, int]] | None = field(default=None, repr=False)
    found: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def needs(self) -> frozenset[str]:
        """Second moments to solve with, the inputs to follow, and what the budget asks for."""
        solvers = {self.solver, *(o.get("solver") for o in self.overrides)}
        moments = frozenset({SECOND_MOMENT}) if "obs" in solvers else frozenset()
        follow = self.follow or any(o.get("follow") for o in self.overrides)
        inputs = frozenset({INPUTS}) if follow else frozenset()
        return moments | inputs | quantize_budget.needs(self)

    @property
    def budgeted(self) -> bool:
        """Whether widths are chosen by tensor."""
        return not (self.bpw is None and self.size is None and self.max_kl is None)

    @property
    def welcomes(self) -> frozenset[str]:
        """What tells a width's cost."""
        return quantize_budget.welcomes(self)

    def follows(self, info: TensorInfo) -> bool:
        """Whether a target is fitted to inputs from compressed layers."""
        me = self.for_tensor(info)
        return me.follow and me.solver == "obs"

    def bind(self, info: TensorInfo, earlier: Sequence[Pass], context: Context) -> Quantize:
        """With the tensor's statistics, where its codes or the choice of its width need them."""
        if self.for_tensor(info).solver != "obs" and not self.wants_survey:
            return self
        return dataclasses.replace(self, statistics=context.statistics)

    def validate(self) -> None:
        """Raises UsageError for follow without obs, illegal overrides, budgets that do not fit."""
        if self.follow and self.solver != "obs":
            raise UsageError(
                "quantize: follow=true needs solver=obs, which absorbs errors",
                hint="add solver=obs, or leave follow out",
            )
        for i, override in enumerate(self.overrides):
            quantize_overrides.check(type(self), f"quantize: overrides[{i}]", override)
        quantize_budget.validate(self)

    def check(self, info: TensorInfo) -> None:
        """Raises UsageError for an empty tensor or a group that does not divide its columns."""
        rows, columns = info.matrix_shape
        if rows == 0 or columns == 0:
            raise refuse(info, "is empty", "leave it out with ignore")
        if not info.is_float:
            raise refuse(info, f"holds {info.dtype}, not floats", "leave it out with ignore")
        me = self.for_tensor(info)
        for group in {g for _, g in self.options_of(info)}:
            if group > 0 and columns % group and me.on_indivisible == "error":
                raise refuse(
                    info,
                    f"its {columns} columns are not a multiple of group={group}",
                    _ways_out(columns, group),
                )

    def check_all(self, infos: list[TensorInfo]) -> None:
        """Raises UsageError for an override whose pattern matches none of the pass's targets."""
        for override in self.overrides:
            require_matches("quantize: override", quantize_overrides.patterns(override), infos)

    def for_tensor(self, info: TensorInfo) -> Quantize:
        """This pass with the tensor's override and its width, and no overrides or budget left."""
        if not self.overrides and not self.budgeted:
            return self
        changes = self.override_of(info)
        if self.budgeted:
            bits, group = (self.chosen or {}).get(info.name) or self.options_of(info)[-1]
            changes |= {"bits": bits, "group": group, "bpw": None, "size": None, "max_kl": None}
        return dataclasses.replace(self, overrides=(), **changes)

    def override_of(self, info: TensorInfo) -> dict[str, Any]:
        """The options of the first override that matches, by field."""
        for override in self.overrides:
            if matches_any(quantize_overrides.patterns(override), info):
                return quantize_overrides.changes(type(self), override)
        return {}

    def options_of(self, info: TensorInfo) -> list[tuple[int, int]]:
        """(bits, group) that a tensor may get, fewest bytes first; one where it is settled."""
        own = self.override_of(info)
        bits, group = own.get("bits", self.bits), own.get("group", self.group)
        widths = self.widths if self.budgeted and "bits" not in own else (bits,)
        groups = self.groups if self.budgeted and self.groups and "group" not in own else (group,)
        return quantize_budget.by_bytes(self, info, [(b, g) for b in widths for g in groups])

    def with_choice(self, info: TensorInfo, choice: tuple[int, int]) -> Quantize:
        """This pass as it works on a tensor of that (bits, group)."""
        return dataclasses.replace(self, chosen={info.name: choice}).for_tensor(info)

    def spec(self, info: TensorInfo) -> CodesSpec:
        """What the tensor's codes will be, from its header."""
        spec = self.for_tensor(info)._own_spec(info)
        if not self.wants_survey:
            return spec
        least = self.with_choice(info, self.options_of(info)[0])._own_spec(info)
        return dataclasses.replace(spec, least=None if least == spec else least)

    def _own_spec(self, info: TensorInfo) -> CodesSpec:
        """The spec of a pass that is `for_tensor` already."""
        me = self
        columns = max(info.matrix_shape[1], 1)
        whole_row = me.group <= 0 or me.group >= columns
        if columns % max(me.group, 1) and me.on_indivisible == "channel":
            whole_row = True
        return CodesSpec(
            bits=me.bits,
            group_size=columns if whole_row else me.group,
            symmetric=me.symmetric,
            scale_dtype=SCALE_TAGS[me.scale_dtype],
            per_tensor=me.group == PER_TENSOR,
        )

    def predict(self, info: TensorInfo, terms: Terms) -> Terms:
        """The terms with codes of the resolved bits, group and scale type."""
        passes = terms.passes if self.name in terms.passes else (*terms.passes, self.name)
        return dataclasses.replace(terms, codes=self.spec(info), passes=passes)

    def row_wise(self, info: TensorInfo) -> bool:
        """True unless one scale, or one sweep over the columns, serves the whole tensor."""
        me = self.for_tensor(info)
        return me.group != PER_TENSOR and me.solver != "obs"

    def workspace(self, info: TensorInfo) -> int:
        """The second moments, kept for a site and its successor, and their factor with copies."""
        if self.for_tensor(info).solver != "obs":
            return 0
        rows, columns = info.matrix_shape
        return 6 * 4 * columns * columns + 12 * rows * columns

    @property
    def wants_survey(self) -> bool:
        """True while a budget is not shared out."""
        return self.budgeted and self.chosen is None

    def surveys(self, info: TensorInfo) -> bool:
        """Only tensors whose width is open; none where widths are measured on the whole model."""
        return self.sensitivity != quantize_budget.KL and len(self.options_of(info)) > 1

    def surveys_whole(self, info: TensorInfo) -> bool:
        """True: what a width does to the outputs is a figure of the whole matrix."""
        return True

    def survey_workspace(self, info: TensorInfo) -> int:
        """Codes, decoded weights, their error; the second moments."""
        rows, columns = info.matrix_shape
        return 16 * rows * columns + self.workspace(info)

    def survey(self, tensor: Tensor) -> dict[str, Losses]:
        """What each width costs, in every measure that is at hand."""
        return {tensor.info.name: losses(self, tensor)}

    def merge(self, a: dict[str, Losses], b: dict[str, Losses]) -> dict[str, Losses]:
        """Join those of different tensors."""
        return a | b

    def check_outlook(self, outlook: Outlook, infos: list[TensorInfo]) -> None:
        """Raises UsageError for a budget below what the smallest widths take."""
        if self.budgeted:
            quantize_budget.check(self, outlook, infos)

    def most_bytes(self, outlook: Outlook, infos: list[TensorInfo]) -> int | None:
        """What the budget holds the output to, where it is one of bytes."""
        return quantize_budget.most_bytes(self, outlook, infos) if self.wants_survey else None

    def possible(self, infos: list[TensorInfo]) -> list[Pass]:
        """Every width everywhere, and unequal ones in sets that engines fuse if they may differ."""
        return list(quantize_budget.possible(self, infos)) if self.wants_survey else []

    def warnings(self, calibrated: bool) -> list[str]:
        """That without data nothing is known of what an error does."""
        return quantize_budget.warnings(self, calibrated) if self.budgeted else []

    def foresee(self, outlook: Outlook) -> Quantize:
        """With the outlook, which knows sizes and makes models of trials."""
        return dataclasses.replace(self, outlook=outlook)

    def decide(self, statistic: dict[str, Losses] | None, infos: list[TensorInfo]) -> Quantize:
        """With a width for every target. Raises UsageError where the budget cannot be met."""
        return quantize_budget.decide(self, statistic or {}, infos)

    def facts(self) -> dict[str, Any]:
        """What the budget was spent on."""
        return dict(self.found)

    def apply(self, tensor: Tensor) -> Tensor:
        """Write the codes of one tile.

        Raises InputError for a weight that is not finite, and for a scale that its stored type
        cannot hold; both name the tensor and the way out.
        """
        me = self.for_tensor(tensor.info)
        if me.solver == "obs":
            return me._solve(tensor)
        spec = me._own_spec(tensor.info)
        values = _without_protected(tensor)
        try:
            codes, sums = quantize_matrix(
                values, tensor.mask, spec, search=me.search, signed_scale=me.signed_scale
            )
        except CannotQuantize as bad:
            raise _input_error(tensor, bad, me.scale_dtype) from None
        error, plain = sums.squared_error, sums.plain_squared_error
        norm = sums.squared_norm
        outliers = tensor.outliers
        if outliers is not None and outliers.rows.size:
            if outliers.in_scale:  # coded like the others, then overwritten: no error there
                error -= _error_at_outliers(tensor, codes, values)
                plain -= _plain_error_at_outliers(tensor, spec, values)
            else:
                norm += float(np.sum(outliers.values.astype(np.float64) ** 2))
        notes = tensor.notes | {
            SQUARED_ERROR: max(error, 0.0),
            PLAIN_SQUARED_ERROR: max(plain, 0.0),
            SQUARED_NORM: norm,
            FLOORED_SCALES: float(_floored(codes, spec.scale_dtype)),
        }
        return tensor.with_(codes=codes, notes=notes)

    def _solve(self, tensor: Tensor) -> Tensor:
        """The codes of a whole tensor by the OBS sweep under its mask."""
        if self.statistics is None:
            raise UsageError(
                f"quantize: tensor {show(tensor.info.name)}: solver=obs has no statistics",
                hint="give --text F to calibrate on the way, or --stats F",
            )
        spec = self._own_spec(tensor.info)
        moment, wanted = self.statistics.second_moment(), tensor
        try:
            if self.statistics.has(CROSS_MOMENT):
                cross = self.statistics.cross_moment()
                wanted = with_dense_outputs(tensor, moment, cross, self.damping)
            codes = obs_codes(
                wanted,
                moment,
                spec,
                search=self.search,
                signed_scale=self.signed_scale,
                damping=self.damping,
                act_order=self.act_order,
            )
            _, plain = quantize_matrix(_without_protected(tensor), tensor.mask, spec, search="none")
        except CannotQuantize as bad:
            raise _input_error(tensor, bad, self.scale_dtype) from None
        except ValueError as error:
            raise UsageError(
                f"tensor {show(tensor.info.name)}: {show(str(error), 200)}",
                hint="use a larger damping=, more calibration data, or solver=round for it",
            ) from error
        decoded = tensor.with_(codes=codes, factors=None).decode()
        sums = np.zeros(2, np.float64)
        kernels.error_sums(working_dtype(tensor.source), decoded, sums)
        notes = tensor.notes | {
            SQUARED_ERROR: float(sums[0]),
            PLAIN_SQUARED_ERROR: plain.squared_error,
            SQUARED_NORM: float(sums[1]),
            FLOORED_SCALES: float(_floored(codes, spec.scale_dtype)),
        }
        return tensor.with_(codes=codes, notes=notes)


def _ways_out(columns: int, group: int) -> str:
    divisor = max((g for g in range(16, group + 1) if columns % g == 0), default=None)
    ways = f"use group={divisor}, " if divisor else "use "
    return ways + (
        "on_indivisible=channel (one scale per row), on_indivisible=short (a shorter last group), "
        "an override for this tensor, or ignore"
    )


def _without_protected(tensor: Tensor) -> Array:
    """The source, with entries stored outside of their scale set to zero in a copy."""
    outliers = tensor.outliers
    if outliers is None or outliers.in_scale or not outliers.rows.size:
        return tensor.source
    values: Array = tensor.source.copy()
    values[outliers.rows, outliers.columns] = 0
    return values


def _input_error(tensor: Tensor, bad: CannotQuantize, scale_dtype: str) -> InputError:
    row, column = tensor.first_row + bad.row, bad.column
    value = tensor.source[bad.row, bad.column]
    if bad.overflow:
        what = f"the group at [{row}, {column}] needs a scale larger than {scale_dtype} can hold"
        wider = "bf16 or fp32" if scale_dtype == "fp16" else "fp32"
        hint = f"use scale_dtype={wider}, or leave the tensor out with ignore"
    else:
        what = f"weight [{row}, {column}] is {value}"
        if np.isfinite(float(value)):
            what += ", too large for float32"
        hint = "repair the checkpoint, or leave the tensor out with ignore"
    return InputError(f"tensor {show(tensor.info.name)}: {what}", hint=hint)


def _floored(codes: Codes, scale_dtype: str) -> int:
    """Groups whose scale is the smallest normal number of its type."""
    smallest = SMALLEST_NORMAL[scale_dtype]
    return int(np.count_nonzero(np.abs(codes.scale.astype(np.float32)) == smallest))


def _error_at_outliers(tensor: Tensor, codes: Codes, values: Array) -> float:
    """Squared error of the codes at the protected entries, before these are overwritten."""
    if tensor.outliers is None:
        return 0.0
    rows, inverse = np.unique(tensor.outliers.rows, return_inverse=True)
    scale, zero_point = codes.scale, codes.zero_point
    if scale.shape[0] == codes.values.shape[0]:
        scale = scale[rows]
        zero_point = None if zero_point is None else zero_point[rows]
    few = dataclasses.replace(
        codes, values=np.ascontiguousarray(codes.values[rows]), scale=scale, zero_point=zero_point
    )
    columns = tensor.outliers.columns
    decoded = few.dequantize()[inverse, columns].astype(np.float64)
    exact = values[tensor.outliers.rows, columns].astype(np.float64)
    return float(np.sum((exact - decoded) ** 2))


def _plain_error_at_outliers(tensor: Tensor, spec: CodesSpec, values: Array) -> float:
    """The same for plain rounding; only the rows that matter are rounded again."""
    if tensor.outliers is None:
        return 0.0
    if spec.per_tensor:
        codes, _ = quantize_matrix(values, tensor.mask, spec, search="none")
        return _error_at_outliers(tensor, codes, values)
    rows, inverse = np.unique(tensor.outliers.rows, return_inverse=True)
    mask = None if tensor.mask is None else tensor.mask[rows]
    few = working_dtype(values[rows])
    codes, _ = quantize_matrix(few, mask, spec, search="none")
    columns = tensor.outliers.columns
    decoded = codes.dequantize()[inverse, columns].astype(np.float64)
    return float(np.sum((few[inverse, columns].astype(np.float64) - decoded) ** 2))
