"""Calibration of the synthetic 1 B in a process of its own: time and peak memory.

    python bench/calibration_memory.py [--samples 32] [--length 512] [--layers 16] [--recipe NAME]

The checkpoint (2.5 GB) is made by tools/make_llama.py of COMPRESS_SHARED (default ../shared) unless
it is in the folder --work already (as 1b-16); what is made here is removed. Token ids are random.
The statistics of all linear layers take 5.1 GB on the disk, 10.2 GB with those of inputs kept apart
(--recipe held-out). The peak must stay below 3 GB (exit 1): one block, the activations and the
block's Gram matrices, which fewer --layers do not change.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("COMPRESS_SHARED", ROOT.parent / "shared"))
LIMIT = 3_000_000_000
VOCABULARY = 128_256
RECIPES = {
    "obs": "  - quantize: {bits: 4, group: 128, solver: obs}\n",
    "held-out": "  - quantize: {bits: 4, group: 128, solver: obs}\n"
    "  - low-rank: {rank: 8, metric: auto}\n",
}


def main() -> int:
    """Make what is missing, calibrate in a child, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16, help="blocks of the checkpoint")
    parser.add_argument("--recipe", choices=RECIPES, default="obs")
    parser.add_argument("--work", type=Path, default=Path("/tmp/compress-calibration"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model, own = arguments.work / f"1b-{arguments.layers}", []
    if shutil.disk_usage(arguments.work).free < 16 << 30:
        sys.exit("16 GB of disk are needed")
    if not model.exists():
        own.append(model)
        script = SHARED / "tools" / "make_llama.py"
        size = ["--size", "1b", "--layers", str(arguments.layers)]
        subprocess.run([sys.executable, str(script), str(model), *size], check=True)
    out = arguments.work / "stats.safetensors"
    ids, recipe = arguments.work / "ids.npy", arguments.work / "recipe.yaml"
    shape = (arguments.samples, arguments.length)
    np.save(ids, np.random.default_rng(0).integers(0, VOCABULARY, shape))
    recipe.write_text("version: 1\npasses:\n" + RECIPES[arguments.recipe])
    try:
        command = [sys.executable, "-m", "compress", "calibrate", str(model), "--for", str(recipe)]
        started = time.perf_counter()
        done = subprocess.run(
            [*command, "--ids", str(ids), "-o", str(out), "--overwrite", "--json"],
            check=True, stdout=subprocess.PIPE,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        body = json.loads(done.stdout)
    finally:
        for path in (out, ids, recipe):
            path.unlink(missing_ok=True)
        for path in own:
            shutil.rmtree(path, ignore_errors=True)
    peak = body["peak_memory_bytes"]
    verdict = "holds" if peak < LIMIT else "BROKEN"
    print(
        f"{arguments.layers} blocks, {shape[0]} x {shape[1]} tokens, recipe {arguments.recipe}:"
        f" {seconds:,.0f} s, {body['sites']} sites, file {body['bytes'] / 1e9:.2f} GB,"
        f" peak memory (VmHWM) {peak / 1e9:.2f} GB; limit {LIMIT / 1e9:.0f} GB {verdict}"
    )
    return 0 if peak < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
