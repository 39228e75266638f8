"""The table that benchmarks print: a figure beside its goal, and whether it holds.

Every figure is a ratio inside one run. `--json FILE` appends to what other benchmarks wrote, and
`python bench/goals.py FILE` prints them all as one table.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured ratio. `goal` and `stretch` are lower bounds, or upper ones (`at_most`).

    None: there is none.
    """

    what: str
    result: float
    goal: float | None = None
    stretch: float | None = None
    note: str = ""
    at_most: bool = False

    def _reaches(self, bound: float) -> bool:
        return self.result <= bound if self.at_most else self.result >= bound

    @property
    def verdict(self) -> str:
        """stretch, holds, MISSED, or nothing where there is no goal."""
        if self.stretch is not None and self._reaches(self.stretch):
            return "stretch"
        if self.goal is None:
            return ""
        return "holds" if self._reaches(self.goal) else "MISSED"


def show(title: str, figures: list[Figure]) -> None:
    """Print one table, 100 columns wide."""
    table = Table(title=title, title_justify="left")
    for column in ("figure", "goal", "stretch", "result", "", "note"):
        table.add_column(column, justify="left" if column in ("figure", "", "note") else "right")
    for figure in figures:
        sign = "<= " if figure.at_most else ""
        bounds = ("" if b is None else f"{sign}{b:g}" for b in (figure.goal, figure.stretch))
        table.add_row(figure.what, *bounds, _number(figure.result), figure.verdict, figure.note)
    Console(width=110).print(table)


def _number(value: float) -> str:
    """Two decimals, or as many as a small error or a number close to 1 needs."""
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    if 5e-8 < abs(value - 1) < 0.005:
        return f"{value:.7f}".rstrip("0")
    return f"{value:.2f}"


def save(path: Path, title: str, figures: list[Figure]) -> None:
    """Add the figures to a JSON file, in place of an earlier run's of that title."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[title] = [asdict(figure) for figure in figures]
    path.write_text(json.dumps(kept, indent=2) + "\n")


def main() -> None:
    """Print every table of a file."""
    for title, rows in json.loads(Path(sys.argv[1]).read_text()).items():
        show(title, [Figure(**row) for row in rows])


if __name__ == "__main__":
    main()
