"""Randomized SVD of a quantization residual against exact decompositions.

    python bench/low_rank.py [--rows 4096 --columns 14336 --rank 64 --bits 3] [--full-svd]

The matrix is what `bits`-bit plain rounding (group 128) leaves of a Gaussian matrix: a nearly
flat spectrum, the hard case. The optimum energy comes from the eigenvalues of the Gram matrix.
A full SVD of the default size takes minutes, so without --full-svd its time is estimated from
the same matrix at a quarter of each side (cost grows with rows^2 * columns).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from goals import Figure, save, show

from compress.passes.base import CodesSpec
from compress.solvers.group_quantizer import quantize_matrix
from compress.solvers.randomized_svd import truncated_svd

TITLE = "Low-rank factors"


def main() -> None:
    """Print times, ratios and the share of the optimal energy."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=4096)
    options.add_argument("--columns", type=int, default=14336)
    options.add_argument("--rank", type=int, default=64)
    options.add_argument("--bits", type=int, default=3)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--full-svd", action="store_true", help="time the full SVD itself")
    options.add_argument("--json", type=Path, help="add the figures to this file")
    arguments = options.parse_args()
    matrix = residual(arguments.rows, arguments.columns, arguments.bits)
    rank = arguments.rank
    truncated_svd(matrix[:, :128], 1)  # start the BLAS threads

    times, passes, energy = [], 0, 0.0
    for repeat in range(arguments.repeats):
        started = time.perf_counter()
        found = truncated_svd(matrix, rank, seed=repeat, name="bench")
        times.append(time.perf_counter() - started)
        passes, energy = found.passes, found.energy
    ours = statistics.median(times)

    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram_seconds, values = timed(lambda: np.linalg.eigh(short @ short.T)[0])
    optimum = float(values[::-1][:rank].sum(dtype=np.float64))
    if arguments.full_svd:
        full_seconds, _ = timed(lambda: np.linalg.svd(matrix, full_matrices=False))
        note = "measured"
    else:
        small = np.ascontiguousarray(matrix[::4, : matrix.shape[1] // 4])
        full_seconds = 64 * timed(lambda: np.linalg.svd(small, full_matrices=False))[0]
        note = "64 x a quarter-sided one"

    total = float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64))
    print(f"{matrix.shape[0]} x {matrix.shape[1]}, {arguments.bits}-bit residual, rank {rank}")
    print(
        f"block Lanczos      {ours:8.2f} s   {passes} passes, "
        f"{energy / optimum:.4f} of the optimal energy ({optimum / total:.4f} of the residual's)"
    )
    print(f"Gram + eigh        {gram_seconds:8.2f} s   {gram_seconds / ours:5.1f} x")
    print(f"full SVD           {full_seconds:8.2f} s   {full_seconds / ours:5.1f} x   ({note})")
    figures = [
        Figure(f"rank-{rank} factors / full SVD", full_seconds / ours, 35, None, note),
        Figure("share of the optimal energy", energy / optimum, 0.95),
    ]
    show(TITLE, figures)
    if arguments.json:
        save(arguments.json, TITLE, figures)


def residual(rows: int, columns: int, bits: int) -> Any:
    """What plain rounding leaves of a Gaussian matrix, float32 [rows, columns]."""
    weights = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    weights *= np.float32(0.02)
    group = 128 if columns % 128 == 0 else columns
    codes, _ = quantize_matrix(weights, None, CodesSpec(bits, group, True, "F16"), search="none")
    weights -= codes.dequantize()
    return weights


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
