"""Decoding from packed weights beside torch bfloat16: tokens a second and memory, goals beside.

    python bench/runtime.py [--size 1b] [--threads 2] [--tokens 60] [--work DIR] [--json FILE]

The checkpoint is made by tools/make_llama.py of COMPRESS_SHARED (default ../shared) and removed
again unless --work names a folder to keep it in. It is compressed twice: its Linear layers to 4
bits in groups of 128, and so with its tied head and table in 8 bits. Each output runs in a process
of its own beside the source in torch bfloat16, steps interleaved, medians; batch 1. Memory is the
peak of loading, less what the same program takes with a model of some kilobytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import goals
from goals import Figure
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("COMPRESS_SHARED", ROOT.parent / "shared"))
TOOL = [sys.executable, "-m", "compress"]
TABLE = "quantize:bits=8,group=-1,targets=[model.embed_tokens]"
JOBS = {"4 bits": ["quantize:bits=4,group=128"], "4 bits, table 8 bits": [
    "quantize:bits=4,group=128", TABLE]}  # fmt: skip
SPEED_GOAL, MEMORY_GOAL = 2.5, 1.15
TITLE = "Decoding"


def main() -> None:
    """Make the models, measure them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--size", default="1b", choices=["tiny", "160m", "1b", "3b"])
    parser.add_argument("--threads", type=int, default=0, help="0: as torch decides")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="compress-runtime-"))
    try:
        rows = measure(work, arguments)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    show(rows)
    found = figures(rows)
    goals.show(TITLE, found)
    if arguments.json:
        goals.save(arguments.json, TITLE, found)


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `compress bench` says of each output, and the framework's own memory."""
    source = make(work / arguments.size, arguments.size)
    tiny = make(work / "tiny", "tiny")
    speed = ["--threads", str(arguments.threads), "--tokens", str(arguments.tokens)]
    run("run", tiny, "-o", work / "tiny-out", "quantize:bits=4,group=16", "--overwrite")
    framework = bench(work / "tiny-out", *speed)["memory"]["peak_memory_bytes"]
    rows: dict[str, Any] = {}
    for number, (name, job) in enumerate(JOBS.items()):
        out = work / f"{arguments.size}-out{number}"
        run("run", source, "-o", out, *job, "--overwrite")
        rows[name] = bench(out, "--reference", source, *speed)
        rows[name]["memory"]["framework_bytes"] = framework
    return rows


def make(model: Path, size: str) -> Path:
    """The synthetic checkpoint, unless it is there."""
    if not (model / "config.json").exists():
        script = SHARED / "tools" / "make_llama.py"
        subprocess.run([sys.executable, str(script), str(model), "--size", size], check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
    return model


def run(*words: str | Path) -> str:
    done = subprocess.run([*TOOL, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def bench(out: Path, *words: str | Path) -> Any:
    return json.loads(run("bench", out, "--no-layers", "--json", *words))


def show(rows: dict[str, Any]) -> None:
    """Results, ratios and goals."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{next(iter(rows.values()))['threads']} threads")
    table = Table(
        "output", "precision", "tokens/s", "torch bf16", "ratio", "prompt", "torch bf16",
        "memory / packed", "peak / packed", box=None,
    )  # fmt: skip
    for name, body in rows.items():
        speeds, memory = body["tokens_per_second"], body["memory"]
        reference = speeds["reference, torch bf16"]
        packed = memory["packed_bytes"]
        for precision in ("exact", "fast"):
            mine = speeds[precision]
            table.add_row(
                name, precision, f"{mine['decode']:.2f}", f"{reference['decode']:.2f}",
                f"{mine['decode'] / reference['decode']:.2f}", f"{mine['prefill']:.1f}",
                f"{reference['prefill']:.1f}", f"{memory['resident_weight_bytes'] / packed:.3f}",
                f"{(memory['peak_memory_bytes'] - memory['framework_bytes']) / packed:.3f}",
            )  # fmt: skip
    console.print(table)


def figures(rows: dict[str, Any]) -> list[Figure]:
    """Speed beside torch bfloat16; memory as its bound over what it is."""
    found = []
    for name, body in rows.items():
        memory = body["memory"]
        peak = memory["peak_memory_bytes"] - memory["framework_bytes"]
        speeds = body["tokens_per_second"]
        ratio = speeds["exact"]["decode"] / speeds["reference, torch bf16"]["decode"]
        bound = MEMORY_GOAL * memory["packed_bytes"]
        resident = memory["resident_weight_bytes"]
        share = resident / memory["packed_bytes"]
        found += [
            Figure(f"{name}: tokens a second / torch bf16", ratio, SPEED_GOAL),
            Figure(
                f"{name}: 1.15 x packed / resident", bound / resident, 1.0, None, f"{share:.3f}"
            ),
            Figure(f"{name}: 1.15 x packed / peak of loading", bound / peak, 1.0),
        ]
    return found


if __name__ == "__main__":
    main()
