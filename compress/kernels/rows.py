"""Single rows of a packed matrix as floats: what an embedding table is asked for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compress.kernels import reference_products
from compress.kernels.packing import CODES, TILE_ROWS, blocks, tiles_of
from compress.kernels.reference_products import DTYPES, View

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


def decode_rows(packed: U8, indices: NDArray[np.int64]) -> F32:
    """float32 [n, columns]: rows `indices` of a packed matrix whose columns are all codes.

    The values are those of `Codes.dequantize`, to the bit. Raises IndexError for a row outside the
    matrix, ValueError for a matrix with other terms than codes.
    """
    v = reference_products.view(packed)
    rows, columns = int(v.words[2]), int(v.words[3])
    if v.words[6] or v.words[11]:
        raise ValueError("packed has factors or outliers: only rows of codes can be read alone")
    if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= rows):
        raise IndexError(f"indices must be 0 to {rows - 1}")
    out = np.zeros((indices.size, columns), np.float32)
    for at, kind, span in reference_products.segments(v):
        if kind != CODES:
            raise ValueError("packed has a segment without codes")
        out[:, span] = _segment_rows(v, at, indices, rows)
    return out


def _segment_rows(v: View, at: int, indices: NDArray[np.int64], rows: int) -> F32:
    columns, bits, group_size = (int(v.words[at + i]) for i in (2, 3, 4))
    tiles, groups, fields = tiles_of(rows), -(-columns // group_size), 8 // bits
    tile, lane = indices // TILE_ROWS, indices % TILE_ROWS
    layout = list(blocks(columns, group_size))
    width = sum(padded for _, _, padded, _ in layout)
    steps = v.array(at + 6, np.uint8, (tiles, width // (4 * fields), TILE_ROWS, 1, 4))
    shifts = (np.arange(fields, dtype=np.uint8) * np.uint8(bits)).reshape(fields, 1)
    codes = (steps[tile, :, lane] >> shifts) & np.uint8((1 << bits) - 1)
    codes = codes.reshape(indices.size, width)
    if width != columns:  # blocks are padded
        starts = np.cumsum([0, *(padded for _, _, padded, _ in layout)])
        places = [
            np.arange(start, start + length)
            for start, (_, length, _, _) in zip(starts, layout, strict=False)
        ]
        codes = codes[:, np.concatenate(places)]
    per_group = (tiles, groups, TILE_ROWS)
    scale = v.array(at + 7, DTYPES[int(v.words[at + 5])], per_group)[tile, :, lane]
    centred = codes.astype(np.int16)
    if v.words[at + 8]:
        zero = v.array(at + 8, np.uint8, per_group)[tile, :, lane].astype(np.int16)
        centred -= np.repeat(zero, group_size, axis=1)[:, :columns]
    else:
        centred -= np.int16(1 << (bits - 1))
    wide = np.repeat(scale.astype(np.float32), group_size, axis=1)[:, :columns]
    decoded: F32 = centred.astype(np.float32) * wide
    return decoded
