"""Sums of the kernels, in the one order that all of them share; see `compress.kernels.reference`.

A choice between two candidate scales is the same on every machine: 16 float32 lanes, no fused
multiply-add, a fixed tree, float64 above 4096 entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]

LANES = 16  # float32 partial sums, index modulo 16
CHUNK = 4096  # entries summed in float32; chunks are added up in float64
TILE = 1 << 17  # weights worked on at a time: keeps numpy's temporaries in the cache


def lane_sum(values: F32) -> F64:
    """Sum over the last axis in the one order that all kernels share.

    values float32 [..., n], n a multiple of 16 and, above 4096, of 4096 (`padded` does it)
    returns float64 [...]
    """
    n = values.shape[-1]
    if n == 0:
        return np.zeros(values.shape[:-1], np.float64)
    chunk = min(n, CHUNK)
    blocks = values.reshape(*values.shape[:-1], n // chunk, chunk // LANES, LANES)
    lanes = blocks[..., 0, :] + np.float32(0)  # lanes begin at +0: no sum is a negative zero
    for block in range(1, chunk // LANES):
        lanes += blocks[..., block, :]
    width = LANES // 2
    while width:
        lanes = lanes[..., :width] + lanes[..., width:]
        width //= 2
    partial = lanes[..., 0].astype(np.float64)
    return partial[..., 0] if n == chunk else np.cumsum(partial, axis=-1)[..., -1]


def padded(values: F32) -> F32:
    """Zeros appended to the last axis, to the length that `lane_sum` wants."""
    n = values.shape[-1]
    multiple = LANES if n <= CHUNK else CHUNK
    extra = -n % multiple
    if not extra:
        return values
    widths = [(0, 0)] * (values.ndim - 1) + [(0, extra)]
    return np.pad(values, widths)


def error_sums(w: Array, decoded: F32, sums: F64) -> None:
    """sums [2] += (sum of (w - decoded)^2, sum of w^2), over the flat order."""
    flat, other = w.reshape(-1), decoded.reshape(-1)
    for start in range(0, flat.size, TILE):
        values = padded(flat[start : start + TILE].astype(np.float32))
        error = values - padded(other[start : start + TILE])
        for k, term in enumerate((error * error, values * values)):
            total = lane_sum_chunks(term)
            sums[k] = np.cumsum(np.concatenate([sums[k : k + 1], total]))[-1]


def lane_sum_chunks(values: F32) -> F64:
    """`lane_sum` of each chunk of a vector: float64 [ceil(n / 4096)]."""
    if values.size <= CHUNK:
        return lane_sum(values[None])
    return lane_sum(values.reshape(-1, CHUNK))


def squared_norms(w: Array, out: F64) -> None:
    """out float64 [rows] = sum of squares of each row of w [rows, cols]."""
    rows, columns = w.shape
    if columns == 0:
        out[...] = 0
        return
    step = max(1, TILE // columns)
    for start in range(0, rows, step):
        values = padded(w[start : start + step].astype(np.float32))
        out[start : start + step] = lane_sum(values * values)
