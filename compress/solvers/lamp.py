"""LAMP, a global pruning score that accounts for scale (Lee et al., arXiv 2010.07611, eq. 4).

The score of a weight is its square over the sum of the squares of all weights of its tensor that
are at least as large. Its inverse, for the j-th of several equal magnitudes v, is

    (sum of squares above v) / v^2 + j,

so a tensor keeps `count(x)` weights with inverse scores up to x, and counts from a histogram give
that function exactly where bins hold one value (16-bit types). For float32 the middle of each of
the 32,768 bins stands for its weights: the split between tensors is then approximate (relative
error of a magnitude at most 2^-8), the total stays exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from compress.solvers.radix_select import Int, Spill, TensorCounts, values_of_bins

F64 = NDArray[np.float64]
_GRID = 1024  # candidate thresholds tried in one replay


def counts(spill: Spill, budget: int, floors: Mapping[str, int]) -> dict[str, int]:
    """Weights to keep of each tensor: the `budget` best scores, at least its floor of each.

    The sum is `budget` where the floors and the protected weights leave room; ties in score go
    to the earlier tensor.
    """
    low, high = 0.0, max((_largest(t) for t in spill.tensors()), default=0.0)
    if _total(spill, np.array([low]), floors)[0] >= budget:
        return {t.name: _kept(t, np.array([low]), floors)[0] for t in spill.tensors()}
    first = True
    while np.nextafter(low, np.inf) < high:
        if first:  # scores span many decades
            grid = np.geomspace(0.5, high, _GRID)
            first = False
        else:
            grid = np.linspace(low, high, _GRID)[1:-1]
            if not np.any((grid > low) & (grid < high)):
                grid = np.array([np.nextafter(low, np.inf)])
        grid = grid[(grid > low) & (grid < high)]
        totals = _total(spill, grid, floors)
        enough = int(np.searchsorted(totals, budget))
        low = float(grid[enough - 1]) if enough else low
        high = float(grid[enough]) if enough < grid.size else high
        if enough < grid.size and totals[enough] == budget:
            break
    return _share(spill, budget, low, high, floors)


def _share(
    spill: Spill, budget: int, low: float, high: float, floors: Mapping[str, int]
) -> dict[str, int]:
    """Everything up to `low`, and in order of tensors from what `high` adds, up to the budget."""
    bounds = np.array([low, high])
    left = budget - int(_total(spill, bounds, floors)[0])
    kept = {}
    for tensor in spill.tensors():
        least, most = _kept(tensor, bounds, floors)
        extra = min(left, most - least)
        left -= extra
        kept[tensor.name] = least + extra
    return kept


def _inverse_scores(tensor: TensorCounts) -> F64:
    """float64 [bins]: inverse score of a bin's first weight, minus one."""
    squares = values_of_bins(tensor.kind)[tensor.bins] ** 2
    above = np.concatenate([[0.0], np.cumsum(tensor.counts * squares)[:-1]])[: squares.size]
    return np.asarray(above / squares, np.float64)


def _largest(tensor: TensorCounts) -> float:
    """An inverse score that keeps the whole tensor."""
    if not tensor.bins.size:
        return 0.0
    return float(np.nextafter((_inverse_scores(tensor) + tensor.counts).max(), np.inf))


def _kept(tensor: TensorCounts, x: F64, floors: Mapping[str, int]) -> list[int]:
    """Weights kept at each of several thresholds x, floors and protected weights included."""
    start = _inverse_scores(tensor)
    end = np.maximum.accumulate(start + tensor.counts) if start.size else start
    whole = np.searchsorted(end, x, side="right")
    cumulative: Int = np.concatenate([[0], np.cumsum(tensor.counts)])
    kept = cumulative[whole]
    part = whole < start.size
    inside = np.floor(x[part] - start[whole[part]])
    kept[part] += np.clip(inside, 0, tensor.counts[whole[part]]).astype(np.int64)
    return [int(n) for n in np.maximum(tensor.protected + kept, floors[tensor.name])]


def _total(spill: Spill, x: F64, floors: Mapping[str, int]) -> Int:
    """Weights kept of all tensors at each threshold."""
    total = np.zeros(x.size, np.int64)
    for tensor in spill.tensors():
        total += np.array(_kept(tensor, x, floors), np.int64)
    return total
