"""The definition of every kernel, in numpy: what C++ and CUDA must reproduce byte for byte.

Functions trust their arguments; `compress.kernels` checks shapes and dtypes before it calls them.
Here are the small kernels; `reference_sums`, `reference_quantize`, `reference_obs` and
`reference_products` hold the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.kernels.reference_sums import F32, TILE, U8, Array, Bool

# ---------------------------------------------------------------- magnitudes


def magnitude_key(w: Array) -> NDArray[np.uint32]:
    """The bit pattern without its sign: 15 bits for 16-bit floats, 31 bits for float32."""
    if w.dtype.itemsize == 2:
        narrow: NDArray[np.uint16] = w.view(np.uint16) & np.uint16(0x7FFF)
        return narrow.astype(np.uint32)
    wide: NDArray[np.uint32] = w.view(np.uint32) & np.uint32(0x7FFFFFFF)
    return wide


def finite_index(w: Array) -> int:
    """The flat index of the first NaN or infinity, or -1."""
    flat = w.reshape(-1)
    bits = flat.view(np.uint16 if w.dtype.itemsize == 2 else np.uint32)
    exponent = bits.dtype.type(
        {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}[w.dtype.name]
    )
    for start in range(0, flat.size, TILE):
        bad = (bits[start : start + TILE] & exponent) == exponent
        if bad.any():
            return start + int(bad.argmax())
    return -1


def magnitude_histogram(w: Array, counts: NDArray[np.uint64]) -> None:
    """counts uint64 [32768] += histogram of the top 15 bits of the magnitude keys."""
    flat = w.reshape(-1)
    shift = 0 if w.dtype.itemsize == 2 else 16
    for start in range(0, flat.size, TILE):
        key = magnitude_key(flat[start : start + TILE]) >> shift
        counts += np.bincount(key, minlength=counts.size).astype(np.uint64)


def magnitude_histogram_low(w: F32, prefix: int, counts: NDArray[np.uint64]) -> None:
    """counts uint64 [65536] += low 16 key bits of the float32 weights whose top 15 equal prefix."""
    flat = w.reshape(-1)
    for start in range(0, flat.size, TILE):
        key = magnitude_key(flat[start : start + TILE])
        low = key[key >> 16 == prefix] & 0xFFFF
        counts += np.bincount(low, minlength=counts.size).astype(np.uint64)


def threshold_mask(w: Array, key: int, ties: int, mask: Bool) -> int:
    """mask = key(w) > key, or one of the first `ties` entries with key(w) == key.

    w and mask of one shape, flat order. Returns the number of ties kept.
    """
    flat, flat_mask = w.reshape(-1), mask.reshape(-1)
    used = 0
    for start in range(0, flat.size, TILE):
        keys = magnitude_key(flat[start : start + TILE])
        out = flat_mask[start : start + TILE]
        np.greater(keys, key, out=out)
        if used < ties:
            equal = np.flatnonzero(keys == key)[: ties - used]
            out[equal] = True
            used += equal.size
    return used


# ---------------------------------------------------------------- codes


def pack_bits(codes: U8, bits: int, out: U8) -> None:
    """codes uint8 [rows, n] -> out uint8 [rows, >= ceil(n * bits / 8)], a little-endian bit stream.

    Element i holds bits i * bits to (i + 1) * bits of its row; the rest of a row is zero.
    """
    rows, n = codes.shape
    used = (n * bits + 7) // 8
    out[:, used:] = 0
    step = max(1, TILE // max(1, n))
    for row in range(0, rows, step):
        part = codes[row : row + step]
        fields = np.unpackbits(part, axis=1, bitorder="little").reshape(len(part), n, 8)
        stream = np.ascontiguousarray(fields[:, :, :bits]).reshape(len(part), n * bits)
        out[row : row + step, :used] = np.packbits(stream, axis=1, bitorder="little")


def unpack_bits(packed: U8, bits: int, out: U8) -> None:
    """packed uint8 [rows, >= ceil(n * bits / 8)] -> out uint8 [rows, n]: the inverse of pack."""
    rows, n = out.shape
    step = max(1, TILE // max(1, n))
    for row in range(0, rows, step):
        part = packed[row : row + step]
        stream = np.unpackbits(part, axis=1, bitorder="little", count=n * bits)
        fields = np.zeros((len(part), n, 8), np.uint8)
        fields[:, :, :bits] = stream.reshape(len(part), n, bits)
        packed_fields = np.packbits(fields.reshape(len(part), n * 8), axis=1, bitorder="little")
        out[row : row + step] = packed_fields


def dequantize(
    codes: U8, scale: F32, zero_point: U8 | None, bits: int, group_size: int, out: F32
) -> None:
    """out float32 [rows, cols] = (codes - zero_point) * scale, one rounding a weight.

    scale float32 and zero_point uint8 [rows, groups]; None stands for 2^(bits-1).
    """
    columns = codes.shape[1]
    step = max(1, TILE // max(1, columns))
    group = np.arange(columns) // group_size
    for row in range(0, codes.shape[0], step):
        block = slice(row, row + step)
        zero: Any = np.float32(1 << (bits - 1))
        if zero_point is not None:
            zero = zero_point[block].astype(np.float32)[:, group]
        with np.errstate(all="ignore"):
            out[block] = (codes[block].astype(np.float32) - zero) * scale[block][:, group]


# ---------------------------------------------------------------- bitmasks


def bitmask_compress(values: Array, mask: Bool, bits_out: U8, kept_out: Array) -> int:
    """Kept values, row after row, and one bit a weight; returns how many were kept.

    values, mask [rows, n]; bits_out uint8 [rows, ceil(n / 8)], little bit order; kept_out has room.
    """
    bits_out[...] = np.packbits(mask, axis=1, bitorder="little")
    kept = values[mask]
    kept_out[: kept.size] = kept
    return int(kept.size)


def bitmask_expand(bits: U8, kept: Array, fill: Array, out: Array) -> None:
    """The inverse: out [rows, n] = next kept value where the bit is set, else `fill`."""
    mask = np.unpackbits(bits, axis=1, count=out.shape[1], bitorder="little").view(np.bool_)
    out[...] = fill
    out[mask] = kept


def count_bits(bits: U8, columns: int) -> int:
    """Set bits among the first `columns` of every row."""
    mask = np.unpackbits(bits, axis=1, count=columns, bitorder="little")
    return int(np.count_nonzero(mask))


# ---------------------------------------------------------------- low rank


def add_low_rank(matrix: F32, b: F32, a: F32) -> None:
    """matrix [rows, cols] += b [rows, r] @ a [r, cols]: r rank-1 updates, no FMA, k ascending."""
    rows, columns = matrix.shape
    step = max(1, TILE // max(1, columns))
    with np.errstate(all="ignore"):
        for row in range(0, rows, step):
            block = slice(row, row + step)
            for k in range(b.shape[1]):
                matrix[block] += b[block, k, None] * a[k]
