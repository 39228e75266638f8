"""Counts of the magnitudes in a tile: what a survey of global pruning needs to know."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from compress import kernels
from compress.errors import InputError, show
from compress.solvers import n_of_m, radix_select
from compress.solvers.radix_select import BFLOAT16, FLOAT16, FLOAT32, TileCounts
from compress.tensor import Array, Tensor

_KINDS: dict[np.dtype[Any], int] = {
    np.dtype(ml_dtypes.bfloat16): BFLOAT16,
    np.dtype(np.float16): FLOAT16,
    np.dtype(np.float32): FLOAT32,
}
# First bin of the infinities and NaNs.
_NOT_FINITE = {BFLOAT16: 0x7F80, FLOAT16: 0x7C00, FLOAT32: 0x7F80}


def scored(tensor: Tensor) -> Array:
    """[rows, columns] in bfloat16, float16 or float32: what magnitudes are compared as.

    8-bit floats widen exactly; float64 is rounded to float32 and its largest values clipped.
    """
    values = np.ascontiguousarray(tensor.source)
    if values.dtype in _KINDS:
        return values
    if values.dtype.itemsize == 1:
        return values.astype(np.float16)
    refuse_not_finite(tensor, np.flatnonzero(~np.isfinite(values))[:1])
    limit = np.finfo(np.float32).max
    clipped: Array = np.clip(values, -limit, limit).astype(np.float32)
    return clipped


def protected_places(tensor: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of protected entries that are not zero."""
    outliers = tensor.outliers
    if outliers is None or not outliers.rows.size:
        none = np.empty(0, np.int64)
        return none, none
    live = tensor.source[outliers.rows, outliers.columns].astype(np.float32) != 0
    return outliers.rows[live], outliers.columns[live]


def protected_mask(tensor: Tensor) -> NDArray[np.bool_] | None:
    """bool [rows, columns]: True at protected entries that are not zero; None without any."""
    rows, columns = protected_places(tensor)
    if not rows.size:
        return None
    mask = np.zeros(tensor.source.shape, np.bool_)
    mask[rows, columns] = True
    return mask


def count_magnitudes(tensor: Tensor) -> TileCounts:
    """The first sweep's counts of one tile."""
    values = scored(tensor)
    kind = _KINDS[values.dtype]
    counts = np.zeros(radix_select.BINS, np.uint64)
    kernels.magnitude_histogram(values, counts)
    if counts[_NOT_FINITE[kind] :].any():
        refuse_not_finite(tensor, np.array([kernels.finite_index(values)]))
    zeros = int(counts[0])
    if zeros and kind == FLOAT32:  # the bin also holds the smallest subnormals
        zeros = values.size - int(np.count_nonzero(values))
    counts[0] -= np.uint64(zeros)
    rows, columns = protected_places(tensor)
    shift = 16 if kind == FLOAT32 else 0
    np.subtract.at(counts, keys_of(values[rows, columns]) >> shift, np.uint64(1))
    return tile_counts(tensor, kind, zeros, rows.size, counts)


def count_low(tensor: Tensor, prefix: int) -> TileCounts:
    """The second sweep's counts of one tile: the low 16 bits of the keys in one bin."""
    values = scored(tensor)
    counts = np.zeros(radix_select.LOW_BINS, np.uint64)
    kernels.magnitude_histogram_low(values, prefix, counts)
    rows, columns = protected_places(tensor)
    keys = keys_of(values[rows, columns])
    np.subtract.at(counts, keys[keys >> 16 == prefix] & 0xFFFF, np.uint64(1))
    if prefix == 0:
        counts[0] = 0  # zeros are never kept
    return tile_counts(tensor, FLOAT32, 0, rows.size, counts)


def tile_counts(
    tensor: Tensor, kind: int, zeros: int, protected: int, counts: NDArray[np.uint64]
) -> TileCounts:
    """The record of one tile: filled bins of a histogram, zeros, protected entries apart."""
    rows = tensor.source.shape[0]
    size = tensor.source.size
    bins, filled = radix_select.sparse(counts)
    return TileCounts(
        tensor.info.name, tensor.first_row, rows, kind, size, zeros, protected, bins, filled
    )


def keys_of(values: Array) -> NDArray[np.int64]:
    """Magnitude keys of a few entries."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.dtype.itemsize == 2:
        return (flat.view(np.uint16) & 0x7FFF).astype(np.int64)
    return (flat.view(np.uint32) & 0x7FFFFFFF).astype(np.int64)


def refuse_not_finite(tensor: Tensor, bad: NDArray[np.int64]) -> None:
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


def count_pattern(tensor: Tensor, n: int, m: int) -> TileCounts:
    """How many weights of a tile an N:M mask keeps, as a histogram of one bin."""
    values = scored(tensor)
    bad = kernels.finite_index(values)
    if bad >= 0:
        refuse_not_finite(tensor, np.array([bad]))
    kept, zeros = n_of_m.count(values, n, m, protected_mask(tensor))
    counts = np.zeros(radix_select.BINS, np.uint64)
    counts[1] = kept
    return tile_counts(tensor, _KINDS[values.dtype], zeros, 0, counts)


def count_kept(tensor: Tensor, kept: int) -> TileCounts:
    """A tile of which a mask keeps `kept` weights, as a histogram of one bin."""
    values = scored(tensor)
    bad = kernels.finite_index(values)
    if bad >= 0:
        refuse_not_finite(tensor, np.array([bad]))
    counts = np.zeros(radix_select.BINS, np.uint64)
    counts[1] = kept
    zeros = values.size - int(np.count_nonzero(values))
    return tile_counts(tensor, _KINDS[values.dtype], zeros, 0, counts)
