"""A sweep as a table of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.errors import show
from compress.evaluate.metrics import METRICS
from compress.report import human

# Figures beside the one that points are compared by, as far as there are.
_BESIDE = ("perplexity", "spearman", "accuracy", "relative_error")


def print_sweep(body: Mapping[str, Any], out: str, console: Console) -> None:
    """The points by size, those that no other beats marked, then the winner."""
    metric = body["metric"]
    rows = [row for row in body["points"] if row["metrics"] is not None]
    beside = [n for n in _BESIDE if n != metric and rows and n in rows[0]["metrics"]][:1]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("settings", overflow="fold", ratio=1, max_width=34)
    for heading in ("size", "bits/w", metric, *beside):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for row in sorted(rows, key=lambda r: r["metrics"]["bytes"]):
        own = row["metrics"]
        mark = "best" if row["number"] == body["best"] else (
            "*" if row["number"] in body["frontier"] else "")  # fmt: skip
        table.add_row(
            str(row["number"]),
            Text(show(row["label"], 120)),
            human(own["bytes"]),
            f"{own['bits_per_weight']:.2f}",
            *(f"{own.get(name, float('nan')):.4g}" for name in (metric, *beside)),
            mark,
        )
    console.print(table)
    for row in body["points"]:
        if row["error"] is not None:
            console.print(Text(f"{row['number']}: {show(row['label'], 60)}: {row['error']}"))
    for warning in body["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"))
    better = METRICS[metric].better
    console.print(Text(f"* no other point is smaller and better ({better} {metric} is better)"))
    if body["best"] is None:
        gates = ", ".join(body["gates"])
        console.print(Text(f"no point passes the gates: {gates}", style="red"))
    else:
        label = next(r["label"] for r in rows if r["number"] == body["best"])
        console.print(Text(f"best: {show(label, 120)}, recipe in {show(out)}/best.yaml", "bold"))
