"""Products with packed matrices in numpy: the definition of what the compiled ones compute.

Activations of a block are rounded to integers, the sum of codes times activations of a block is an
exact integer, and the blocks' scaled sums are added in float32, in order of columns. So products
with codes have the same bits on every machine. Sums of floats (dense and sparse segments, A x) may
be grouped differently; they agree to float32 accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

TILE_ROWS = 16
CODES, DENSE, BITMASK = 0, 1, 2
DTYPES = (
    np.dtype(np.float32),
    np.dtype(np.float16),
    np.dtype(ml_dtypes.bfloat16),
    np.dtype(np.int8),
)
TOP = {"exact": 32512, "fast": 127}  # the largest integer an activation becomes
SMALLEST = np.float32(2.0**-100)  # blocks of smaller activations count as zero
MASSIVE = np.float32(4)  # times the next largest of the block
MOST_MASSIVE = 4  # of a block


class View(NamedTuple):
    """The words of a packed matrix and its bytes."""

    words: NDArray[np.int64]
    data: U8

    def array(self, word: int, dtype: Any, shape: tuple[int, ...]) -> Array:
        """The array whose offset stands in a word."""
        dtype = np.dtype(dtype)
        start = int(self.words[word])
        size = int(np.prod(shape)) * dtype.itemsize
        found: Array = self.data[start : start + size].view(dtype).reshape(shape)
        return found


def view(packed: U8) -> View:
    """The words in front and the bytes of a packed matrix."""
    count = 16 + 12 * int(packed[32:40].view(np.int64)[0])
    return View(packed[: 8 * count].view(np.int64), packed)


def pack_tiles(codes: U8, bits: int, group_size: int, out: U8) -> None:
    """codes [rows, columns] -> out uint8 [tiles, bytes]: blocks of steps of 64 bytes.

    Byte 4 * row + j of a step holds, from its low bits up, the codes of columns j, 4 + j, ...
    """
    from compress.kernels.packing import blocks

    rows, columns = codes.shape
    tiles, fields = out.shape[0], 8 // bits
    padded_rows = np.zeros((tiles * TILE_ROWS, columns), np.uint8)
    padded_rows[:rows] = codes
    at = 0
    for column, length, padded, _ in blocks(columns, group_size):
        block = np.zeros((tiles, TILE_ROWS, padded), np.uint8)
        block[:, :, :length] = padded_rows[:, column : column + length].reshape(
            tiles, TILE_ROWS, length
        )
        steps = block.reshape(tiles, TILE_ROWS, padded // (4 * fields), fields, 4)
        step = np.zeros((tiles, padded // (4 * fields), TILE_ROWS, 4), np.uint8)
        for field in range(fields):
            step |= steps[:, :, :, field].transpose(0, 2, 1, 3) << np.uint8(field * bits)
        size = padded * TILE_ROWS // fields
        out[:, at : at + size] = step.reshape(tiles, size)
        at += size


def unpack_tiles(packed: U8, rows: int, columns: int, bits: int, group_size: int) -> U8:
    """The inverse: uint8 [rows, columns]."""
    from compress.kernels.packing import blocks

    tiles, fields = packed.shape[0], 8 // bits
    out = np.empty((tiles * TILE_ROWS, columns), np.uint8)
    at = 0
    for column, length, padded, _ in blocks(columns, group_size):
        size = padded * TILE_ROWS // fields
        step = packed[:, at : at + size].reshape(tiles, size // 64, TILE_ROWS, 1, 4)
        shifts = (np.arange(fields, dtype=np.uint8) * np.uint8(bits)).reshape(fields, 1)
        codes = (step >> shifts) & np.uint8((1 << bits) - 1)
        block = codes.transpose(0, 2, 1, 3, 4).reshape(tiles * TILE_ROWS, padded)
        out[:, column : column + length] = block[:, :length]
        at += size
    return out[:rows]


def _rows_of(interleaved: Array, rows: int) -> Array:
    """[tiles, n, 16] -> [rows, n]."""
    tiles, n, _ = interleaved.shape
    matrix: Array = interleaved.transpose(0, 2, 1).reshape(tiles * TILE_ROWS, n)
    return matrix[:rows]


class Rounded(NamedTuple):
    """A block of activations: x = integers * scale + massive, the latter mostly zero."""

    integers: NDArray[np.int64]  # [batch, block]
    scale: F32  # [batch]
    massive: F32  # [batch, block]


def round_activations(x: F32, top: int) -> Rounded:
    """x float32 [batch, block], each row with a scale of its own.

    The largest entries of a row, up to four, are massive where the last of them is more than 4
    times as large as the next, which is not zero. Rows with a NaN or an infinity get a NaN scale.
    """
    magnitudes = np.abs(x)
    finite = np.isfinite(magnitudes).all(axis=1)
    order = np.argsort(-magnitudes, axis=1, kind="stable")[:, : MOST_MASSIVE + 1]
    falling = np.zeros((x.shape[0], MOST_MASSIVE + 1), np.float32)
    falling[:, : order.shape[1]] = np.take_along_axis(magnitudes, order, axis=1)
    gaps = (falling[:, 1:] > 0) & (falling[:, :-1] > MASSIVE * falling[:, 1:])
    count = np.where(gaps, np.arange(1, MOST_MASSIVE + 1), 0).max(axis=1)
    count[~finite | ~(falling[:, 0] >= SMALLEST)] = 0
    massive = np.zeros_like(x)
    for row in np.flatnonzero(count):
        places = order[row, : count[row]]
        massive[row, places] = x[row, places]
    rest = np.where(massive == 0, x, np.float32(0))
    largest = falling[np.arange(x.shape[0]), count]
    usable = finite & (largest >= SMALLEST)
    scale = np.where(usable, largest / np.float32(top), np.float32(0)).astype(np.float32)
    inverse = np.divide(np.float32(top), largest, out=np.zeros_like(largest), where=usable)
    integers = np.zeros(x.shape, np.int64)
    integers[usable] = np.rint(rest[usable] * inverse[usable, None]).astype(np.int64)
    scale[~finite] = np.nan
    return Rounded(integers, scale, massive)


def _dense_rows(v: View, at: int, rows: slice, columns: int) -> Array:
    values = v.array(at + 6, DTYPES[int(v.words[at + 3])], (int(v.words[2]), columns))
    return values[rows]


def _bitmask_rows(v: View, at: int, rows: slice, columns: int) -> Array:
    """The kept values of some rows in their places, zeros elsewhere."""
    bits = v.array(at + 9, np.uint8, (int(v.words[2]), -(-columns // 8)))[rows]
    starts = v.array(at + 10, np.uint64, (int(v.words[2]),))
    mask = np.unpackbits(bits, axis=1, count=columns, bitorder="little").view(bool)
    values = np.zeros(mask.shape, DTYPES[int(v.words[at + 3])])
    kept = v.array(at + 6, values.dtype, (int(v.words[at + 11]),))
    start = int(starts[rows][0])
    values[mask] = kept[start : start + int(mask.sum())]
    return values


def _multiply_values(v: View, at: int, kind: int, x: F32, total: F32) -> None:
    """total [batch, rows] += x [batch, columns of the segment] times a dense or bitmask segment."""
    rows, columns = int(v.words[2]), int(v.words[at + 2])
    group_size, scale = int(v.words[at + 4]), None
    if DTYPES[int(v.words[at + 3])] == np.int8:
        groups = -(-columns // group_size)
        scale = v.array(at + 7, DTYPES[int(v.words[at + 5])], (rows, groups)).astype(np.float32)
    for start in range(0, rows, TILE_ROWS):
        tile = slice(start, min(start + TILE_ROWS, rows))
        values = (_dense_rows if kind == DENSE else _bitmask_rows)(v, at, tile, columns)
        weights = values.astype(np.float32)
        if scale is not None:
            weights *= np.repeat(scale[tile], group_size, axis=1)[:, :columns]
        add_dense(x, weights, total[:, tile])


def add_dense(x: F32, weights: F32, total: F32) -> None:
    """total [batch, rows] += x [batch, columns] times weights [rows, columns], transposed.

    Row by row of the batch, so that none depends on the others.
    """
    for b in range(x.shape[0]):
        total[b] += weights @ x[b]


def dense_linear(x: Array, w: Array, y: Array) -> None:
    """y [batch, rows] = x [batch, columns] times w [rows, columns], transposed."""
    wide = x.astype(np.float32)
    total = np.zeros(y.shape, np.float32)
    with np.errstate(all="ignore"):
        for start in range(0, w.shape[0], TILE_ROWS):
            tile = slice(start, start + TILE_ROWS)
            add_dense(wide, w[tile].astype(np.float32), total[:, tile])
        y[...] = total.astype(y.dtype)


def _multiply_codes(v: View, at: int, x: F32, total: F32, precision: str) -> None:
    """total [batch, rows] += x [batch, columns of the segment] times one segment of codes."""
    from compress.kernels.packing import blocks, tiles_of

    rows, columns = int(v.words[2]), int(v.words[at + 2])
    bits, group_size = int(v.words[at + 3]), int(v.words[at + 4])
    tiles, groups = tiles_of(rows), -(-columns // group_size)
    width = sum(padded for _, _, padded, _ in blocks(columns, group_size))
    packed = v.array(at + 6, np.uint8, (tiles, width * TILE_ROWS * bits // 8))
    codes = unpack_tiles(packed, rows, columns, bits, group_size).astype(np.int64)
    shape = (tiles, groups, TILE_ROWS)
    scale = _rows_of(v.array(at + 7, DTYPES[int(v.words[at + 5])], shape), rows).astype(np.float32)
    zero = np.full((rows, groups), 1 << (bits - 1), np.int64)
    if v.words[at + 8]:
        zero = _rows_of(v.array(at + 8, np.uint8, shape), rows).astype(np.int64)
    massive: list[tuple[int, int, np.float32]] = []
    for column, length, _, group in blocks(columns, group_size):
        block = slice(column, column + length)
        rounded = round_activations(x[:, block], TOP[precision])
        sums = rounded.integers @ (codes[:, block] - zero[:, group, None]).T
        total += sums.astype(np.float32) * (scale[:, group][None] * rounded.scale[:, None])
        massive += [(b, column + k, rounded.massive[b, k]) for b, k in _places(rounded.massive)]
    for b, k, value in sorted(massive, key=lambda entry: entry[:2]):
        group = k // group_size
        total[b] += value * ((codes[:, k] - zero[:, group]).astype(np.float32) * scale[:, group])


def _places(array: Array) -> list[tuple[int, int]]:
    return [(int(b), int(k)) for b, k in np.argwhere(array)]


def segments(v: View) -> Iterator[tuple[int, int, slice]]:
    """(first word, kind, columns) of each segment."""
    for i in range(int(v.words[4])):
        at = 16 + 12 * i
        start = int(v.words[at + 1])
        yield at, int(v.words[at]), slice(start, start + int(v.words[at + 2]))


def linear(x: Array, packed: U8, y: Array, precision: str) -> None:
    """y [batch, rows] = x [batch, columns] times the packed matrix, transposed."""
    v = view(packed)
    rows, columns, rank = (int(v.words[i]) for i in (2, 3, 6))
    wide = x.astype(np.float32)
    total = np.zeros((x.shape[0], rows), np.float32)
    with np.errstate(all="ignore"):
        for at, kind, span in segments(v):
            if kind == CODES:
                _multiply_codes(v, at, wide[:, span], total, precision)
            else:
                _multiply_values(v, at, kind, wide[:, span], total)
        if rank:
            _add_low_rank(v, wide, total, rows, columns, rank)
        if v.words[11]:
            _add_outliers(v, wide, total)
        if v.words[5]:
            total += v.array(5, np.float32, (rows,))
        y[...] = total.astype(y.dtype)


def _add_low_rank(v: View, x: F32, total: F32, rows: int, columns: int, rank: int) -> None:
    dtype = DTYPES[int(v.words[7])]
    a = v.array(8, dtype, (rank, columns)).astype(np.float32)
    tiles = -(-rows // TILE_ROWS)
    b = _rows_of(v.array(9, dtype, (tiles, rank, TILE_ROWS)), rows).astype(np.float32)
    low = x @ a.T
    if v.words[10]:
        low *= v.array(10, np.float32, (rank,))
    for k in range(rank):
        total += low[:, k, None] * b[:, k]


def _add_outliers(v: View, x: F32, total: F32) -> None:
    entries = v.array(13, np.uint32, (int(v.words[11]), 3))
    for row, column, bits in entries:
        difference = np.uint32(bits).view(np.float32)
        total[:, row] += difference * x[:, column]
