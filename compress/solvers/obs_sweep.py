"""Rounding that corrects later columns for each error: GPTQ and SparseGPT in one sweep.

Columns are coded one by one; with H^-1 = U^T U, the error (w - q) / U_ii of column i, times the
rest of U's row i, is taken off the columns behind it. A pruned entry counts with its whole value,
which later kept columns absorb; a protected one keeps its value exactly. The error left is
tr(dW H dW^T) = the sum of the squared column errors, because dW = E U.

Sources: GPTQ (arXiv:2210.17323), SparseGPT (arXiv:2301.00774). Unlike theirs, the corrections of
all earlier blocks reach a block in one product just before it is coded, so that the rest of the
matrix is not read and written once a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress import kernels
from compress.kernels.obs import MAX_SWEEP, obs_block
from compress.passes.base import CodesSpec
from compress.solvers.group_quantizer import CannotQuantize, quantize_matrix, working_dtype
from compress.solvers.triangular import InverseFactor, Matrix, inverse_factor
from compress.tensor import DTYPES, Array, Codes

Bool = NDArray[np.bool_]

_LANES = 16  # rows that a kernel works on together
_SPAN = 512  # columns of one product: at 128 it runs a seventh slower


@dataclass(frozen=True)
class Swept:
    """Codes, and the error tr(dW H dW^T) that they leave, H damped and without dead columns."""

    codes: Codes
    squared_error: float


@dataclass(frozen=True)
class Plan:
    """How to sweep, but for the matrix; see `obs_sweep`."""

    spec: CodesSpec
    search: str
    signed_scale: bool
    static: bool
    block_size: int
    workers: int


def obs_sweep(
    values: Array,
    hessian: NDArray[np.floating],
    spec: CodesSpec,
    *,
    mask: Bool | None = None,
    protected: Bool | None = None,
    search: str = "mse",
    signed_scale: bool = True,
    damping: float = 0.01,
    act_order: bool = False,
    static: bool = False,
    weighted: bool = True,
    block_size: int = 128,
    workers: int = 1,
) -> Swept:
    """Codes of a matrix [rows, columns] for inputs with Hessian X^T X [columns, columns].

    mask (False = pruned) and protected (True = keeps its value, takes no part in scales, and has
    the code of zero) are bool [rows, columns]. A group's scale is chosen where the sweep reaches
    the group, from the weights as corrected until then; `static`, and always `act_order`
    (columns by falling diagonal), chooses all of them from `values`.

    `weighted` weighs a column's squared error, when a scale is searched, by 1 / U_ii^2: what it
    costs after the best correction by the columns that follow. Scales that are chosen before the
    sweep do not see how corrections will change the last columns, which weigh most: there the
    weight is sqrt(H_ii) / U_ii, the geometric mean with the cost of an error left alone.

    Rows are shared among `workers` threads. Raises ValueError for arguments that do not fit
    together or a Hessian that is not positive definite, and CannotQuantize as `quantize_matrix`
    does.
    """
    _check(values, hessian, mask, protected, block_size, workers)
    values = working_dtype(values)
    bad = kernels.finite_index(values)
    if bad >= 0:
        row, column = divmod(bad, values.shape[1])
        raise CannotQuantize(row, column, overflow=False)
    factor = inverse_factor(hessian, damping=damping, act_order=act_order)
    whole = spec.per_tensor or spec.group_size >= values.shape[1]
    static = static or act_order or whole
    plan = Plan(spec, search, signed_scale, static, block_size, workers)
    weights = _column_weights(hessian, factor, static) if weighted else None
    with ThreadPoolExecutor(workers) as pool:
        return _Sweep(plan, factor, weights, values, mask, protected, pool).run()


def _check(
    values: Array,
    hessian: NDArray[np.floating],
    mask: Bool | None,
    protected: Bool | None,
    block_size: int,
    workers: int,
) -> None:
    if values.ndim != 2:
        raise ValueError(f"values must have two axes, not {values.ndim}")
    columns = values.shape[1]
    if hessian.shape != (columns, columns):
        raise ValueError(f"hessian must be [{columns}, {columns}], not {list(hessian.shape)}")
    for name, array in (("mask", mask), ("protected", protected)):
        if array is not None and (array.shape != values.shape or array.dtype != np.bool_):
            raise ValueError(f"{name} must be bool {list(values.shape)}")
    if not 1 <= block_size <= MAX_SWEEP:
        raise ValueError(f"block_size must be 1 to {MAX_SWEEP}, not {block_size}")
    if workers < 1:
        raise ValueError(f"workers must be positive, not {workers}")


class _Sweep:
    """One matrix on its way; `w` holds errors up to the column reached, then weights."""

    def __init__(
        self,
        plan: Plan,
        factor: InverseFactor,
        weights: NDArray[np.float64] | None,
        values: Array,
        mask: Bool | None,
        protected: Bool | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.plan, self.upper, self.pool = plan, factor.upper, pool
        self.factor, self.weights = factor, weights
        rows, columns = values.shape
        if protected is not None:
            mask = ~protected if mask is None else mask & ~protected
        groups = plan.spec.groups(columns)
        zero = None if plan.spec.symmetric else np.zeros((rows, groups), np.uint8)
        scale = np.ones((rows, groups), np.float32)
        if plan.static:
            scale, zero = self._static(values, mask)
        self.scale, self.zero_point = scale, zero
        order = factor.order
        self.w: Matrix = np.take(values, order, axis=1).astype(np.float32, copy=False)
        self.mask = None if mask is None else np.take(mask, order, axis=1)
        self.exact: Matrix | None = None
        if protected is not None:
            self.exact = np.where(np.take(protected, order, axis=1), self.w, np.float32(np.nan))
        self.group = np.zeros(columns, np.int64)
        if not plan.spec.per_tensor:
            self.group = order // plan.spec.group_size
        self.codes = np.empty(values.shape, np.uint8)

    def _static(self, values: Array, mask: Bool | None) -> tuple[Matrix, NDArray[np.uint8] | None]:
        """Scales and zero points [rows, groups] of the weights as they were."""
        plan, weights = self.plan, self.weights
        if weights is not None:  # back to the order of `values`
            weights = np.empty_like(weights)
            weights[self.factor.order] = self.weights
        coded, _ = quantize_matrix(
            values,
            mask,
            plan.spec,
            search=plan.search,
            signed_scale=plan.signed_scale,
            column_weights=weights,
        )
        shape = (values.shape[0], coded.scale.shape[1])
        scale = np.ascontiguousarray(np.broadcast_to(coded.scale.astype(np.float32), shape))
        if coded.zero_point is None:
            return scale, None
        return scale, np.ascontiguousarray(np.broadcast_to(coded.zero_point, shape))

    def run(self) -> Swept:
        columns = self.w.shape[1]
        for span, stop in _spans(columns, self.plan):
            self._correct(0, span, stop)
            known = span  # errors before it are off the columns that follow
            for start, end in _pieces(span, stop, self.plan):
                if not self.plan.static and start % self.plan.spec.group_size == 0:
                    # The whole group, though it may be coded in pieces: its scale is chosen now.
                    group_end = min(start + self.plan.spec.group_size, stop)
                    self._correct(span, start, group_end)
                    self._choose_scales(start, group_end)
                    known = start
                else:
                    self._correct(known, start, end)
                self._code(start, end)
        return Swept(self._codes(), self._squared_error())

    def _correct(self, known: int, start: int, stop: int) -> None:
        """Take the errors of columns [known, start) off the columns [start, stop)."""
        import torch

        if known == start:
            return
        w, upper = torch.from_numpy(self.w), torch.from_numpy(self.upper)
        target = w[:, start:stop]
        known_errors, rows_of_upper = w[:, known:start], upper[known:start, start:stop]
        torch.addmm(target, known_errors, rows_of_upper, alpha=-1, out=target)

    def _choose_scales(self, start: int, stop: int) -> None:
        """The scales of the group [start, stop), from its weights as they are now."""
        spec, group = self.plan.spec, start // self.plan.spec.group_size

        def choose(part: slice) -> None:
            area = (part, slice(start, stop))
            try:
                coded, _ = quantize_matrix(
                    self.w[area],
                    None if self.mask is None else self.mask[area],
                    CodesSpec(spec.bits, stop - start, spec.symmetric, spec.scale_dtype),
                    search=self.plan.search,
                    signed_scale=self.plan.signed_scale,
                    column_weights=None if self.weights is None else self.weights[start:stop],
                )
            except CannotQuantize as error:
                at = (part.start + error.row, start + error.column)
                raise CannotQuantize(*at, error.overflow) from None
            self.scale[part, group] = coded.scale[:, 0].astype(np.float32)
            if self.zero_point is not None and coded.zero_point is not None:
                self.zero_point[part, group] = coded.zero_point[:, 0]

        self._each_part(choose)

    def _code(self, start: int, stop: int) -> None:
        upper = np.ascontiguousarray(self.upper[start:stop, start:stop])

        def code(part: slice) -> None:
            exact = None if self.exact is None else self.exact[part, start:stop]
            obs_block(
                self.w[part],
                start,
                upper,
                mask=None if self.mask is None else self.mask[part],
                exact=None if exact is None else np.ascontiguousarray(exact),
                scale=self.scale[part],
                zero_point=None if self.zero_point is None else self.zero_point[part],
                group=self.group[start:stop],
                bits=self.plan.spec.bits,
                codes=self.codes[part],
            )

        self._each_part(code)

    def _each_part(self, work: Callable[[slice], None]) -> None:
        """Run `work` on the rows, a share for each worker."""
        rows, workers = self.w.shape[0], self.plan.workers
        share = -(-rows // (workers * _LANES)) * _LANES
        parts = [slice(row, min(row + share, rows)) for row in range(0, rows, max(share, 1))]
        if len(parts) == 1:
            work(parts[0])
        else:
            list(self.pool.map(work, parts))

    def _codes(self) -> Codes:
        spec = self.plan.spec
        values = self.codes
        if (np.diff(self.factor.order) != 1).any():
            values = np.empty_like(values)
            values[:, self.factor.order] = self.codes
        scale: Array = self.scale.astype(DTYPES[spec.scale_dtype])
        zero_point = self.zero_point
        if spec.per_tensor:
            scale, zero_point = scale[:1], None if zero_point is None else zero_point[:1]
        return Codes(values, scale, zero_point, spec.bits, spec.group_size)

    def _squared_error(self) -> float:
        """Dead columns have no neighbours in U, so leaving them out is exact."""
        self.w[:, self.factor.dead[self.factor.order]] = 0
        norms = np.zeros(self.w.shape[0], np.float64)
        kernels.squared_norms(self.w, norms)
        return float(norms.sum())


def _column_weights(
    hessian: NDArray[np.floating], factor: InverseFactor, static: bool
) -> NDArray[np.float64]:
    """What a squared error in a column counts for, in the order of U; see `obs_sweep`."""
    upper = np.diagonal(factor.upper).astype(np.float64)
    weights: NDArray[np.float64] = upper**-2
    if static:
        diagonal = np.diagonal(hessian).astype(np.float64)[factor.order] + factor.damping
        weights = np.sqrt(diagonal) / upper
    weights[factor.dead[factor.order]] = factor.damping  # their damped diagonal
    return weights


def _spans(columns: int, plan: Plan) -> Iterator[tuple[int, int]]:
    """Columns that are corrected for everything before them in one product."""
    # A group's columns must all be corrected when its scale is chosen.
    unit = plan.block_size if plan.static else plan.spec.group_size
    size = unit * max(1, _SPAN // unit)
    for start in range(0, columns, size):
        yield start, min(start + size, columns)


def _pieces(span: int, stop: int, plan: Plan) -> Iterator[tuple[int, int]]:
    """The kernel's blocks of a span: no group begins inside one, unless scales are static."""
    size = plan.block_size if plan.static else min(plan.block_size, plan.spec.group_size)
    start = span
    while start < stop:
        end = min(start + size, stop)
        if not plan.static:
            end = min(end, (start // plan.spec.group_size + 1) * plan.spec.group_size)
        yield start, end
        start = end
