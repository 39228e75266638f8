"""Segments of stored values: dense, or a bitmask with the values it keeps.

    dense_segment(values)                    float32, float16, bfloat16; int8 with scales
    bitmask_segment(bits, kept, columns)     the same, of what the bitmask keeps

Both take the arrays of the native format as they are (docs/format.md) and decode nothing: the
packed matrix holds the same bytes. Segments of codes are in `compress.kernels.packing`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.kernels.packing import BITMASK, DENSE, KINDS, Segment

Array = NDArray[Any]
U8 = NDArray[np.uint8]

_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


def dense_segment(
    values: Array, first_column: int = 0, *, scale: Array | None = None, group_size: int = 0
) -> Segment:
    """Columns from `first_column` on as they are stored, row after row.

    values      [rows, columns], float32, float16 or bfloat16; or int8; or uint8: 8-bit symmetric
                codes, which are int8 plus 128
    scale       [rows, groups] or what broadcasts to it, of a float dtype: of int8 and uint8 only
    group_size  columns that share a scale; 0: the whole row

    Raises TypeError for a wrong dtype, ValueError where shapes do not fit.
    """
    if values.ndim != 2:
        raise ValueError(f"values must be [rows, columns], not {list(values.shape)}")
    rows, columns = values.shape
    values = _signed(values)
    words, arrays = _scales(values, rows, columns, scale, group_size)
    return Segment(DENSE, first_column, columns, words, {6: values, **arrays}, rows=rows)


def bitmask_segment(
    bits: U8,
    kept: Array,
    columns: int,
    first_column: int = 0,
    *,
    scale: Array | None = None,
    group_size: int = 0,
) -> Segment:
    """Columns from `first_column` on as a bitmask and the values it keeps, row after row.

    bits    uint8 [rows, ceil(columns / 8)]: bit i of a row, from the lowest of its first byte on,
            says whether column i is kept; bits behind the last column are zero
    kept    [ones in bits], in order of rows and columns, of the dtypes of `dense_segment`;
            `scale` and `group_size` as there (a group counts pruned columns, too)

    Raises TypeError for a wrong dtype, ValueError where shapes or counts do not fit.
    """
    if bits.dtype != np.uint8:
        raise TypeError(f"bits must be uint8, not {bits.dtype}")
    if columns < 0:
        raise ValueError(f"columns must not be negative, not {columns}")
    if bits.ndim != 2 or bits.shape[1] != -(-columns // 8):
        raise ValueError(f"bits must be [rows, {-(-columns // 8)}], not {list(bits.shape)}")
    if columns % 8 and (bits[:, -1] >> np.uint8(columns % 8)).any():
        raise ValueError(f"bits has ones behind column {columns}")
    counts = _ONES[bits].sum(axis=1, dtype=np.uint64)
    if kept.shape != (int(counts.sum()),):
        raise ValueError(f"kept must have shape ({int(counts.sum())},), not {kept.shape}")
    rows = bits.shape[0]
    starts = np.cumsum(counts, dtype=np.uint64) - counts
    kept = _signed(kept)
    words, arrays = _scales(kept, rows, columns, scale, group_size)
    return Segment(
        BITMASK,
        first_column,
        columns,
        words,
        {6: kept, 9: bits, 10: starts, **arrays},
        kept=kept.size,
        rows=rows,
    )


def _signed(values: Array) -> Array:
    return (values ^ np.uint8(0x80)).view(np.int8) if values.dtype == np.uint8 else values


def _scales(
    values: Array, rows: int, columns: int, scale: Array | None, group_size: int
) -> tuple[tuple[int, int, int], dict[int, Array]]:
    """Words 3 to 5 of the segment, and the scales where its values have some."""
    if values.dtype.name not in KINDS:
        raise TypeError(
            f"values must be float32, float16, bfloat16, int8 or uint8, not {values.dtype}"
        )
    kind = KINDS[values.dtype.name]
    if values.dtype != np.int8:
        if scale is not None or group_size:
            raise ValueError(f"scale and group_size belong to int8 values, not {values.dtype}")
        return (kind, max(columns, 1), 0), {}
    if scale is None:
        raise ValueError("scale must be given with int8 values")
    if scale.dtype == np.int8 or scale.dtype.name not in KINDS:
        raise TypeError(f"scale must be float32, float16 or bfloat16, not {scale.dtype}")
    if group_size < 0:
        raise ValueError(f"group_size must not be negative, not {group_size}")
    group_size = group_size or max(columns, 1)
    shape = (rows, -(-columns // group_size))
    try:
        scales = np.broadcast_to(scale, shape)
    except ValueError:
        raise ValueError(f"scale must be {list(shape)}, not {list(scale.shape)}") from None
    return (kind, group_size, KINDS[scale.dtype.name]), {7: np.ascontiguousarray(scales)}
