"""Masks that weigh weights by the inputs they meet: Wanda's score and SparseGPT's saliency.

Wanda (arXiv:2306.11695): |w_k| sqrt(H_kk), compared within an output row. SparseGPT
(arXiv:2301.00774): blocks of columns from left to right; in each, the weights with the least
w^2 / U_ii^2 over all rows go (H^-1 = U^T U), where w has been corrected for everything pruned
before it. Both prune zeros first, keep protected entries, and keep exact counts: ties go to the
lower index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from compress.solvers import n_of_m
from compress.solvers.triangular import inverse_factor

Bool = NDArray[np.bool_]
Matrix = NDArray[np.float32]

COLUMN_BLOCK = 128


def kept_of(size: int, sparsity: float) -> int:
    """Weights to keep of `size`: size - sparsity * size, the pruned count rounded half up.

    The sparsity is taken as the decimal number that was written, so 0.3 of 10 is 3.
    """
    return size - math.floor(Fraction(repr(float(sparsity))) * size + Fraction(1, 2))


def row_quotas(first: int, rows: int, shape: tuple[int, int], sparsity: float) -> NDArray[np.int64]:
    """int64 [rows]: weights that rows first, first + 1, ... of a matrix keep, before zeros count.

    They add up to `kept_of` the whole matrix, and differ by one at most.
    """
    total, (all_rows, _) = kept_of(shape[0] * shape[1], sparsity), shape
    edges = np.arange(first, first + rows + 1, dtype=np.int64) * total // max(all_rows, 1)
    quotas: NDArray[np.int64] = np.diff(edges)
    return quotas


def kept_in_rows(live: Bool, quotas: NDArray[np.int64], protected: Bool | None) -> int:
    """Weights that `wanda_mask` keeps, without ranking."""
    kept = np.minimum(live.sum(axis=1), quotas)
    if protected is not None:
        kept = np.maximum(kept, (protected & live).sum(axis=1))
    return int(kept.sum())


def wanda_mask(
    values: Matrix, diagonal: Matrix, quotas: NDArray[np.int64], protected: Bool | None
) -> Bool:
    """bool [rows, columns]: in each row the `quotas[row]` largest |w| sqrt(H_kk).

    diagonal  mean squared inputs H_kk, float32 [rows, columns] (or [1, columns])
    """
    score = wanda_score(values, diagonal, protected)
    mask = np.empty(values.shape, np.bool_)
    for row, quota in enumerate(quotas):
        _largest(score[row], int(quota), mask[row])
    return _sound(mask, values, protected)


def wanda_score(values: Matrix, diagonal: Matrix, protected: Bool | None) -> Matrix:
    """float32 [rows, columns]: |w| sqrt(H_kk), infinite where protected, zero for zeros only."""
    scale = np.sqrt(diagonal.astype(np.float64))
    # An input that never came is worth less than any that did, but its weights still rank.
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    score: Matrix = (np.abs(values) * scale).astype(np.float32)
    score[values != 0] = np.maximum(score[values != 0], np.finfo(np.float32).smallest_subnormal)
    if protected is not None:
        score[protected] = np.inf
    return score


def column_blocks(columns: int, pattern: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    """Blocks of columns; no group of an N:M pattern is cut."""
    size = COLUMN_BLOCK
    if pattern is not None:
        size = max(1, size // pattern[1]) * pattern[1]
    for start in range(0, columns, size):
        yield start, min(start + size, columns)


def kept_in_blocks(
    live: Bool, sparsity: float, pattern: tuple[int, int] | None, protected: Bool | None
) -> int:
    """Weights that `obs_mask` keeps of one matrix, without ranking."""
    rows, columns = live.shape
    total = 0
    for start, stop in column_blocks(columns, pattern):
        here = live[:, start:stop]
        saved = None if protected is None else protected[:, start:stop] & here
        if pattern is not None:
            n, m = pattern
            kept = np.minimum(here.reshape(-1, m).sum(axis=1), n)
            if saved is not None:
                kept = np.maximum(kept, saved.reshape(-1, m).sum(axis=1))
            total += int(kept.sum())
            continue
        quota = kept_of(rows * stop, sparsity) - kept_of(rows * start, sparsity)
        total += max(min(int(here.sum()), quota), 0 if saved is None else int(saved.sum()))
    return total


def obs_mask(
    values: Matrix,
    hessian: Matrix,
    sparsity: float,
    *,
    pattern: tuple[int, int] | None = None,
    protected: Bool | None = None,
    damping: float = 0.01,
) -> Bool:
    """bool [rows, columns]: SparseGPT's choice, block by block, for inputs with Hessian H.

    `values` float32 [rows, columns] is not changed; `pattern` is (N, M) kept of M in a row, in
    place of `sparsity`. Raises ValueError for a Hessian that `inverse_factor` refuses.
    """
    upper = inverse_factor(hessian, damping=damping).upper
    rows, columns = values.shape
    weights = np.ascontiguousarray(values.T)  # by columns, which are worked on one by one
    mask = np.empty((rows, columns), np.bool_)
    for start, stop in column_blocks(columns, pattern):
        block = weights[start:stop]
        saliency = (block / np.diagonal(upper)[start:stop, None]).T ** 2
        live = values[:, start:stop] != 0
        saliency[~live] = 0
        saliency[live] = np.maximum(saliency[live], np.finfo(np.float32).smallest_subnormal)
        saved = None if protected is None else protected[:, start:stop] & live
        if saved is not None:
            saliency[saved] = np.inf
        here = np.empty(saliency.shape, np.bool_)
        if pattern is not None:
            here = n_of_m.mask(np.ascontiguousarray(saliency), *pattern, saved)
        else:
            quota = kept_of(rows * stop, sparsity) - kept_of(rows * start, sparsity)
            flat = np.ascontiguousarray(saliency).reshape(-1)
            _largest(flat, quota, here.reshape(-1))
        mask[:, start:stop] = _sound(here, values[:, start:stop], saved)
        _absorb(weights, upper, start, stop, ~mask[:, start:stop].T)
    return mask


def _absorb(weights: Matrix, upper: Matrix, start: int, stop: int, pruned: Bool) -> None:
    """Let the columns behind each pruned weight of a block take over what it did."""
    block = weights[start:stop]
    errors = np.zeros(block.shape, np.float32)
    for i in range(stop - start):
        row = upper[start + i]
        np.divide(block[i], row[start + i], out=errors[i], where=pruned[i])
        block[i + 1 :] -= row[start + i + 1 : stop, None] * errors[i]
    if stop < weights.shape[0]:
        weights[stop:] -= upper[start:stop, stop:].T @ errors


def _largest(score: NDArray[np.float32], count: int, mask: Bool) -> None:
    """Set `mask` [n] where `score` [n] is among the `count` largest; ties from the left."""
    if count <= 0 or count >= score.size:
        mask[:] = count > 0
        return
    cut = np.partition(score, score.size - count)[score.size - count]
    np.greater(score, cut, out=mask)
    ties = np.flatnonzero(score == cut)
    mask[ties[: count - int(np.count_nonzero(mask))]] = True


def _sound(mask: Bool, values: Matrix, protected: Bool | None) -> Bool:
    """Protected entries stay, zeros do not."""
    if protected is not None:
        mask |= protected
    mask &= values != 0
    return mask
