"""Every peer on one model: bits per weight, perplexity, seconds, memory.

    python bench/peers/environments.py
    COMPRESS_SHARED=DIR python bench/peers/compare.py [--only PATTERN] [--json FILE] [--list]

Runs in this project's environment and starts each peer in its own. All calibrate on the same token
ids and are measured by the same code (evaluate.py). A result that FILE holds already is not made
again. DIR has models/tiny-llama-en, data/wikitext2_valid.txt and data/wikitext2_test.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Setting:
    """A peer with its options, and the bits per weight of the block linears that it competes at."""

    name: str
    figure: float
    environment: str
    script: str
    arguments: str


def gptq(figure: float, options: str) -> Setting:
    return Setting(f"GPTQ {options}", figure, "llmcompressor", "gptq.py", options)


def awq(figure: float, options: str) -> Setting:
    return Setting(f"AWQ {options}", figure, "llmcompressor", "awq.py", options)


def hqq(figure: float, options: str) -> Setting:
    return Setting(f"HQQ {options}", figure, "hqq", "hqq_rtn.py", options)


def sparse(figure: float, options: str) -> Setting:
    name, script = f"SparseGPT {options}", "sparsegpt_gptq.py"
    return Setting(name, figure, "llmcompressor", script, options)


def settings() -> list[Setting]:
    """Every variant tried, so that each peer is judged by its best."""
    made: list[Setting] = []
    minmax, mse, imatrix = (
        f"--observer {name}" for name in ("memoryless_minmax", "memoryless_mse", "imatrix_mse")
    )
    for figure, bits, group in ((4.25, 4, 64), (3.25, 3, 64), (2.5, 2, 32)):
        plain, zeros = (
            f"--bits {bits} --group {group}",
            f"--bits {bits} --group {2 * group} --asymmetric",
        )
        for observer in (minmax, mse, imatrix):
            made.append(gptq(figure, f"{plain} {observer}"))
        made.append(gptq(figure, f"{plain} {mse} --actorder none"))
        for observer in (minmax, mse):
            made.append(gptq(figure, f"{zeros} {observer}"))
            made.append(awq(figure, f"{zeros} {observer}"))
        made.append(awq(figure, f"{plain} {mse}"))
        made.append(awq(figure, f"{plain} {mse} --then gptq"))
        made.append(awq(figure, f"{zeros} {mse} --then gptq"))
        wide = 64 if bits == 2 else 128
        for axis in (0, 1):
            for size in (wide, wide // 2):  # the second has more bits than the figure
                made.append(hqq(figure, f"--bits {bits} --group {size} --axis {axis}"))
    made.append(gptq(2.5, f"--bits 2 --group 32 --asymmetric {mse}"))  # 2.56 bits
    for then in ("gptq", "gptq-masked", "round"):
        for observer in (minmax, mse):
            made.append(sparse(3.25, f"--bits 4 --group 64 --then {then} {observer}"))
    return made


def measure(
    setting: Setting, model: Path, ids: Path, text: Path, environments: Path, windows: int = 200
) -> dict[str, Any]:
    """Run one peer and measure what it left. Raises CalledProcessError where the peer fails."""
    from evaluate import perplexity
    from safetensors.numpy import load_file

    python = environments / setting.environment / "bin" / "python"
    with tempfile.TemporaryDirectory() as scratch:
        command = [python, HERE / setting.script, model, scratch, *setting.arguments.split()]
        command += ["--ids", ids] if setting.environment == "llmcompressor" else []
        begun = time.perf_counter()
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, check=False
        )
        wall = time.perf_counter() - begun
        if done.returncode:
            raise SystemExit(f"{setting.name}:\n{done.stderr[-3000:]}")
        found = json.loads((Path(scratch) / "figures.json").read_text())
        weights = load_file(Path(scratch) / "dense.safetensors")
    return {
        **asdict(setting),
        **found,
        "seconds_in_all": wall,
        "perplexity": perplexity(model, text, weights, windows),
        "windows": windows,
    }


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'peer':<72} {'figure':>6} {'bits':>6} {'perplexity':>10} {'s':>6} {'GB':>5}")
    for row in sorted(rows, key=lambda r: (-r["figure"], r["perplexity"])):
        print(
            f"{row['name']:<72} {row['figure']:6.2f} {row['bits_per_weight']:6.3f} "
            f"{row['perplexity']:10.3f} {row['seconds']:6.1f} {row['peak_rss'] / 1e9:5.2f}"
        )


def main() -> None:
    shared = Path(os.environ.get("COMPRESS_SHARED", ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=shared / "models" / "tiny-llama-en")
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "peers")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "peers.json")
    parser.add_argument("--only", default="", help="settings whose name this pattern finds")
    parser.add_argument("--figure", type=float, help="settings of this figure only")
    parser.add_argument("--sequences", type=int, default=64, help="of 512 tokens, to calibrate on")
    parser.add_argument("--list", action="store_true", help="print the settings and stop")
    options = parser.parse_args()
    chosen = [
        s
        for s in settings()
        if re.search(options.only, s.name) and options.figure in (None, s.figure)
    ]
    if options.list:
        print("\n".join(f"{s.figure:5.2f}  {s.name}" for s in chosen))
        return
    import numpy as np
    import torch
    from evaluate import calibration_ids

    torch.set_num_threads(1)
    rows = json.loads(options.json.read_text()) if options.json.exists() else []
    text = options.data / "wikitext2_test.txt"
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "ids.npy"
        valid = options.data / "wikitext2_valid.txt"
        np.save(ids, calibration_ids(options.model, valid, options.sequences))
        for setting in chosen:
            key = {"name": setting.name, "figure": setting.figure, "calibration": options.sequences}
            if any(all(row.get(k) == v for k, v in key.items()) for row in rows):
                continue
            found = measure(setting, options.model, ids, text, options.environments)
            rows.append({**found, **key})
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
            show(rows[-1:])
    print()
    show(rows)


if __name__ == "__main__":
    main()
