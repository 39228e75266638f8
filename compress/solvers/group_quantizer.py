"""Codes for a matrix, one scale per group of columns: the kernels' quantizer with its outputs
allocated and its failures turned into facts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress import kernels
from compress.passes.base import CodesSpec
from compress.tensor import DTYPES, Array, Codes

# What the kernels read directly; anything else goes through float32.
_DIRECT = frozenset({"float32", "float16", "bfloat16"})


@dataclass(frozen=True)
class Sums:
    """Sums over a matrix, in float64: of the codes, of plain rounding with the same groups, and
    of the squared weights. Pruned weights count with their whole value.
    """

    squared_error: float
    plain_squared_error: float
    squared_norm: float


class CannotQuantize(Exception):
    """A weight that is NaN or infinite, or (`overflow`) a group, by its first weight, whose scale
    its stored type cannot hold.
    """

    def __init__(self, row: int, column: int, overflow: bool) -> None:
        what = "the scale overflows" if overflow else "the weight is not finite"
        super().__init__(f"[{row}, {column}]: {what}")
        self.row = row
        self.column = column
        self.overflow = overflow


def working_dtype(values: Array) -> Array:
    """The matrix as float32, float16 or bfloat16, contiguous; others are cast to float32."""
    if values.dtype.name not in _DIRECT:
        with np.errstate(over="ignore"):  # an overflow becomes infinite and is reported as such
            values = values.astype(np.float32)
    return np.ascontiguousarray(values)


def quantize_matrix(
    values: Array,
    mask: NDArray[np.bool_] | None,
    spec: CodesSpec,
    *,
    search: str = "mse",
    signed_scale: bool = True,
    column_weights: NDArray[np.floating] | None = None,
) -> tuple[Codes, Sums]:
    """Quantize a matrix [rows, columns] under an optional keep-mask of the same shape.

    column_weights [columns], finite and not negative, weigh the squared errors by which the
    search chooses scales; only their ratios matter. One scale for the tensor repeats them for
    each row. The returned sums are unweighted.

    Raises CannotQuantize at the first weight that is not finite in the kernels' type, or group
    whose scale overflows.
    """
    values = working_dtype(values)
    rows, columns = values.shape
    group_size = spec.group_size
    if spec.per_tensor:  # one row whose only group is everything
        values = values.reshape(1, -1)
        group_size = values.shape[1]
    weights = None
    if column_weights is not None and search != "none":
        weights = _relative(column_weights)
        if spec.per_tensor:
            weights = np.tile(weights, rows)
    if mask is not None:
        mask = np.ascontiguousarray(mask).reshape(values.shape)
    groups = -(-values.shape[1] // group_size)
    codes = np.empty(values.shape, np.uint8)
    scale = np.empty((values.shape[0], groups), DTYPES[spec.scale_dtype])
    zero_point = None if spec.symmetric else np.empty(scale.shape, np.uint8)
    sums = np.zeros((values.shape[0], 3), np.float64)
    bad = kernels.quantize_groups(
        values,
        mask,
        bits=spec.bits,
        group_size=group_size,
        symmetric=spec.symmetric,
        scale_dtype=spec.scale_dtype,
        search=search,
        signed_scale=signed_scale,
        codes=codes,
        scale=scale,
        zero_point=zero_point,
        sums=sums,
        column_weights=weights,
    )
    if bad != -1:
        overflow = bad < -1
        row, column = divmod(int(-2 - bad if overflow else bad), columns)
        raise CannotQuantize(row, column, overflow)
    coded = Codes(codes.reshape(rows, columns), scale, zero_point, spec.bits, spec.group_size)
    error, plain, norm = (float(s) for s in sums.sum(axis=0))
    return coded, Sums(error, plain, norm)


def _relative(weights: NDArray[np.floating]) -> NDArray[np.float32]:
    """Weights as shares of the largest: no weighted error then overflows sooner than a plain one,
    and equal weights choose exactly what no weights choose.
    """
    largest = float(weights.max(initial=0))
    divisor = largest if 0 < largest < np.inf else 1.0
    return (weights / divisor).astype(np.float32)
