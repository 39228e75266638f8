"""`diff`: two checkpoints, tensor by tensor; either may be plain or an output of this tool."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress import kernels
from compress.errors import show
from compress.output import open_any
from compress.tensor import DTYPES, Array, TensorInfo

_BLOCK = 8 << 20  # bytes of a tensor that are compared at a time


def diff_models(a: Path, b: Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Relative error, largest difference and equality of every tensor that both have."""
    with (
        open_any(a, allow_pickle=allow_pickle) as first,
        open_any(b, allow_pickle=allow_pickle) as second,
    ):
        others = {i.name: i for i in second.infos()}
        rows = []
        only_a = []
        for info in first.infos():
            other = others.pop(info.name, None)
            if other is None:
                only_a.append(info.name)
            else:
                rows.append(_row(first, info, second, other))
    error = sum(r["squared_error"] for r in rows if r["squared_error"] is not None)
    norm = sum(r["squared_norm"] for r in rows if r["squared_norm"] is not None)
    return {
        "a": str(a),
        "b": str(b),
        "tensors": rows,
        "only_a": only_a,
        "only_b": sorted(others),
        "equal": sum(r["equal"] for r in rows),
        "relative_error": math.sqrt(error / norm) if norm else 0.0,
    }


def print_diff(body: dict[str, Any], console: Console, limit: int = 40) -> None:
    """The tensors that differ, the largest relative error first."""
    changed = [r for r in body["tensors"] if not r["equal"]]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="ellipsis", no_wrap=True)
    for heading in ("relative error", "largest difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in sorted(changed, key=lambda r: -(r["relative_error"] or math.inf))[:limit]:
        error = row["relative_error"]
        table.add_row(
            Text(show(row["name"], 60)),
            "-" if error is None else f"{error:.6f}",
            "-" if row["max_difference"] is None else f"{row['max_difference']:.6g}",
            row["why"] or "",
        )
    if changed:
        console.print(table)
    for side, names in (("a", body["only_a"]), ("b", body["only_b"])):
        if names:
            listed = ", ".join(show(n) for n in names[:5])
            console.print(Text(f"only in {body[side]}: {listed} ({len(names)} in all)"))
    console.print(
        Text(
            f"{body['equal']} of {len(body['tensors'])} tensors are equal bit for bit; relative "
            f"error over all {body['relative_error']:.6f}",
            style="bold",
        )
    )


def _row(first: Any, info: TensorInfo, second: Any, other: TensorInfo) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": info.name,
        "equal": False,
        "relative_error": None,
        "max_difference": None,
        "squared_error": None,
        "squared_norm": None,
        "why": None,
    }
    if info.shape != other.shape:
        row["why"] = f"shape {list(info.shape)} and {list(other.shape)}"
        return row
    floats = info.is_float and other.is_float
    equal, difference, sums = info.dtype == other.dtype, 0.0, np.zeros(2)
    for start, stop in _blocks(info):
        x, y = first.read(info, start, stop), second.read(other, start, stop)
        if info.dtype == other.dtype:
            one, two = (v.reshape(-1).view(np.uint8) for v in (x, y))
            equal = equal and bool(np.array_equal(one, two))
        if floats:
            difference = max(difference, _add_error(x, y, sums))
    row["equal"] = equal
    if not floats:
        row["why"] = None if equal else f"dtype {info.dtype} and {other.dtype}"
        return row
    error, norm = float(sums[0]), float(sums[1])
    row["squared_error"], row["squared_norm"] = error, norm
    row["relative_error"] = math.sqrt(error / norm) if norm else (0.0 if error == 0 else math.inf)
    row["max_difference"] = difference
    if info.dtype != other.dtype:
        row["why"] = f"{info.dtype} and {other.dtype}"
    return row


def _blocks(info: TensorInfo) -> Iterator[tuple[int, int | None]]:
    """Ranges of rows of some megabytes; the whole of what has no rows."""
    if not info.shape or info.dtype not in DTYPES:
        yield 0, None
        return
    rows = info.shape[0]
    step = max(1, rows * _BLOCK // max(1, info.nbytes))
    for start in range(0, max(1, rows), step):
        yield start, min(rows, start + step)


def _add_error(x: Array, y: Array, sums: NDArray[np.float64]) -> float:
    """Add (squared error, squared norm of x) to `sums`; returns the largest difference."""
    wide: Any = np.float64 if np.float64 in (x.dtype, y.dtype) else np.float32
    wide_x = np.ascontiguousarray(x, wide).reshape(-1)
    wide_y = np.ascontiguousarray(y, wide).reshape(-1)
    if wide is np.float32:
        kernels.error_sums(wide_x, wide_y, sums)
    else:
        sums += np.square(wide_x - wide_y).sum(), np.square(wide_x).sum()
    return float(np.abs(wide_x - wide_y).max()) if wide_x.size else 0.0
