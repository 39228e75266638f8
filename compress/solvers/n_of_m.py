"""N:M sparsity: the N largest of every M consecutive columns of a row are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Bool = NDArray[np.bool_]

_PAIRWISE = 8  # up to this M, comparing columns pairwise beats sorting
_GROUPS = 1 << 16  # worked on at a time


def mask(values: Array, n: int, m: int, protected: Bool | None) -> Bool:
    """bool [rows, columns]: the n largest magnitudes of every m columns, lower columns first.

    values bfloat16, float16 or float32 [rows, columns], columns a multiple of m. Protected
    entries come before all others, and all of them are kept. Zeros never are.
    """
    out = np.empty(values.shape, np.bool_)
    step = max(1, _GROUPS * m // max(1, values.shape[1]))
    for start in range(0, values.shape[0], step):
        rows = slice(start, start + step)
        keys = _keys(values[rows])
        live = keys != 0
        if protected is not None:
            keys[protected[rows]] = np.iinfo(keys.dtype).max
        kept = _largest(keys.reshape(-1, m), n).reshape(live.shape)
        if protected is not None:
            kept |= protected[rows]
        np.logical_and(kept, live, out=out[rows])
    return out


def count(values: Array, n: int, m: int, protected: Bool | None) -> tuple[int, int]:
    """(weights that `mask` keeps, zeros) without ranking; protected entries are not zero."""
    live = _keys(values) != 0
    nonzeros = int(np.count_nonzero(live))
    if nonzeros == live.size and protected is None:
        return live.size // m * n, 0
    kept = np.minimum(live.reshape(-1, m).sum(1), n)
    if protected is not None:
        kept = np.maximum(kept, protected.reshape(-1, m).sum(1))
    return int(kept.sum()), live.size - nonzeros


def _keys(values: Array) -> Array:
    """The bit patterns without their signs, which are ordered as the magnitudes are."""
    bits: Array
    if values.dtype.itemsize == 2:
        bits = values.view(np.uint16) & np.uint16(0x7FFF)
    else:
        bits = values.view(np.uint32) & np.uint32(0x7FFFFFFF)
    return bits


def _largest(keys: Array, n: int) -> Bool:
    """bool [groups, m]: the n largest of each row, lower columns first among equals."""
    m = keys.shape[1]
    if m > _PAIRWISE:
        order = np.argsort(-keys.astype(np.int64), axis=1, kind="stable")
        chosen = np.zeros(keys.shape, np.bool_)
        np.put_along_axis(chosen, order[:, :n], True, axis=1)
        return chosen
    columns = [np.ascontiguousarray(keys[:, i]) for i in range(m)]
    beaten_by = np.zeros((m, keys.shape[0]), np.uint8)
    for i in range(m):
        for j in range(i + 1, m):
            first_wins = columns[i] >= columns[j]
            beaten_by[j] += first_wins
            beaten_by[i] += ~first_wins
    return np.ascontiguousarray((beaten_by < n).T)
