"""Products with stored values, dense and sparse, beside torch's bf16 linear and MKL's CSR.

    python bench/products_sparse.py [--rounds 15] [--threads 1,2] [--batch 1] [--small] [--json F]

All rows of a table run interleaved in one process, each once a round; the median and the fastest of
the rounds are shown. Every row rotates over at least 150 MB of weights of its own, so that none
finds them in a cache. x and y are float32 (bfloat16 for torch's bf16 linear); CSR has float32
values and int32 indices. `GB/s` counts the bytes of the weights as that row stores them. A goal is
a ratio of two rows of one table; only such ratios mean something on a shared machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from goals import Figure, save, show
from rich.console import Console
from rich.table import Table

from compress.kernels import backend
from compress.kernels.packing import Segment, pack_linear
from compress.kernels.products import dense_linear, linear
from compress.kernels.segments import bitmask_segment

BF16 = np.dtype(ml_dtypes.bfloat16)
ROTATED = 150e6
SPARSITIES = (50, 70, 80, 90)
GROUP = 128
# (row, what it is compared with, at least so many times as fast)
GOALS = [
    ("bitmask bf16 50 %", "MKL CSR 50 %", 2.0),
    ("bitmask bf16 50 %", "own dense bf16", 1.0),
    ("bitmask bf16 70 %", "own dense bf16", 1.25),
    ("own dense bf16", "torch bf16 linear", 1.0),
]

Call = Callable[[], Any]


class Row:
    """One way to multiply, with enough copies of its weights."""

    def __init__(self, name: str, weights: Any, size: int, call: Callable[[Any], Any]) -> None:
        copies = max(1, -(-int(ROTATED) // size))
        self.name, self.size = name, size
        self.copies = itertools.cycle([weights] + [copy_of(weights) for _ in range(copies - 1)])
        self.call = call
        self.seconds: list[float] = []

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def run(self, keep: bool) -> None:
        """One product with the next copy."""
        weights = next(self.copies)
        start = time.perf_counter()
        self.call(weights)
        if keep:
            self.seconds.append(time.perf_counter() - start)


def copy_of(weights: Any) -> Any:
    return weights.clone() if isinstance(weights, torch.Tensor) else weights.copy()


def sparse_segments(values: np.ndarray, percent: int) -> tuple[np.ndarray, Segment, Segment]:
    """The mask, and its entries as bf16 and int8 segments."""
    rows, columns = values.shape
    mask = np.random.default_rng(percent).random(values.shape, dtype=np.float32) * 100 >= percent
    bits = np.packbits(mask, axis=1, bitorder="little")
    kept = values[mask]
    groups = -(-columns // GROUP)
    scale = np.full((rows, groups), 0.01, np.float16)
    codes = np.rint(kept.astype(np.float32) * 40).clip(-127, 127).astype(np.int8)
    return (
        mask,
        bitmask_segment(bits, kept, columns),
        bitmask_segment(bits, codes, columns, scale=scale, group_size=GROUP),
    )


def make_rows(rows: int, columns: int, batch: int) -> list[Row]:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((rows, columns), dtype=np.float32).astype(BF16)
    x = rng.standard_normal((batch, columns), dtype=np.float32)
    y = np.zeros((batch, rows), np.float32)
    threads = torch.get_num_threads
    torch_x = torch.from_numpy(x)
    torch_bf16 = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    bf16_x, flat = torch_x.bfloat16(), torch_x[0] if batch == 1 else torch_x.T.contiguous()
    table = [
        Row(
            "own dense bf16",
            values,
            values.nbytes,
            lambda w: dense_linear(x, w, y, threads=threads()),
        ),
        Row(
            "torch bf16 linear",
            torch_bf16,
            values.nbytes,
            lambda w: torch.nn.functional.linear(bf16_x, w),
        ),
    ]
    for percent in SPARSITIES:
        mask, bf16, int8 = sparse_segments(values, percent)
        for name, segment in (("bf16", bf16), ("int8", int8)):
            packed = pack_linear(rows, columns, [segment])
            table.append(
                Row(
                    f"bitmask {name} {percent} %",
                    packed,
                    packed.nbytes,
                    lambda w: linear(x, w, y, threads=threads()),
                )
            )
        table.append(csr_row(values, mask, percent, flat))
    return table


def csr_row(values: np.ndarray, mask: np.ndarray, percent: int, x: torch.Tensor) -> Row:
    starts = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int32)
    columns = np.nonzero(mask)[1].astype(np.int32)
    csr = torch.sparse_csr_tensor(
        torch.from_numpy(starts),
        torch.from_numpy(columns),
        torch.from_numpy(values[mask].astype(np.float32)),
        size=values.shape,
    )
    size = starts.nbytes + 2 * columns.nbytes
    return Row(f"MKL CSR {percent} %", csr, size, lambda w: w @ x)


def measure(table: list[Row], rounds: int) -> None:
    for turn in range(rounds + 1):
        for row in table:
            if not turn:
                row.seconds.clear()
            row.run(keep=turn > 0)


def print_rows(title: str, table: list[Row]) -> None:
    columns = ("row", "ms", "fastest", "MB", "GB/s", "x own dense", "x torch bf16", "x MKL CSR")
    out = Table(*columns, title=title, title_justify="left")
    by_name = {row.name: row for row in table}
    for row in table:
        csr = f"MKL CSR {row.name.split(' ', 2)[-1]}"
        ratios = []
        for other in ("own dense bf16", "torch bf16 linear", csr):
            found = by_name.get(other)
            ratios.append(f"{found.median / row.median:.2f}" if found else "")
        times = (f"{row.median * 1e3:.2f}", f"{min(row.seconds) * 1e3:.2f}")
        rate = f"{row.size / row.median / 1e9:.1f}"
        out.add_row(row.name, *times, f"{row.size / 1e6:.0f}", rate, *ratios)
    Console(width=110).print(out)


def figures(table: list[Row], batch: int) -> list[Figure]:
    """The goals are for one row of activations; of larger batches only the ratios are shown."""
    rows = {row.name: row for row in table}
    found = []
    for name, other, goal in GOALS:
        ratio = rows[other].median / rows[name].median
        fastest = min(rows[other].seconds) / min(rows[name].seconds)
        note = f"fastest rounds: {fastest:.2f}"
        found.append(Figure(f"{name} / {other}", ratio, goal if batch == 1 else None, note=note))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--shapes", default="4096x4096,4096x14336")
    parser.add_argument("--small", action="store_true", help="512 rows, to try the script")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    for shape in options.shapes.split(","):
        rows, columns = (int(n) for n in shape.split("x"))
        table = make_rows(512 if options.small else rows, columns, options.batch)
        for threads in (int(n) for n in options.threads.split(",")):
            torch.set_num_threads(threads)
            measure(table, options.rounds)
            title = f"stored values, {shape}, batch {options.batch}, {threads} thread(s)"
            print_rows(f"{title}, {backend().isa}", table)
            found = figures(table, options.batch)
            show(title, found)
            if options.json:
                save(options.json, title, found)


if __name__ == "__main__":
    main()
