"""Perplexity at equal bits beside llm-compressor's GPTQ, AWQ and SparseGPT and beside HQQ.

    python bench/peers/environments.py
    COMPRESS_SHARED=DIR python bench/quality_tiny_llama.py [--json FILE] [--peers FILE]

tiny-llama-en, block linears only, embeddings and head at 16 bits in all. Every method calibrates on
the same 64 x 512 tokens of WikiText-2 valid; all are measured by bench/peers/evaluate.py on
WikiText-2 test. The peers run in environments of their own with their best settings
(bench/peers/README.md).
`--peers FILE` keeps their results; what it holds already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from goals import Figure, save, show
from rich.console import Console
from rich.table import Table

from compress.calibrate.calibrate import Settings, calibrate
from compress.calibrate.inputs import read_ids
from compress.calibrate.statistics import open_statistics
from compress.checkpoint import open_checkpoint
from compress.output import open_output
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass
from compress.run import RunOptions, run

HERE = Path(__file__).resolve().parent
MSE, IMATRIX = "--observer memoryless_mse", "--observer imatrix_mse"
SEQUENCES = 64


@dataclass(frozen=True)
class Point:
    """A number of bits per weight: our chain there, and the peers' best settings."""

    figure: float
    title: str
    chain: str
    peers: tuple[str, ...]
    format: str = "auto"


POINTS = (
    Point(
        4.25,
        "4.25 bits",
        "quantize:bits=4,group=64,solver=obs,follow=true",
        (
            f"GPTQ --bits 4 --group 128 --asymmetric {MSE}",
            f"GPTQ --bits 4 --group 64 {MSE}",
            f"AWQ --bits 4 --group 128 --asymmetric {MSE}",
            "HQQ --bits 4 --group 128 --axis 1",
        ),
    ),
    Point(
        3.25,
        "3.25 bits",
        "quantize:bits=3,group=64,solver=obs,follow=true",
        (
            f"GPTQ --bits 3 --group 64 {IMATRIX}",
            f"GPTQ --bits 3 --group 128 --asymmetric {MSE}",
            f"AWQ --bits 3 --group 128 --asymmetric {MSE}",
            "HQQ --bits 3 --group 128 --axis 1",
        ),
    ),
    Point(
        2.5,
        "2.5 bits",
        "quantize:bits=2,group=32,solver=obs,follow=true",
        (
            f"GPTQ --bits 2 --group 64 --asymmetric {MSE}",
            f"GPTQ --bits 2 --group 32 {MSE}",
            f"AWQ --bits 2 --group 64 --asymmetric {MSE}",
            "HQQ --bits 2 --group 64 --axis 1",
        ),
    ),
    Point(
        3.25,
        "50 % + 4 bits",
        "prune:score=obs quantize:bits=4,group=64,solver=obs,follow=true",
        (f"SparseGPT --bits 4 --group 64 --then gptq {MSE}",),
        "native",  # which stores a mask and the kept codes, as the peer's figure is counted
    ),
)


@dataclass(frozen=True)
class Data:
    """Where things are: the model, its texts, the ids that all calibrate on."""

    model: Path
    test: Path
    ids: Path


def ours(point: Point, data: Data, scratch: Path, windows: int) -> dict[str, Any]:
    """Calibrate, compress and measure one of our chains."""
    from evaluate import perplexity

    recipe = Recipe(tuple(parse_pass(word) for word in point.chain.split()))
    begun = time.perf_counter()
    with open_checkpoint(data.model) as source:
        draft = make_plan(source, recipe, Options(), calibrated=True)
        inputs = read_ids(data.ids, source.config)
        file = scratch / "stats.safetensors"
        calibrate(draft, inputs, file, Settings(overwrite=True, fsync=False))
        with open_statistics(file) as statistics:
            plan = make_plan(source, recipe, Options(point.format), statistics)
            report = run(plan, scratch / "out", RunOptions(overwrite=True, fsync=False))
    seconds = time.perf_counter() - begun
    with open_output(scratch / "out") as output:
        weights = {i.name: output.read(i).astype(np.float32) for i in output.infos()
                   if i.name in output.entries}  # fmt: skip
    return {
        "name": point.chain,
        "bits_per_weight": report.body["totals"]["bits_per_weight"],
        "perplexity": perplexity(data.model, data.test, weights, windows),
        "seconds": seconds,
    }


def peers(point: Point, data: Data, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The peers' results, from the file where it has them."""
    from compare import Setting, measure, settings

    known = {s.name: s for s in settings()}
    rows = json.loads(options.peers.read_text()) if options.peers.exists() else []
    found = []
    for name in point.peers:
        setting: Setting = known[name]
        key = {"name": name, "calibration": SEQUENCES, "windows": options.windows}
        row = next((r for r in rows if all(r.get(k) == v for k, v in key.items())), None)
        if row is None:
            row = {
                **measure(
                    setting, data.model, data.ids, data.test, options.environments, options.windows
                ),
                **key,
            }
            rows.append(row)
            options.peers.parent.mkdir(parents=True, exist_ok=True)
            options.peers.write_text(json.dumps(rows, indent=1) + "\n")
        found.append(row)
    return found


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """One point's methods, the best first."""
    made = Table(title=title, title_justify="left")
    for column in ("method", "bits", "perplexity", "s"):
        made.add_column(column, justify="left" if column == "method" else "right")
    for row in sorted(rows, key=lambda r: r["perplexity"]):
        figures = (f"{row['bits_per_weight']:.3f}", f"{row['perplexity']:.3f}")
        made.add_row(row["name"], *figures, f"{row['seconds']:.0f}")
    Console(width=110).print(made)


def main() -> None:
    """Measure every point and print it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(HERE / "peers"))  # whose modules also run alone, in other environments
    from evaluate import calibration_ids

    shared = Path(os.environ.get("COMPRESS_SHARED", HERE.parent.parent / "shared"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, default=HERE.parent / "build" / "peers")
    parser.add_argument("--peers", type=Path, default=HERE.parent / "build" / "peers.json")
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--only", default="", help="points whose title contains this")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = shared / "models" / "tiny-llama-en"
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        data = Data(model, shared / "data" / "wikitext2_test.txt", Path(folder) / "ids.npy")
        np.save(
            data.ids, calibration_ids(model, shared / "data" / "wikitext2_valid.txt", SEQUENCES)
        )
        for point in POINTS:
            if options.only not in point.title:
                continue
            mine = ours(point, data, Path(folder), options.windows)
            others = [] if options.no_peers else peers(point, data, options)
            table(point.title, [mine, *others])
            for other in others:
                note = f"{mine['perplexity']:.3f} against {other['perplexity']:.3f}"
                ratio = other["perplexity"] / mine["perplexity"]
                figures.append(
                    Figure(
                        f"{point.title}: {other['name'].split()[0]} / ours", ratio, 1.0, None, note
                    )
                )
    title = "tiny-llama-en: perplexity of the peer over ours, at equal bits"
    show(title, figures)
    if options.json:
        save(options.json, title, figures)


if __name__ == "__main__":
    main()
