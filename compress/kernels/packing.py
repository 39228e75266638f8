"""A packed matrix: one buffer with every term of a Linear's weight, laid out for the products.

    buffer = pack_linear(rows, columns, [codes_segment(codes)], factors=..., outliers=..., bias=...)
    y = linear(x, buffer)                       (compress.kernels.products)

The buffer is made when a checkpoint is loaded and lives in memory only: its layout is no file
format and may change with any build. The matrix is cut into tiles of 16 rows, a tile's data lies
together, and rows and blocks that are short are padded. All words are little-endian int64:

    word 0    the magic number               word 8    offset of A     [rank, columns]
    word 1    bytes of the buffer            word 9    offset of B     [tiles, rank, 16]
    word 2    rows (out_features)            word 10   offset of the factors' scales, or 0
    word 3    columns (in_features)          word 11   number of outliers
    word 4    number of segments             word 12   offset of uint64 [tiles + 1]
    word 5    offset of the bias, or 0       word 13   offset of (row, column, difference)
    word 6    rank of the factors            word 14, 15   0
    word 7    dtype of the factors

then 12 words a segment: kind, first column, columns, bits or dtype, group_size, dtype of the
scales, and the offsets of data, scales, zero points (or 0), bitmask, row starts; last the number of
kept values. csrc/cpu/product.h says what the arrays hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.kernels import dispatch, reference_products

if TYPE_CHECKING:
    from compress.tensor import Codes, Factors

Array = NDArray[Any]
U8 = NDArray[np.uint8]

MAGIC = 0x3154434450524D43
TILE_ROWS = 16
BLOCK = 128  # columns that share a scale of activations, at most
PAD = 16
HEADER_WORDS, SEGMENT_WORDS, MAX_SEGMENTS = 16, 12, 16
ALIGNMENT = 64
KINDS = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}
CODES, DENSE, BITMASK = 0, 1, 2
WIDTHS = (2, 4, 8)


@dataclass(frozen=True)
class Segment:
    """A range of columns in one representation, as `pack_linear` takes it.

    `words` are the segment's words 3 to 5; `arrays` its data by word (6 to 10).
    """

    kind: int
    first_column: int
    columns: int
    words: tuple[int, int, int]
    arrays: dict[int, Array]
    kept: int = 0
    rows: int = 0


def tiles_of(rows: int) -> int:
    """Tiles of 16 rows, the last of which may be short."""
    return -(-rows // TILE_ROWS)


def blocks(columns: int, group_size: int) -> Iterator[tuple[int, int, int, int]]:
    """(first column, length, padded length, group) of each block, in order.

    A block lies inside a group and has at most 128 columns.
    """
    for group, start in enumerate(range(0, columns, group_size)):
        end = min(start + group_size, columns)
        for column in range(start, end, BLOCK):
            length = min(BLOCK, end - column)
            yield column, length, -(-length // PAD) * PAD, group


def interleave(values: Array) -> Array:
    """[rows, n] -> [tiles, n, 16]: what belongs to the rows of a tile side by side."""
    rows, n = values.shape
    tiles = tiles_of(rows)
    padded = np.zeros((tiles * TILE_ROWS, n), values.dtype)
    padded[:rows] = values
    return np.ascontiguousarray(padded.reshape(tiles, TILE_ROWS, n).transpose(0, 2, 1))


def codes_segment(codes: Codes, first_column: int = 0) -> Segment:
    """Columns from `first_column` on as codes; widths other than 2, 4 and 8 bits are widened.

    codes.values uint8 [rows, columns]. Raises ValueError where its arrays do not fit together.
    """
    rows, columns = codes.values.shape
    groups = -(-columns // codes.group_size)
    if codes.scale.dtype.name not in KINDS or codes.scale.ndim != 2:
        raise ValueError(f"scale must be a float matrix, not {codes.scale.dtype.name}")
    try:
        scale = np.broadcast_to(codes.scale, (rows, groups))
        zero = codes.zero_point
        zero = None if zero is None else np.broadcast_to(zero, (rows, groups))
    except ValueError:
        raise ValueError(
            f"scale and zero_point must be [{rows}, {groups}], not {codes.scale.shape}"
        ) from None
    bits = next((width for width in WIDTHS if width >= codes.bits), 0)
    if not bits:
        raise ValueError(f"bits must be 2 to 8, not {codes.bits}")
    if zero is None and bits != codes.bits:
        zero = np.full((rows, groups), 1 << (codes.bits - 1), np.uint8)
    arrays: dict[int, Array] = {
        6: _pack_tiles(codes.values, bits, codes.group_size),
        7: interleave(scale),
    }
    if zero is not None:
        arrays[8] = interleave(zero)
    words = (bits, codes.group_size, KINDS[scale.dtype.name])
    return Segment(CODES, first_column, columns, words, arrays, rows=rows)


def _pack_tiles(values: U8, bits: int, group_size: int) -> U8:
    rows, columns = values.shape
    width = sum(padded for _, _, padded, _ in blocks(columns, group_size))
    out = np.empty((tiles_of(rows), width * TILE_ROWS * bits // 8), np.uint8)
    native = dispatch.current().native
    if native is None:
        reference_products.pack_tiles(values, bits, group_size, out)
    else:
        flat = np.ascontiguousarray(values).reshape(-1)
        native.pack_tiles(flat, rows, columns, bits, group_size, out.reshape(-1))
    return out


class _Buffer:
    """Arrays one behind the other, each at a multiple of 64 bytes."""

    def __init__(self, words: int) -> None:
        self.end = 8 * words
        self.arrays: list[tuple[int, Array]] = []

    def add(self, array: Array, spare: int = 0) -> int:
        """The offset of an array; `spare` bytes behind it stay zero."""
        offset = -(-self.end // ALIGNMENT) * ALIGNMENT
        self.arrays.append((offset, array))
        self.end = offset + array.nbytes + spare
        return offset

    def finish(self, words: NDArray[np.int64]) -> U8:
        """The whole buffer, its address a multiple of 64."""
        size = -(-self.end // ALIGNMENT) * ALIGNMENT
        words[1] = size
        room = np.empty(size + ALIGNMENT, np.uint8)  # numpy asks for huge pages here, not for zeros
        skip = -room.ctypes.data % ALIGNMENT
        out: U8 = room[skip : skip + size]
        end = words.nbytes
        out[:end] = words.view(np.uint8)
        for offset, array in self.arrays:
            out[end:offset] = 0
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            end = offset + flat.size
            out[offset:end] = flat
        out[end:] = 0
        return out


def pack_linear(
    rows: int,
    columns: int,
    segments: Sequence[Segment],
    *,
    factors: Factors | None = None,
    outliers: tuple[Array, Array, Array] | None = None,
    bias: Array | None = None,
) -> U8:
    """uint8 [bytes]: the packed matrix [rows, columns] with all its terms.

    segments   together the columns, each at most once (columns without one are zero)
    factors    b [rows, rank], a [rank, columns]; added to the segments
    outliers   (rows, columns, differences): what is to be added to single entries
    bias       [rows]

    Raises ValueError where something does not fit the shape.
    """
    if rows < 0 or columns < 0:
        raise ValueError(f"rows and columns must not be negative, not {rows} and {columns}")
    if len(segments) > MAX_SEGMENTS:
        raise ValueError(f"at most {MAX_SEGMENTS} segments, not {len(segments)}")
    words = np.zeros(HEADER_WORDS + SEGMENT_WORDS * len(segments), np.int64)
    buffer = _Buffer(words.size)
    words[[0, 2, 3, 4]] = MAGIC, rows, columns, len(segments)
    taken = np.zeros(columns, np.bool_)
    for i, segment in enumerate(segments):
        first, end = segment.first_column, segment.first_column + segment.columns
        if segment.rows != rows or first < 0 or end > columns:
            raise ValueError(f"segment {i} does not fit a matrix of {rows} x {columns}")
        if taken[first:end].any():
            raise ValueError(f"segment {i} has columns that another one has, too")
        taken[first:end] = True
        own = words[HEADER_WORDS + SEGMENT_WORDS * i :][:SEGMENT_WORDS]
        own[:6] = segment.kind, segment.first_column, segment.columns, *segment.words
        for word, array in segment.arrays.items():
            sparse = segment.kind == BITMASK and word == 6  # a row may read all its columns
            spare = segment.columns * array.itemsize if sparse else 0
            own[word] = buffer.add(array, spare)
        own[11] = segment.kept
    if bias is not None:
        if bias.shape != (rows,):
            raise ValueError(f"bias must have shape ({rows},), not {bias.shape}")
        words[5] = buffer.add(bias.astype(np.float32))
    if factors is not None and factors.rank:
        _add_factors(words, buffer, factors, rows, columns)
    if outliers is not None and outliers[0].size:
        _add_outliers(words, buffer, outliers, rows, columns)
    return buffer.finish(words)


def _add_factors(
    words: NDArray[np.int64], buffer: _Buffer, factors: Factors, rows: int, columns: int
) -> None:
    a, b, rank = factors.a, factors.b, factors.rank
    if a.shape != (rank, columns) or b.shape != (rows, rank):
        raise ValueError(
            f"factors must be b [{rows}, rank] and a [rank, {columns}], not {b.shape} and {a.shape}"
        )
    if a.dtype != b.dtype or a.dtype.name not in KINDS:
        a, b = factors.a.astype(np.float32), factors.b.astype(np.float32)
    words[6:8] = rank, KINDS[a.dtype.name]
    words[8], words[9] = buffer.add(a), buffer.add(interleave(b))
    if factors.a_scale is not None or factors.b_scale is not None:
        scale = np.ones(rank, np.float32)
        for part in (factors.a_scale, factors.b_scale):
            scale = scale if part is None else scale * part.astype(np.float32)
        words[10] = buffer.add(scale)


def _add_outliers(
    words: NDArray[np.int64],
    buffer: _Buffer,
    outliers: tuple[Array, Array, Array],
    rows: int,
    columns: int,
) -> None:
    row, column, difference = outliers
    if not row.shape == column.shape == difference.shape or row.ndim != 1:
        raise ValueError("outliers must be three vectors of one length")
    if row.min() < 0 or row.max() >= rows or column.min() < 0 or column.max() >= columns:
        raise ValueError(f"an outlier lies outside a matrix of {rows} x {columns}")
    order = np.lexsort((column, row))
    entries = np.empty((row.size, 3), np.uint32)
    entries[:, 0], entries[:, 1] = row[order], column[order]
    entries[:, 2] = difference[order].astype(np.float32).view(np.uint32)
    ends = np.arange(tiles_of(rows) + 1) * TILE_ROWS
    starts = np.searchsorted(row[order], ends).astype(np.uint64)
    words[11], words[12], words[13] = row.size, buffer.add(starts), buffer.add(entries)
