"""The finished points of an earlier sweep, read from its `results.json` as from a stranger."""

from __future__ import annotations

from collections.abc import Set
from typing import Any


def read_rows(body: Any, needed: Set[str]) -> dict[str, dict[str, Any]] | None:
    """Rows with figures by the key of their point; None where this is no document of a sweep.

    needed  figures that every row has to have, beside its bytes
    """
    if not isinstance(body, dict) or not isinstance(body.get("key"), str):
        return None
    rows = body.get("points")
    if not isinstance(rows, list):
        return None
    kept = {}
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            return None
        if row.get("metrics") is None:  # a point that was refused is tried again
            continue
        figures = _figures(row["metrics"], needed)
        if figures is None or not isinstance(row.get("label"), str):
            return None
        if not isinstance(row.get("settings"), dict) or row.get("error") is not None:
            return None
        plain = {name: value for name, value in row.items() if name != "number"}
        kept[row["key"]] = plain | {"error": None, "metrics": figures}
    return kept


def _figures(metrics: Any, needed: Set[str]) -> dict[str, float] | None:
    """Numbers by name, NaN where JSON has null."""
    if not isinstance(metrics, dict) or metrics.get("bytes") is None or needed - set(metrics):
        return None
    if not all(value is None or type(value) in (int, float) for value in metrics.values()):
        return None
    return {name: float("nan") if value is None else value for name, value in metrics.items()}
