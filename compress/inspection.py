"""`inspect`: what is in a checkpoint, from headers; with values, what its weights look like."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.errors import show
from compress.output import open_any
from compress.report import human
from compress.tensor import Array, TensorInfo

_SLICE_BYTES = 8 << 20
_SPECTRUM_RANKS = (16, 64)
_MAX_SPECTRUM_SIDE = 8192


def inspect_model(
    path: Path, *, values: bool = False, spectra: bool = False, allow_pickle: bool = False
) -> dict[str, Any]:
    """Tensors, roles, sizes; raises InputError or UsageError where the input is not sound."""
    from compress.checkpoint import config as model_config

    if path.suffix == ".json" and not path.name.endswith(".index.json") and path.is_file():
        config = model_config.read_config(path)
        return {"config": path.name, "keys": len(config), "code": model_config.code_keys(config)}
    with open_any(path, allow_pickle=allow_pickle) as checkpoint:
        rows = []
        for info in checkpoint.infos():
            row: dict[str, Any] = {
                "name": info.name,
                "file": info.file,
                "dtype": info.dtype,
                "shape": list(info.shape),
                "role": info.role.value,
                "bytes": info.nbytes,
            }
            if (values or spectra) and info.is_float and info.size:
                row |= _values(checkpoint, info)
            if spectra and len(info.shape) >= 2 and info.is_float:
                row |= _spectrum(checkpoint, info)
            rows.append(row)
        return {
            "model": str(path),
            "tensors": rows,
            "bytes": sum(r["bytes"] for r in rows),
            "weights": sum(i.size for i in checkpoint.infos() if i.is_float),
            "tied": dict(checkpoint.aliases),
            "fingerprint": checkpoint.fingerprint(),
            "code": list(checkpoint.code_files),
            "warnings": list(checkpoint.warnings),
        }


def print_inspection(body: dict[str, Any], console: Console, limit: int = 400) -> None:
    """The tensors as a table, then counts by role and dtype."""
    if "config" in body:
        console.print(Text(f"{show(body['config'])}: {body['keys']} keys, no model beside it"))
        _print_code(body, console)
        return
    rows = body["tensors"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="ellipsis", no_wrap=True)
    for heading in ("role", "dtype", "shape"):
        table.add_column(heading, no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    columns = ("zeros", "max", "max_over_std", *(f"energy_rank_{r}" for r in _SPECTRUM_RANKS))
    more = [k for k in columns if any(k in r for r in rows)]
    for heading in more:
        table.add_column(heading.replace("_", " "), justify="right", no_wrap=True)
    for row in rows[:limit]:
        cells = [row["role"], row["dtype"], "x".join(map(str, row["shape"])) or "scalar"]
        extra = [f"{row[k]:.3g}" if k in row else "" for k in more]
        table.add_row(Text(show(row["name"], 60)), *cells, human(row["bytes"]), *extra)
    console.print(table)
    if len(rows) > limit:
        console.print(Text(f"... and {len(rows) - limit} more (--json lists all)"))
    roles = Counter(r["role"] for r in rows)
    dtypes = Counter(r["dtype"] for r in rows)
    console.print(
        Text(
            f"{len(rows)} tensors, {body['weights']:,} weights, {human(body['bytes'])}: "
            + ", ".join(f"{n} {k}" for k, n in roles.most_common())
            + "; "
            + ", ".join(f"{n} {k}" for k, n in dtypes.most_common()),
            style="bold",
        )
    )
    for alias, kept in body["tied"].items():
        console.print(Text(f"tied: {show(alias)} = {show(kept)}"))
    _print_code(body, console)
    for warning in body["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"))


def _print_code(body: dict[str, Any], console: Console) -> None:
    if body["code"]:
        names = ", ".join(show(c) for c in body["code"][:8])
        console.print(Text(f"names code, which nothing here runs: {names}"))


def _values(checkpoint: Any, info: TensorInfo) -> dict[str, float]:
    """Share of zeros, largest magnitude, its ratio to the standard deviation, non-finite count."""
    zeros = bad = 0
    top, total, squares = 0.0, 0.0, 0.0
    for block in _blocks(checkpoint, info):
        wide = block.astype(np.float32).ravel()
        finite = np.isfinite(wide)
        bad += int(wide.size - np.count_nonzero(finite))
        wide = wide if bad == 0 else wide[finite]
        zeros += int(wide.size - np.count_nonzero(wide))
        if wide.size:
            top = max(top, float(np.abs(wide).max()))
            total += float(wide.sum(dtype=np.float64))
            squares += float(np.square(wide, dtype=np.float64).sum())
    mean = total / info.size
    spread = max(0.0, squares / info.size - mean * mean) ** 0.5
    found = {"zeros": zeros / info.size, "max": top, "not_finite": bad}
    return found | {"max_over_std": top / spread if spread else 0.0}


def _blocks(checkpoint: Any, info: TensorInfo) -> Any:
    if not info.shape:
        yield checkpoint.read(info).reshape(1)
        return
    rows = info.shape[0]
    step = max(1, rows * _SLICE_BYTES // max(1, info.nbytes))
    for start in range(0, rows, step):
        yield checkpoint.read(info, start, min(rows, start + step))


def _spectrum(checkpoint: Any, info: TensorInfo) -> dict[str, float]:
    """Share of the energy (sum of squared singular values) that the top ranks hold."""
    rows, columns = info.matrix_shape
    if min(rows, columns) > _MAX_SPECTRUM_SIDE:
        return {}
    matrix: Array = info.to_matrix(checkpoint.read(info)).astype(np.float64)
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    energy = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)
    whole = float(energy.sum())
    if whole == 0 or not np.isfinite(whole):
        return {}
    return {f"energy_rank_{r}": float(energy[:r].sum()) / whole for r in _SPECTRUM_RANKS}
