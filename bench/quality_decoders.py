"""Quality of low-rank repair and of mixed widths on a small decoder, as ratios inside one run.

    COMPRESS_SHARED=DIR python bench/quality_decoders.py [--json FILE]

stories260k of that folder, calibrated on one text and measured on another: KL divergence of
the decoded weights' predictions from the source's, a document a sample. All linear weights of the
blocks, groups of 32 with a short last one, native format. "Plain rounding" has the same width and
groups, scales from the range. "Uniform" is the tool's own rounding to one width; a mixed budget has
the uniform result's bytes, scales counted, or (3.50 bits) the mean of those of 3 and 4 bits.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from goals import Figure, save, show

from compress.calibrate.calibrate import Settings, calibrate
from compress.calibrate.data import text_ids
from compress.calibrate.statistics import Statistics, open_statistics
from compress.checkpoint import open_checkpoint
from compress.evaluate.divergence import Source
from compress.plan import Options, Plan, make_plan
from compress.recipe import Output, Recipe, parse_pass
from compress.survey import decide_all
from compress.trial import TrialCheckpoint

TITLE = "Decoder quality: stories260k, KL divergence from the source"
ROUND = "quantize:group=32,on_indivisible=short"
REPAIR = "low-rank:rank=8,metric=full,alternate=5,needs_adapter=true"
SVD = "low-rank:rank=8"
LENGTH = 512


class Bench:
    """One model, its statistics, and the text that is evaluated on."""

    def __init__(self, shared: Path, folder: Path) -> None:
        self.model = open_checkpoint(shared / "models" / "stories260k")
        calibration, evaluation = (
            text_ids(shared / "data" / name, self.model, length=LENGTH, documents=True)
            for name in ("stories_calib.txt", "stories_eval.txt")
        )
        recipe = _recipe(f"{ROUND},bpw=8,solver=obs", REPAIR)
        wants = make_plan(self.model, recipe, Options(), calibrated=True)
        calibrate(wants, calibration, folder / "statistics.safetensors", Settings())
        self.statistics: Statistics = open_statistics(folder / "statistics.safetensors")
        self._source = Source(self.model, evaluation.arrays["input_ids"])
        self.tokens = evaluation.tokens

    def plan(self, *words: str) -> Plan:
        """The decided plan of a chain."""
        plan = make_plan(self.model, _recipe(*words), Options(), self.statistics)
        return decide_all(plan, lambda *_: None)

    def kl(self, plan: Plan) -> float:
        """Nats per token."""
        started = time.perf_counter()
        found = self._source.kl_to(TrialCheckpoint(plan))
        what = " ".join(p.name for p in plan.passes)
        print(
            f"  {what}: {bits_of(plan):.3f} bits, {found:.4f} nats,"
            f" {time.perf_counter() - started:.1f} s",
            flush=True,
        )
        return found


def _recipe(*words: str) -> Recipe:
    return Recipe(tuple(parse_pass(word) for word in words), output=Output("native"))


def bits_of(plan: Plan) -> float:
    """Bits per weight of the targets, all that is stored for them."""
    last = len(plan.passes) - 1
    sizes = plan.outlook(last).tensor_bytes(plan.passes[last])
    return 8 * sum(high for _, high in sizes.values()) / sum(i.size for i in plan.members[last])


def measure(bench: Bench) -> list[Figure]:
    """Every figure."""
    plain = {b: bench.kl(bench.plan(f"{ROUND},bits={b},search=none")) for b in (3, 4)}
    figures = []
    for bits, goal in ((4, 0.29), (3, 0.23)):
        for what, repair, bound in (
            ("alternated, outputs", REPAIR, goal),
            ("error-SVD", SVD, None),
        ):
            kl = bench.kl(bench.plan(f"{ROUND},bits={bits}", repair))
            figures.append(
                Figure(
                    f"{bits} bits, rank 8, {what} / plain rounding",
                    kl / plain[bits],
                    bound,
                    at_most=True,
                )
            )
    for solver in ("round", "obs"):
        figures += _mixed(bench, solver)
    return figures


def _mixed(bench: Bench, solver: str) -> list[Figure]:
    word = f"{ROUND},solver={solver}"
    uniform = {b: bench.plan(f"{word},bits={b}") for b in (3, 4)}
    kl = {b: bench.kl(plan) for b, plan in uniform.items()}
    size = {b: bits_of(plan) for b, plan in uniform.items()}
    figures = []
    for what, options, goal in (
        ("fused sets, groups 32", "", 0.90),
        ("fused sets, groups 16 to 64", ",groups=[16,32,64]", 0.90),
        ("tensors, groups 32", ",fuse=false", 0.90),
        ("weights alone, groups 32", ",sensitivity=weights", None),
    ):
        plan = bench.plan(f"{word},bpw={size[4] + 1e-9:.9f}{options}")
        if bits_of(plan) > size[4] + 1e-6:
            raise SystemExit(f"{bits_of(plan)} bits are above the budget of {size[4]}")
        figures.append(
            Figure(
                f"{solver}: mixed 4.00 bits, {what} / uniform",
                bench.kl(plan) / kl[4],
                goal,
                at_most=True,
            )
        )
    half = bench.kl(bench.plan(f"{word},bpw={(size[3] + size[4]) / 2:.9f}"))
    place = (half - kl[4]) / (kl[3] - kl[4])
    figures.append(
        Figure(
            f"{solver}: mixed 3.50 bits, from 4 bits (0) to 3 bits (1)",
            place if place > 0 else float("inf"),
            0.999,
            at_most=True,
            note="strictly between",
        )
    )
    return figures


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are too small to share
    with tempfile.TemporaryDirectory() as folder:
        shared = os.environ.get("COMPRESS_SHARED", Path(__file__).resolve().parents[2] / "shared")
        bench = Bench(Path(shared), Path(folder))
        print(f"{bench.tokens:,} tokens")
        figures = measure(bench)
    show(TITLE, figures)
    if arguments.json:
        save(arguments.json, TITLE, figures)


if __name__ == "__main__":
    main()
