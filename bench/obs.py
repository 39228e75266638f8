"""The OBS sweep beside GPTQ's published algorithm in torch: seconds and the error they leave.

    python bench/obs.py [--side 4096] [--rounds 3] [--threads 0] [--json FILE]

One matrix [side, side] of normal weights, 4 bits, groups of 128, symmetric; the Hessian of 2 x side
inputs that share side / 4 directions. Candidates run interleaved in one process, the whole of each
with its linear algebra, and medians are shown: wall time, and processor time, which other programs
on the machine disturb less. The error is tr(dW H dW^T) / tr(W H W^T). GPTQ as published (Frantar et
al., arXiv:2210.17323) is written out below: cholesky, inverse, cholesky, blocks of 128, one update
of everything behind a block. `--threads` is for torch and for the sweep's rows; 0 leaves torch's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import goals
import numpy as np
import torch
from goals import Figure
from kernels import show
from rich.console import Console

from compress.kernels import dispatch
from compress.passes.base import CodesSpec
from compress.solvers.group_quantizer import quantize_matrix
from compress.solvers.obs_sweep import obs_sweep
from compress.solvers.triangular import inverse_factor

BITS, GROUP, BLOCK, DAMPING = 4, 128, 128, 0.01
BASELINE = "GPTQ in torch"
TITLE = "The OBS sweep"


def problem(side: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((side, side), dtype=np.float32) * np.float32(0.02)
    rank = max(1, side // 4)
    inputs = rng.standard_normal((2 * side, rank), dtype=np.float32)
    inputs = inputs @ rng.standard_normal((rank, side), dtype=np.float32) / np.sqrt(rank)
    inputs += 0.3 * rng.standard_normal(inputs.shape, dtype=np.float32)
    hessian = inputs.T @ inputs / len(inputs)
    return weights, hessian.astype(np.float32)


def inverse_root(hessian: torch.Tensor) -> torch.Tensor:
    """The published chain: the upper Cholesky factor of the damped Hessian's inverse."""
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def gptq(weights: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Decoded weights by the published loop; scales by absmax when a group is reached."""
    work, upper = weights.clone(), inverse_root(hessian)
    decoded = torch.zeros_like(work)
    half = 1 << (BITS - 1)
    for start in range(0, work.shape[1], BLOCK):
        stop = min(start + BLOCK, work.shape[1])
        block, root = work[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.zeros_like(block)
        for i in range(stop - start):
            column = block[:, i]
            if (start + i) % GROUP == 0:
                group = block[:, i : i + GROUP]
                scale = (group.abs().amax(1) / (half - 1)).half().float()
            value = torch.clamp(torch.round(column / scale), -half, half - 1) * scale
            decoded[:, start + i] = value
            error = (column - value) / root[i, i]
            block[:, i:] -= error.unsqueeze(1) @ root[i, i:].unsqueeze(0)
            errors[:, i] = error
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return decoded


def relative_error(weights: np.ndarray, decoded: np.ndarray, hessian: np.ndarray) -> float:
    difference = weights - decoded

    def weighed(matrix: np.ndarray) -> float:
        return float(np.vdot((matrix @ hessian).astype(np.float64), matrix.astype(np.float64)))

    return weighed(difference) / weighed(weights)


def measured(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median (wall, processor) seconds of each call, interleaved."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            wall, processor = time.perf_counter(), time.process_time()
            call()
            taken = (time.perf_counter() - wall, time.process_time() - processor)
            seconds[name].append(taken)
    return {
        name: (statistics.median(w for w, _ in v), statistics.median(p for _, p in v))
        for name, v in seconds.items()
    }


def rows(side: int, rounds: int, workers: int) -> list[dict[str, Any]]:
    weights, hessian = problem(side)
    spec = CodesSpec(BITS, GROUP, True, "F16")
    tensors = torch.from_numpy(weights), torch.from_numpy(hessian)
    found: dict[str, np.ndarray] = {}

    def sweep(name: str, **options: Any) -> Callable[[], None]:
        def call() -> None:
            swept = obs_sweep(weights, hessian, spec, damping=DAMPING, workers=workers, **options)
            found[name] = swept.codes.dequantize()

        return call

    def baseline() -> None:
        found[BASELINE] = gptq(*tensors).numpy()

    calls: dict[str, Callable[[], Any]] = {
        BASELINE: baseline,
        "of it: cholesky, inverse, cholesky": lambda: inverse_root(tensors[1]),
        "sweep, plain scales": sweep("sweep, plain scales", search="none"),
        "sweep, searched scales": sweep("sweep, searched scales"),
        "sweep, searched, activation order": sweep(
            "sweep, searched, activation order", act_order=True
        ),
        "of it: the inverse's factor": lambda: inverse_factor(hessian, damping=DAMPING),
    }
    seconds = measured(calls, rounds)
    errors = {name: relative_error(weights, value, hessian) for name, value in found.items()}
    for search in ("none", "mse"):
        rounded, _ = quantize_matrix(weights, None, spec, search=search)
        errors[f"rounding, search={search}"] = relative_error(
            weights, rounded.dequantize(), hessian
        )
    return [
        {
            "candidate": name,
            **(
                {
                    "seconds": seconds[name][0],
                    "processor seconds": seconds[name][1],
                    "times as fast": seconds[BASELINE][0] / seconds[name][0],
                    "by processor": seconds[BASELINE][1] / seconds[name][1],
                }
                if name in seconds
                else {}
            ),
            **({"error": errors[name]} if name in errors else {}),
        }
        for name in [*calls, *(name for name in errors if name not in calls)]
    ]


def figures(table: list[dict[str, Any]]) -> list[Figure]:
    """The sweep against GPTQ in torch: its time, at an error that is no higher."""
    by = {row["candidate"]: row for row in table}
    plain, theirs = by["sweep, plain scales"], by[BASELINE]
    ratio = theirs["error"] / plain["error"]
    return [
        Figure("OBS sweep, plain / GPTQ in torch, time", plain["times as fast"], 1.5),
        Figure("GPTQ in torch / OBS sweep, plain, error", ratio, 0.999),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    workers = torch.get_num_threads()
    backend = dispatch.current().backend
    console = Console(width=130)
    console.print(f"backend {backend.name}, {backend.isa}; {workers} threads")
    table = rows(options.side, options.rounds, workers)
    show(console, f"One matrix, {options.side} x {options.side}", table)
    found = figures(table)
    goals.show(TITLE, found)
    if options.json:
        goals.save(options.json, TITLE, found)


if __name__ == "__main__":
    main()
