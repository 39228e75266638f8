"""Sharing a budget of bytes among units, each with a few candidates of known cost and loss.

`allocate` is the multiple-choice knapsack problem: one candidate for each unit, costs at most the
budget in all, least loss. By dynamic programming over the costs it is solved exactly where
units * budget is small. Where it is not, costs are rounded up to larger cells (so that the
budget still holds), a greedy walk along the lower convex hulls (the Lagrangian relaxation) is
made beside it, and the better of both is polished by moves of one and of two units.

`spend` is the case of candidates that come one by one at one price, with falling gains: ranks.

Both are deterministic: ties go to the earlier unit and the earlier candidate.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Cells of the table of dynamic programming: bytes of memory, and about as many nanoseconds a
# candidate.
CELLS = 30_000_000
# With fewer cells a unit, rounding costs up wastes more than the greedy walk.
_CELLS_A_UNIT = 50
_ROUNDS = 1000

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def allocate(
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    budget: int,
    *,
    cells: int = CELLS,
) -> list[int]:
    """For each unit the index of its candidate.

    costs, losses  by unit and candidate; the losses finite
    Raises ValueError where even the cheapest candidates cost more than the budget.
    """
    prices = [np.asarray(row, np.int64) for row in costs]
    values = [np.asarray(row, np.float64) for row in losses]
    if not all(np.isfinite(row).all() for row in values):
        raise ValueError("a loss is not finite")
    floors = [int(row.min()) for row in prices]
    left = budget - sum(floors)
    if left < 0:
        raise ValueError(f"the cheapest candidates cost {sum(floors)}, more than {budget}")
    above = [row - floor for row, floor in zip(prices, floors, strict=True)]
    # More than everything dear together buys nothing; what all costs share is one cell.
    left = min(left, sum(int(row.max()) for row in above))
    step = int(np.gcd.reduce(np.concatenate([*above, [0]]))) or 1
    if len(above) * (left // step + 1) <= cells:
        return _dynamic([row // step for row in above], values, left // step)
    found = [_greedy(above, values, left)]
    width = cells // len(above)
    if width >= _CELLS_A_UNIT * len(above):
        cell = -(-left // width)
        found.append(_dynamic([-(-row // cell) for row in above], values, left // cell))
    polished = [_polish(above, values, left, choice) for choice in found]
    return min(polished, key=lambda choice: total(losses, choice))


def total(table: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    """The sum over the units of what was chosen, of costs or of losses."""
    return sum(row[j] for row, j in zip(table, choice, strict=True))


def spend(gains: Sequence[Sequence[float]], prices: Sequence[int], budget: int) -> list[int]:
    """How many of each unit's gains to buy, the largest gain a byte first.

    gains   by unit, not rising: what the first, second, ... costs `prices[unit]` and gains
    The result is the best for what it costs; at most one price is left over for each unit.
    """
    offers = [
        (-gain / max(prices[unit], 1), unit, number)
        for unit, row in enumerate(gains)
        for number, gain in enumerate(row)
        if gain > 0
    ]
    bought = [0] * len(gains)
    left = budget
    for _, unit, number in sorted(offers):
        if number == bought[unit] and prices[unit] <= left:
            bought[unit] += 1
            left -= prices[unit]
    return bought


def _dynamic(costs: Sequence[Ints], losses: Sequence[Floats], budget: int) -> list[int]:
    """Exact: best[b] is the least loss of the units so far at a cost of at most b."""
    best = np.zeros(budget + 1)
    chosen = []
    for cost, loss in zip(costs, losses, strict=True):
        following = np.full(budget + 1, np.inf)
        which = np.zeros(budget + 1, np.uint16)
        for j, (price, value) in enumerate(zip(cost.tolist(), loss.tolist(), strict=True)):
            if price > budget:
                continue
            reached = best[: budget + 1 - price] + value
            better = reached < following[price:]
            following[price:][better] = reached[better]
            which[price:][better] = j
        chosen.append(which)
        best = following
    choice = []
    at = budget
    for cost, which in zip(reversed(costs), reversed(chosen), strict=True):
        j = int(which[at])
        choice.append(j)
        at -= int(cost[j])
    return choice[::-1]


def _greedy(costs: Sequence[Ints], losses: Sequence[Floats], budget: int) -> list[int]:
    """Steps along every unit's lower convex hull, steepest first, while they can be paid."""
    hulls = [_hull(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    steps = []
    for unit, hull in enumerate(hulls):
        for number, (a, b) in enumerate(itertools.pairwise(hull)):
            price = int(costs[unit][b] - costs[unit][a])
            slope = (losses[unit][b] - losses[unit][a]) / price
            steps.append((float(slope), unit, number, price))
    reached = [0] * len(hulls)
    left = budget
    for _, unit, number, price in sorted(steps):
        if reached[unit] == number and price <= left:
            reached[unit] += 1
            left -= price
    return [hull[at] for hull, at in zip(hulls, reached, strict=True)]


def _hull(cost: Ints, loss: Floats) -> list[int]:
    """Candidates on the lower convex hull, from the cheapest to the least loss."""
    hull: list[int] = []
    for j in np.lexsort((loss, cost)).tolist():
        if hull and loss[j] >= loss[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            before = (loss[b] - loss[a]) / (cost[b] - cost[a])
            if before < (loss[j] - loss[b]) / max(int(cost[j] - cost[b]), 1):
                break
            hull.pop()
        hull.append(j)
    return hull


def _polish(
    costs: Sequence[Ints], losses: Sequence[Floats], budget: int, choice: list[int]
) -> list[int]:
    """Change one unit, or one for another, while that lowers the loss within the budget."""
    choice = list(choice)
    units = np.repeat(np.arange(len(costs)), [len(row) for row in costs])
    numbers = np.concatenate([np.arange(len(row)) for row in costs])
    for _ in range(_ROUNDS):
        left = budget - sum(int(row[j]) for row, j in zip(costs, choice, strict=True))
        price = np.concatenate([r - r[j] for r, j in zip(costs, choice, strict=True)])
        change = np.concatenate([r - r[j] for r, j in zip(losses, choice, strict=True)])
        moves = _best_moves(units, price, change, left)
        if not moves:
            break
        for move in moves:
            choice[int(units[move])] = int(numbers[move])
    return choice


def _best_moves(units: Ints, price: Ints, change: Floats, left: int) -> list[int]:
    """The one or two moves that lower the loss most; none where nothing does."""
    best, moves = -1e-12, []
    affordable = np.flatnonzero((price <= left) & (change < best))
    if affordable.size:
        move = int(affordable[np.argmin(change[affordable])])
        best, moves = float(change[move]), [move]
    saves = np.flatnonzero(price < 0)
    saves = saves[np.argsort(price[saves], kind="stable")]  # those that save most first
    wants = np.flatnonzero((change < 0) & (price > left))
    if not saves.size or not wants.size:
        return moves
    # The least harmful of the moves that save enough for each wanted one.
    least = np.minimum.accumulate(change[saves])
    where = np.maximum.accumulate(np.where(change[saves] <= least, np.arange(saves.size), 0))
    enough = np.searchsorted(price[saves], left - price[wants], side="right") - 1
    for want, last in zip(wants.tolist(), enough.tolist(), strict=True):
        if last < 0:
            continue
        save = int(saves[where[last]])
        both = float(change[want] + change[save])
        if both < best and units[want] != units[save]:
            best, moves = both, [save, want]
    return moves
