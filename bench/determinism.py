"""One table of SHA-256: the same bytes over threads, environments, places, resumes, kernels.

    python bench/determinism.py [--columns NAME ...] [--json FILE]

A row is a way to run, a column what is run: a chain in each output format, from safetensors, from
a PyTorch file, from an .onnx file with its graph. A cell is the hash of all files of the output
(figures of time left out); every cell of a column must be the same. Each run is an interpreter of
its own. Exit 1 where two cells differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, whose onnx.py is not the library
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "robust")]

from test_determinism import CHAIN, ENVIRONMENTS, EXACT  # noqa: E402
from toolbox import tiny_llama, tree  # noqa: E402

SHARD = 60_000  # bytes: several shards of the model, so that a run can be cut off between two
# column -> (source, format, passes)
COLUMNS = {
    "native": ("model", "native", [*EXACT, "low-rank:rank=4"]),
    "compressed-tensors": ("model", "compressed-tensors", [*CHAIN]),
    "dense": ("model", "dense", ["prune:sparsity=0.4"]),
    "of a .pt file": ("model.pt", "native", [*EXACT]),
    "of an .onnx file": ("net.onnx", "onnx", ["quantize:bits=4,group=32", "low-rank:rank=2"]),
}


@dataclass(frozen=True)
class Row:
    """A way to run: threads, environment, working directory, cut off or not."""

    jobs: int = 2
    environment: Mapping[str, str] = field(default_factory=dict)
    elsewhere: bool = False
    resumed: bool = False


def rows() -> dict[str, Row]:
    """Every way, by its name."""
    try:
        from compress.kernels import _cpu  # type: ignore[attr-defined]
    except ImportError:
        sets = ["reference"]
    else:
        sets = ["reference", *_cpu.available_isas()]
    return (
        {f"{n} thread{'s' * (n > 1)}": Row(n) for n in range(1, 9)}
        | {name: Row(environment=given) for name, given in ENVIRONMENTS.items()}
        | {"another directory": Row(elsewhere=True), "cut off, resumed": Row(resumed=True)}
        | {f"kernels: {isa}": Row(environment={"COMPRESS_ISA": isa}) for isa in sets}
    )


def main() -> int:
    """Print the table, a row as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", type=Path, help="append the table to this file, as a line")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own does
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    given = parser.parse_args()
    if given.one:
        return one(**json.loads(given.one))
    table: dict[str, dict[str, str]] = {}
    print(" " * 20 + "".join(f"{name:>20}" for name in given.columns))
    with tempfile.TemporaryDirectory(prefix="compress-determinism-") as folder:
        place = Path(folder)
        make_sources(place)
        for name, row in rows().items():
            table[name] = {column: cell(place, row, column) for column in given.columns}
            print(f"{name:20}" + "".join(f"{h[:12]:>20}" for h in table[name].values()), flush=True)
    cells = sum(len(row) for row in table.values())
    equal = all(len({row[column] for row in table.values()}) == 1 for column in given.columns)
    print(f"{cells} cells, {'equal' if equal else 'NOT EQUAL'} in each column")
    if given.json is not None:
        with given.json.open("a") as file:
            file.write(json.dumps({"determinism": table, "equal": equal}) + "\n")
    return 0 if equal else 1


def make_sources(place: Path) -> None:
    """The same weights as safetensors and as a PyTorch file, and a graph of two layers."""
    import ml_dtypes
    import torch
    from damage import onnx_model

    from compress.checkpoint import open_checkpoint

    model = tiny_llama(place / "model", dtype=ml_dtypes.bfloat16, hidden=128, ffn=320, shards=2)
    with open_checkpoint(model) as checkpoint:
        weights = {i.name: checkpoint.read(i).astype("float32") for i in checkpoint.infos()}
    torch.save({n: torch.from_numpy(w).bfloat16() for n, w in weights.items()}, place / "model.pt")
    made = onnx_model(place / "graph" / "net.onnx")
    for path in made.parent.iterdir():
        path.rename(place / path.name)


def cell(place: Path, row: Row, column: str) -> str:
    """The hash of one output."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        cwd = Path(folder) / "a" / "b" if row.elsewhere else place
        cwd.mkdir(parents=True, exist_ok=True)
        out = Path(folder) / "out"
        job = {
            "column": column,
            "place": os.path.relpath(place, cwd),
            "out": os.path.relpath(out, cwd),
            "jobs": row.jobs,
            "resumed": row.resumed,
        }
        subprocess.run(
            [sys.executable, __file__, "--one", json.dumps(job)],
            check=True,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **row.environment},
        )
        return hashlib.sha256(json.dumps(tree(out), sort_keys=True).encode()).hexdigest()


def one(column: str, place: str, out: str, jobs: int, resumed: bool) -> int:
    """One run in this process; a resumed one is cut off after its first shard."""
    from compress.checkpoint import open_checkpoint
    from compress.errors import Interrupted
    from compress.export_onnx.export import prepare
    from compress.export_onnx.options import ExportOptions
    from compress.plan import Options, make_plan
    from compress.recipe import Recipe, parse_pass
    from compress.resume import Finished, State
    from compress.run import RunOptions, run

    source, format_name, words = COLUMNS[column]
    recipe = Recipe(passes=tuple(parse_pass(word) for word in words))
    add = State.add

    def cut(self: State, name: str, finished: Finished) -> None:
        add(self, name, finished)
        raise Interrupted(signal.SIGTERM)

    with open_checkpoint(Path(place) / source, allow_pickle=source.endswith(".pt")) as checkpoint:
        known = Options(format=format_name, jobs=jobs, memory=2 << 20, max_shard_bytes=SHARD)
        options: dict[str, Any] = {"fsync": False}
        if checkpoint.graph is not None:
            known = Options(format=format_name, jobs=jobs, memory=2 << 20, max_shard_bytes=2000)
            options["export"] = prepare(checkpoint, ExportOptions())
        plan = make_plan(checkpoint, recipe, known)
        if resumed:
            State.add = cut  # type: ignore[method-assign]
            try:
                run(plan, Path(out), RunOptions(**options))
            except Interrupted:
                State.add = add  # type: ignore[method-assign]
            else:
                sys.exit(f"{column}: one shard alone")
        run(plan, Path(out), RunOptions(**options, resume=resumed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
