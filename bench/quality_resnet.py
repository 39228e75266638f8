"""What calibration buys a small convolutional network: ResNet-20 on CIFAR-10, without training.

    pip install torch
    COMPRESS_SHARED=DIR python bench/quality_resnet.py [--json FILE]

DIR/models/resnet20-12fca82f.th is calibrated on DIR/data/cifar10_calib_600.npz and judged on
DIR/data/cifar10_test_2000.npz, by the command line. Points are percentages of correct classes less
the dense model's on the same images; their standard error is that of the paired differences.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import goals
from goals import Figure

ROOT = Path(__file__).resolve().parent.parent
MODULE = f"{ROOT / 'tests' / 'resnet_cifar.py'}:resnet20"
ROUNDED = "quantize:bits=4,group_size=-1"
OBS = f"{ROUNDED},solver=obs,act_order=true"
PRUNED = "prune:sparsity=0.5,scope=global"
FACTORS = "low-rank:rank=4,metric=full"
RECIPE = """
passes:
  - prune: {sparsity: 0.5}
  - quantize: {bits: 4, group_size: -1, solver: obs, act_order: true}
  - low-rank: {rank: 4, metric: full}
  - recalibrate
"""


def main() -> None:
    """Run everything and print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path, help="add the figures to this file")
    arguments = options.parse_args()
    shared = Path(os.environ.get("COMPRESS_SHARED", ROOT.parent / "shared"))
    with tempfile.TemporaryDirectory() as folder:
        figures = measured(shared, Path(folder))
    goals.show("ResNet-20", figures)
    if arguments.json:
        goals.save(arguments.json, "ResNet-20", figures)


def measured(shared: Path, folder: Path) -> list[Figure]:
    """Every figure of the table."""
    model = shared / "models" / "resnet20-12fca82f.th"
    stats, recipe = folder / "stats.safetensors", folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    common = ["--allow-pickle", "--module", MODULE]
    images = ["--images", shared / "data" / "cifar10_calib_600.npz"]
    command("calibrate", model, "--for", recipe, *images, "-o", stats, *common)

    def made(name: str, *words: str) -> dict[str, Any]:
        """The report of a run."""
        out = folder / name
        command("run", model, "-o", out, "--stats", stats, *common, *words)
        return json.loads((out / "report.json").read_text())

    def judged(name: str) -> dict[str, Any]:
        """The evaluation of its output."""
        test = ["--images", shared / "data" / "cifar10_test_2000.npz"]
        return command("eval", folder / name, "--reference", model, *test, *common)["metrics"]

    plain = made("plain", PRUNED, f"{ROUNDED},search=none,signed_scale=false")
    searched = made("searched", PRUNED, ROUNDED)
    repaired = made("repaired", PRUNED, OBS, FACTORS)
    small = made("raw", PRUNED, OBS)
    made("obs", PRUNED, OBS, "recalibrate")
    made("sparse", "prune:sparsity=0.7")
    made("back", "prune:sparsity=0.7", "recalibrate")
    sparse, back, raw, obs, both = map(judged, ("sparse", "back", "raw", "obs", "repaired"))
    ours, searched_error, plain_error = map(output_error, (repaired, searched, plain))
    ratios = (
        f"{ours:.4f}: {ours / searched_error:.3f} of searched, {ours / plain_error:.3f} of plain"
    )
    return [
        Figure("points, 70 % global", -sparse["accuracy_drop"], note=error(sparse)),
        Figure("points, 70 % global, recalibrate", -back["accuracy_drop"], -11, note=error(back)),
        Figure("points, 50 % + 4-bit OBS", -raw["accuracy_drop"], note=error(raw)),
        Figure("points, 50 % + 4-bit OBS, recalibrate", -obs["accuracy_drop"], -2, note=error(obs)),
        Figure("points, 50 % + 4-bit OBS + rank 4", -both["accuracy_drop"], note=error(both)),
        Figure("output error, searched scales / OBS + rank 4", searched_error / ours, 1 / 0.55,
               note=ratios),
        Figure("output error, plain scales / OBS + rank 4", plain_error / ours, 1 / 0.55),
        Figure("output error, searched scales / OBS", searched_error / output_error(small)),
    ]  # fmt: skip


def output_error(report: dict[str, Any]) -> float:
    """Mean over layers of the relative error of their outputs, on held-out images."""
    return statistics.mean(
        r["output_error"] for r in report["tensors"] if r["output_error"] is not None
    )


def error(metrics: dict[str, Any]) -> str:
    """What is said beside points."""
    return f"+- {metrics['accuracy_drop_error']:.2f}, accuracy {metrics['accuracy']:.2f}"


def command(*words: Any) -> Any:
    """What `compress WORDS --json` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "compress", *map(str, words), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
