"""Which points no other beats, and which one wins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from compress.evaluate.metrics import HIGH, METRICS
from compress.recipe import Gate

Row = Mapping[str, Any]  # a finished point: "metrics" has its figures


def loss(row: Row, metric: str) -> float:
    """The metric so that less is better; what cannot be measured is the worst."""
    value = float(row["metrics"][metric])
    if math.isnan(value):
        return math.inf
    return -value if METRICS[metric].better == HIGH else value


def frontier(rows: Sequence[Row], metric: str) -> list[int]:
    """Indices of the points that no other beats in size and quality, by size."""
    order = sorted(
        range(len(rows)), key=lambda i: (rows[i]["metrics"]["bytes"], loss(rows[i], metric))
    )
    found: list[int] = []
    best = math.inf
    for i in order:
        own = loss(rows[i], metric)
        if own < best:
            found.append(i)
            best = own
    return found


def winner(rows: Sequence[Row], metric: str, gates: Sequence[Gate]) -> int | None:
    """The smallest that passes the gates; without gates the best, the smaller of equals.

    None where no point passes.
    """
    passing = [i for i, row in enumerate(rows) if not any(g.fails(row["metrics"]) for g in gates)]
    if not passing:
        return None
    size = {i: float(rows[i]["metrics"]["bytes"]) for i in passing}
    if gates:
        return min(passing, key=lambda i: (size[i], loss(rows[i], metric)))
    return min(passing, key=lambda i: (loss(rows[i], metric), size[i]))
