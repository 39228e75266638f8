"""Allocation of bytes: exact on toys, close to exact beyond, never above the budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compress.solvers.allocation import CELLS, allocate, spend, total

Table = list[list[int]], list[list[float]]


def units(rng: np.random.Generator, count: int) -> tuple[list[list[int]], list[list[float]]]:
    """Units of different sizes whose loss falls about fourfold a bit, as rounding's does."""
    sizes = rng.integers(1, 9, count) * 100 + rng.integers(0, 7, count)
    hurts = np.exp(rng.standard_normal(count) * 2) * sizes
    widths = np.array([2, 3, 4, 5, 6, 8])
    costs = [[int(s * w) for w in widths] for s in sizes]
    losses = [
        [float(h * 4.0**-w * np.exp(rng.standard_normal() / 4)) for w in widths] for h in hurts
    ]
    return costs, losses


def brute_force(costs: list[list[int]], losses: list[list[float]], budget: int) -> float:
    choices = itertools.product(*(range(len(row)) for row in costs))
    return min(total(losses, c) for c in choices if total(costs, c) <= budget)


@pytest.mark.parametrize("seed", range(6))
def test_small_problems_are_solved_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, losses = units(rng, 5)
    least = sum(min(row) for row in costs)
    for budget in (least, least + 1, int(1.3 * least), 2 * least, 10 * least):
        choice = allocate(costs, losses, budget)
        assert total(costs, choice) <= budget
        assert total(losses, choice) == pytest.approx(brute_force(costs, losses, budget), rel=1e-12)


@pytest.mark.parametrize("cells", [0, 30_000])
def test_what_is_too_large_for_the_table_comes_close(cells: int) -> None:
    rng = np.random.default_rng(3)
    costs, losses = units(rng, 20)
    least = sum(min(row) for row in costs)
    for share in (1.1, 1.5, 2.0):
        budget = int(share * least)
        exact = total(losses, allocate(costs, losses, budget))
        choice = allocate(costs, losses, budget, cells=cells)
        assert total(costs, choice) <= budget
        assert exact <= total(losses, choice) <= 1.02 * exact


def test_thousands_of_units() -> None:
    rng = np.random.default_rng(4)
    costs, losses = units(rng, 3000)
    budget = 4 * sum(row[0] // 2 for row in costs)
    assert len(costs) * budget > 100 * CELLS
    choice = allocate(costs, losses, budget)
    uniform = [2] * len(costs)  # four bits everywhere
    assert 0.99 * budget < total(costs, choice) <= budget
    assert total(losses, choice) < 0.5 * total(losses, uniform)


def test_ties_and_useless_candidates() -> None:
    costs = [[10, 20, 30], [10, 20, 30]]
    losses = [[4.0, 1.0, 1.0], [4.0, 1.0, 2.0]]
    for cells in (CELLS, 0):
        assert allocate(costs, losses, 30, cells=cells) == allocate(costs, losses, 30, cells=cells)
        assert allocate(costs, losses, 100, cells=cells) == [1, 1]
        assert allocate(costs, losses, 20, cells=cells) == [0, 0]
    with pytest.raises(ValueError, match="cheapest candidates cost 20, more than 19"):
        allocate(costs, losses, 19)
    with pytest.raises(ValueError, match="not finite"):
        allocate([[1]], [[float("nan")]], 5)


def test_ranks_go_where_a_byte_gains_most() -> None:
    gains = [[9.0, 4.0, 1.0], [8.0, 0.5, 0.0], [30.0, 25.0]]
    prices = [10, 10, 100]
    assert spend(gains, prices, 0) == [0, 0, 0]
    assert spend(gains, prices, 29) == [1, 1, 0]
    assert spend(gains, prices, 130) == [2, 1, 1]
    assert spend(gains, prices, 10_000) == [3, 2, 2]  # a gain of nothing is not bought
    rng = np.random.default_rng(0)
    for budget in range(0, 60, 7):
        rows = [sorted(rng.random(3).tolist(), reverse=True) for _ in range(4)]
        bought = spend(rows, [7] * 4, budget)
        least = brute_force(
            [[7 * n for n in range(4)]] * 4,
            [[sum(row[n:]) for n in range(4)] for row in rows],
            budget,
        )
        assert sum(sum(row[n:]) for row, n in zip(rows, bought, strict=True)) == pytest.approx(
            least
        )
