"""`low-rank`: factors B A that repair what pruning and quantization took from a matrix.

E = W - (dequant(codes) or the pruned W), protected entries left out, and B A its leading part in
the Frobenius norm. Without data every weight counts the same, so on a flat residual a rank takes
only its share: compare with spending the bytes on bits (the report does). With `metric=diag|full`
it is the leading part of what E does to the layer's outputs (compress/solvers/metric.py); `auto`
takes the better of the two on inputs that were kept apart.

With `allocate=global` ranks go to the tensors where a byte removes most of that error, under one
budget for all (compress/passes/rank_budget.py).

Sums left in `Tensor.notes`:

    squared_error       of the decoded matrix, with the factors as they are stored
    base_squared_error  of the codes without the factors, protected entries exact
    squared_norm        of the source
    alternate_rounds    rounds of `alternate` behind the result; 0: the codes were not changed
    alternate_weights   1 where the result began with the leading part of W
    full_metric         1 where metric=auto chose full
    nothing_to_repair   1 where no pass had changed the matrix, or the rank came to 0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compress import kernels
from compress.calibrate.statistics import (
    DIAGONAL,
    HELD_OUT,
    OUTPUT_FISHER,
    SECOND_MOMENT,
    TensorStatistics,
)
from compress.errors import InputError, UsageError, show
from compress.passes import rank_budget
from compress.passes.base import Context, Outlook, Pass, Terms, option, refuse
from compress.passes.quantize import SQUARED_ERROR, SQUARED_NORM, Quantize
from compress.solvers.alternate import Places, Problem, alternate
from compress.solvers.group_quantizer import working_dtype
from compress.solvers.metric import Metric, balanced
from compress.solvers.output_error import output_error, row_blocks
from compress.solvers.randomized_svd import truncated_svd
from compress.tensor import Array, Codes, Factors, Role, Tensor, TensorInfo

BASE_SQUARED_ERROR = "base_squared_error"
ALTERNATE_ROUNDS = "alternate_rounds"
ALTERNATE_WEIGHTS = "alternate_weights"
FULL_METRIC = "full_metric"
NOTHING_TO_REPAIR = "nothing_to_repair"

DEFAULT_RANK = 16
FACTOR_TAGS = {"fp16": "F16", "int8": "I8"}
# A base that must be usable without its adapter may have at most this many times the relative
# error of the codes that the recipe's quantizer gave before alternating.
BASE_STANDS = 1.5

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class LowRank(Pass):
    """Add a low-rank residual that repairs pruning and rounding."""

    name: ClassVar[str] = "low-rank"
    writes: ClassVar[str] = "factors"

    rank: int | None = option(None, "rank of the factors (16 unless bpw is given)", low=1)
    bpw: float | None = option(
        None,
        "instead of a rank: bits the factors may cost per weight, of each tensor or (allocate="
        "global) of all together",
        low=0,
    )
    size: int | str | None = option(
        None, "instead of a rank, with allocate=global: bytes of the whole output, e.g. 12MB"
    )
    allocate: str = option(
        "tensor",
        "the budget is each tensor's own, or one for all (global): ranks go where they gain most",
        choices=("tensor", "global"),
    )
    factor_dtype: str = option("fp16", "stored type of the factors", choices=("fp16", "int8"))
    metric: str = option(
        "plain",
        "what the factors repair: weights (plain), or outputs, with inputs taken for uncorrelated "
        "(diag) or not (full); auto: the better of these two on held-out inputs",
        choices=("plain", "diag", "full", "auto"),
    )
    damping: float = option(
        0.01, "of metric=diag|full: share of its mean that is added to the moments' diagonal", low=0
    )
    alternate: int = option(
        0, "rounds of quantizing W - BA and decomposing the rest anew", low=0, high=100
    )
    needs_adapter: bool = option(
        False, "let alternate find a base that is only good together with its factors"
    )
    seed: int = option(0, "seed of the random start of large decompositions", low=0)

    # Set by the planner, not by users.
    quantizer: Quantize | None = field(default=None)
    base_must_stand: bool = field(default=False)
    statistics: TensorStatistics | None = field(default=None, repr=False, compare=False)
    # Written by `foresee` and `decide`: the rank by tensor, and what is to be said of them.
    outlook: Outlook | None = field(default=None, repr=False, compare=False)
    ranks: Mapping[str, int] | None = field(default=None, repr=False)
    found: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def validate(self) -> None:
        """Raises UsageError where rank and budgets exclude each other, or bpw is 0."""
        rank_budget.validate(self)

    def check(self, info: TensorInfo) -> None:
        """Raises UsageError for a rank larger than the matrix allows."""
        _, out_features, in_features = stack_of(info)
        most = min(out_features, in_features)
        if self.rank_of(info) > most:
            raise refuse(
                info,
                f"rank={self.rank_of(info)} is more than its smaller side, {most}",
                f"use rank={max(most, 1)} or less, bpw=..., or ignore",
            )

    def bind(self, info: TensorInfo, earlier: Sequence[Pass], context: Context) -> LowRank:
        """With the quantizer that this tensor's codes come from, for `alternate`."""
        quantizer = next((p for p in reversed(earlier) if isinstance(p, Quantize)), None)
        return dataclasses.replace(
            self,
            quantizer=quantizer,
            base_must_stand=context.base_stands_alone,
            statistics=context.statistics if self.needs else None,
        )

    @property
    def needs(self) -> frozenset[str]:
        """What the metric is made of."""
        kinds = {"plain": set(), "diag": {DIAGONAL}, "full": {SECOND_MOMENT}}
        return frozenset(kinds.get(self.metric, {SECOND_MOMENT, HELD_OUT}))

    @property
    def welcomes(self) -> frozenset[str]:
        """What makes errors of different layers' outputs comparable."""
        weighs = self.allocate == "global" and self.metric != "plain"
        return frozenset({OUTPUT_FISHER} if weighs else ())

    @property
    def wants_survey(self) -> bool:
        """True while a budget of all tensors is not shared out."""
        return self.allocate == "global" and self.ranks is None

    def surveys_whole(self, info: TensorInfo) -> bool:
        """True: singular values are those of the whole matrix."""
        return True

    def survey_workspace(self, info: TensorInfo) -> int:
        """The error, whitened, and its Gram matrix in both precisions."""
        rows, columns = info.matrix_shape
        return self.workspace(info) + 16 * rows * columns + 24 * min(rows, columns) ** 2

    def survey(self, tensor: Tensor) -> dict[str, list[float]]:
        """What each further rank removes of the error."""
        return {tensor.info.name: rank_budget.gains(self, tensor)}

    def merge(self, a: dict[str, list[float]], b: dict[str, list[float]]) -> dict[str, list[float]]:
        """Join those of different tensors."""
        return a | b

    def check_outlook(self, outlook: Outlook, infos: list[TensorInfo]) -> None:
        """Raises UsageError for a size below that of the output without factors."""
        if self.size is not None:
            rank_budget.check(self, outlook)

    def most_bytes(self, outlook: Outlook, infos: list[TensorInfo]) -> int | None:
        """What the budget holds the output to."""
        return rank_budget.most_bytes(self, outlook, infos) if self.wants_survey else None

    def foresee(self, outlook: Outlook) -> LowRank:
        """With the outlook, which knows sizes."""
        return dataclasses.replace(self, outlook=outlook)

    def decide(self, statistic: dict[str, list[float]] | None, infos: list[TensorInfo]) -> LowRank:
        """With a rank for every target. Raises UsageError where the budget cannot be met."""
        return rank_budget.decide(self, statistic or {}, infos)

    def workspace(self, info: TensorInfo) -> int:
        """The second moments, kept for a site and its successor, their root, a whitened error."""
        if not self.needs:
            return 0
        rows, columns = info.matrix_shape
        moments = 0 if self.metric == "diag" else 10 * 4 * columns * columns
        return moments + 16 * rows * columns

    def rank_of(self, info: TensorInfo) -> int:
        """The rank for one tensor, the highest possible while a global budget is open.

        0 where not even rank 1 costs at most bpw bits a weight.
        """
        experts, out_features, in_features = stack_of(info)
        if self.ranks is not None:
            return self.ranks.get(info.name, 0)
        if self.wants_survey:
            return min(out_features, in_features)
        if self.bpw is None:
            return self.rank if self.rank is not None else DEFAULT_RANK
        bits_a_rank = 8 * self.bytes_a_rank(info) // max(experts, 1)
        affordable = int(self.bpw * out_features * in_features / bits_a_rank)
        return min(affordable, out_features, in_features)

    def bytes_a_rank(self, info: TensorInfo) -> int:
        """What one rank of a tensor takes; int8 has one float32 scale a column and row."""
        experts, out_features, in_features = stack_of(info)
        wide = 2 * (out_features + in_features)
        return experts * (wide // 2 + 8 if self.factor_dtype == "int8" else wide)

    def predict(self, info: TensorInfo, terms: Terms) -> Terms:
        """The terms with factors; unchanged where there is nothing to repair or the rank is 0."""
        rank = self.rank_of(info)
        if rank == 0 or (terms.codes is None and terms.nonzeros is None):
            return terms
        passes = terms.passes if self.name in terms.passes else (*terms.passes, self.name)
        return dataclasses.replace(
            terms,
            rank=rank,
            least_rank=0 if self.wants_survey else None,
            factor_dtype=FACTOR_TAGS[self.factor_dtype],
            passes=passes,
        )

    def row_wise(self, info: TensorInfo) -> bool:
        """False: the factors see the whole matrix."""
        return False

    def apply(self, tensor: Tensor) -> Tensor:
        """Write the factors, and with `alternate` also the codes.

        Raises InputError for a weight that is not finite or a factor that fp16 cannot hold, and
        UsageError where `alternate` has no quantizer to work with.
        """
        rank = self.rank_of(tensor.info)
        if rank == 0 or (tensor.codes is None and tensor.mask is None):
            return tensor.with_(notes=tensor.notes | {NOTHING_TO_REPAIR: 1.0})
        if self.metric == "auto":
            return self._better(tensor)
        if tensor.codes is None:
            return self._repair_pruned(tensor, rank)
        if self.alternate and self.quantizer is None:
            raise UsageError(
                f"tensor {show(tensor.info.name)}: alternate={self.alternate} has no quantizer",
                hint="put quantize before low-rank in the recipe, or leave alternate out",
            )
        problem = self._problem(tensor, rank)
        limit = None
        if self.base_must_stand and not self.needs_adapter:
            limit = BASE_STANDS**2 * problem.base_loss(tensor.codes)
        best = alternate(problem, tensor.codes, self.alternate, base_limit=limit)
        notes = tensor.notes | {
            SQUARED_ERROR: best.squared_error,
            BASE_SQUARED_ERROR: best.base_squared_error,
            SQUARED_NORM: _squared_norm(tensor),
            ALTERNATE_ROUNDS: float(best.rounds),
            ALTERNATE_WEIGHTS: float(best.from_weights),
        }
        return tensor.with_(codes=best.codes, factors=best.factors, notes=notes)

    def _problem(self, tensor: Tensor, rank: int) -> Problem:
        metrics = self.metrics_of(tensor.info)

        def requantize(matrix: Matrix) -> Codes:
            if self.quantizer is None:
                raise UsageError("low-rank: alternate has no quantizer")
            again = self.quantizer.apply(tensor.with_(source=matrix, codes=None, factors=None))
            if again.codes is None:
                raise ValueError("the quantizer wrote no codes")
            return again.codes

        def factorise(matrix: Matrix) -> Factors:
            return self.factorise(matrix, tensor.info, rank, metrics)

        weigh = None if metrics is None else partial(_loss, metrics)
        return Problem(working_dtype(tensor.source), _exact(tensor), requantize, factorise, weigh)

    def _better(self, tensor: Tensor) -> Tensor:
        """Of both metrics the one that leaves the smaller error of held-out outputs."""
        held_out = self._statistics(tensor.info).held_out()
        source = tensor.source.astype(np.float32)
        found = []
        for metric in ("diag", "full"):
            made = dataclasses.replace(self, metric=metric).apply(tensor)
            found.append((output_error(made.decode() - source, held_out), metric, made))
        _, metric, best = min(found, key=lambda one: one[0])
        return best.with_(notes=best.notes | {FULL_METRIC: float(metric == "full")})

    def metrics_of(self, info: TensorInfo) -> list[Metric] | None:
        """The metric of each block of rows; None for the plain one."""
        if self.metric == "plain":
            return None
        statistics = self._statistics(info)
        try:
            if self.metric == "diag":
                return [Metric.diagonal(d, self.damping) for d in statistics.diagonal()]
            return [Metric.full(m, self.damping) for m in statistics.second_moment()]
        except ValueError as error:
            raise UsageError(
                f"tensor {show(info.name)}: {show(str(error), 200)}",
                hint="use a larger damping=, more calibration data, or metric=diag",
            ) from error

    def _statistics(self, info: TensorInfo) -> TensorStatistics:
        if self.statistics is None:
            raise UsageError(
                f"low-rank: tensor {show(info.name)}: metric={self.metric} has no statistics",
                hint="give --text F to calibrate on the way, or --stats F",
            )
        return self.statistics

    def _repair_pruned(self, tensor: Tensor, rank: int) -> Tensor:
        """Factors of the pruned weights, where there are no codes."""
        source = working_dtype(tensor.source)
        bad = kernels.finite_index(source)
        if bad >= 0:
            row, column = divmod(bad, source.shape[1])
            raise InputError(
                f"tensor {show(tensor.info.name)}: weight [{row}, {column}] is "
                f"{tensor.source[row, column]}",
                hint="repair the checkpoint, or leave the tensor out with ignore",
            )
        base = tensor.with_(factors=None).decode()
        base_error, norm = _error(source, base)
        np.subtract(source, base, out=base)  # 0 where protected: the base decodes it exactly
        factors = self.factorise(base, tensor.info, rank, self.metrics_of(tensor.info))
        del base
        decoded = tensor.with_(factors=factors).decode()
        notes = tensor.notes | {
            SQUARED_ERROR: _error(source, decoded)[0],
            BASE_SQUARED_ERROR: base_error,
            SQUARED_NORM: norm,
        }
        return tensor.with_(factors=factors, notes=notes)

    def factorise(
        self,
        matrix: Matrix,
        info: TensorInfo,
        rank: int,
        metrics: list[Metric] | None = None,
    ) -> Factors:
        """The leading part of a matrix [rows, columns] as factors of the stored type.

        `metrics`, one for each block of rows, say what leads. Fused experts are decomposed one by
        one. Raises InputError where fp16 overflows.
        """
        experts, out_features, in_features = stack_of(info)
        if info.role is not Role.EXPERTS:
            if metrics is not None and len(metrics) > 1:
                metrics = [shared(metrics)]
            metric = None if metrics is None else metrics[0]
            return self._stored(*self._leading(matrix, rank, info.name, metric), info)
        b = np.empty((experts, out_features, rank), np.float32)
        a = np.empty((experts, rank, in_features), np.float32)
        for e in range(experts):
            part = matrix[e * out_features : (e + 1) * out_features]
            name = f"{info.name}#{e}"
            metric = None if metrics is None else metrics[e]
            b[e], a[e] = self._leading(part, rank, name, metric)
        return self._stored(b, a, info)

    def _leading(
        self, matrix: Matrix, rank: int, name: str, metric: Metric | None
    ) -> tuple[Matrix, Matrix]:
        """(B, A) of the leading part of a matrix in a metric."""
        if metric is None:
            return truncated_svd(matrix, rank, seed=self.seed, name=name).balanced()
        b, a = truncated_svd(metric.whiten(matrix), rank, seed=self.seed, name=name).balanced()
        return balanced(b, metric.unwhiten(a))

    def _stored(self, b: Matrix, a: Matrix, info: TensorInfo) -> Factors:
        if self.factor_dtype == "int8":
            b_codes, b_scale = _round_to_int8(b, axis=-2)
            a_codes, a_scale = _round_to_int8(a, axis=-1)
            return Factors(b_codes, a_codes, b_scale, a_scale)
        with np.errstate(over="ignore"):
            factors = Factors(b.astype(np.float16), a.astype(np.float16))
        if not (np.isfinite(factors.b).all() and np.isfinite(factors.a).all()):
            raise InputError(
                f"tensor {show(info.name)}: its low-rank factors are too large for fp16",
                hint="use factor_dtype=int8, which carries its own scales, or ignore",
            )
        return factors

    def facts(self) -> dict[str, Any]:
        """Ranks under a budget; the limit on what `alternate` may do to the base."""
        constrained = self.alternate and self.base_must_stand and not self.needs_adapter
        return dict(self.found) | ({"base_error_at_most": BASE_STANDS} if constrained else {})


def _loss(metrics: list[Metric], error: Matrix) -> float:
    blocks = row_blocks(error.shape[0], len(metrics))
    return sum(metrics[block].loss(error[rows]) for block, rows in blocks)


def shared(metrics: list[Metric]) -> Metric:
    """One metric for factors that serve every group of a grouped convolution: their mean."""
    moments = [np.diag(m.root**2) if m.root.ndim == 1 else m.root @ m.root.T for m in metrics]
    return Metric.full(np.mean(moments, axis=0), damping=0.0)


def stack_of(info: TensorInfo) -> tuple[int, int, int]:
    """(experts, out_features, in_features); one expert for all that is not a stack."""
    rows, columns = info.matrix_shape
    if info.role is Role.EXPERTS and info.shape[:-2]:
        out_features = info.shape[-2]
        return rows // max(out_features, 1), out_features, columns
    return 1, rows, columns


def _exact(tensor: Tensor) -> Places | None:
    outliers = tensor.outliers
    if outliers is None or not outliers.rows.size:
        return None
    return outliers.rows, outliers.columns


def _round_to_int8(factor: Matrix, axis: int) -> tuple[Array, NDArray[np.float32]]:
    """Symmetric codes and one float32 scale for each rank: absmax / 127 along `axis`."""
    absmax = np.abs(factor).max(axis=axis, keepdims=True)
    scale = np.where(absmax > 0, absmax / np.float32(127), np.float32(1)).astype(np.float32)
    codes = np.clip(np.rint(factor / scale), -127, 127).astype(np.int8)
    return codes, np.ascontiguousarray(scale.squeeze(axis))


def _error(source: Array, decoded: Matrix) -> tuple[float, float]:
    """(squared error, squared norm) in float64."""
    sums = np.zeros(2, np.float64)
    kernels.error_sums(working_dtype(source), decoded, sums)
    return float(sums[0]), float(sums[1])


def _squared_norm(tensor: Tensor) -> float:
    known = tensor.notes.get(SQUARED_NORM)
    return known if known is not None else _error(tensor.source, tensor.decode())[1]
