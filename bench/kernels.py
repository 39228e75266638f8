"""Speed of the kernels as ratios to what they replace or to the memory they read, one thread.

    python bench/kernels.py [--json FILE] [--rounds 5] [--small] [--ggml libggml-base.so]

Rows of one table run interleaved in one process (each once a round); the median of the rounds is
shown. Only ratios inside one run mean something. The process is bound to one processor before
onnxruntime and torch start their threads, so that both have one, too. The matrix has 4096 x 14336
weights (117 MB in bf16, 235 MB in float32, 58 MB of codes); bf16 inputs alternate between two
copies, so that no run finds its input in the cache. torch.nn.utils.prune.global_unstructured runs
once on 1e8 weights (it takes ten seconds and 5 GB); `--small` divides every size by 16. `--ggml`
names a build of ggml, whose Q4_0 quantizer (float32 in, blocks of 32) then runs beside ours.
Quantizers and memory are timed by the processor's time as well: on a shared machine the wall clock
also counts what other programs took.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import goals
import ml_dtypes
import numpy as np
from goals import Figure
from rich.console import Console
from rich.table import Table

from compress import kernels
from compress.kernels import dispatch

Call = Callable[[], Any]
GROUP = 128
TILE_ROWS = 128  # fewer rows keep codes nearer, more rows cost fewer calls
TITLE = "Quantizers and masks"
LEFT = ("kernel", "candidate", "ratio to")


class Seconds(NamedTuple):
    """Medians of a call: what passed, and what the processor spent on it."""

    wall: float
    processor: float


def medians(calls: dict[str, Call], rounds: int) -> dict[str, Seconds]:
    """Seconds of each call, interleaved, one warm-up round."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            wall, processor = time.perf_counter(), time.process_time()
            call()
            if turn:
                taken = Seconds(time.perf_counter() - wall, time.process_time() - processor)
                seconds[name].append(taken)
    return {
        name: Seconds(
            statistics.median(s.wall for s in values),
            statistics.median(s.processor for s in values),
        )
        for name, values in seconds.items()
    }


def weights(rows: int, columns: int) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    return values * np.float32(0.02)


class Quantizer:
    """Tiled quantize_groups and pack_bits over a matrix, or the packing inside the first."""

    def __init__(self, copies: list[np.ndarray]) -> None:
        self.copies = itertools.cycle(copies)
        rows, columns = copies[0].shape
        self.rows = rows
        self.codes = np.zeros((TILE_ROWS, columns), np.uint8)
        self.packed = np.zeros((rows, columns // 2), np.uint8)
        self.scale = np.zeros((rows, columns // GROUP), np.float16)
        self.zero = np.zeros((rows, columns // GROUP), np.uint8)
        self.sums = np.zeros((rows, 3))

    def run(
        self,
        search: str,
        symmetric: bool,
        mask: np.ndarray | None = None,
        *,
        packed: bool = False,
    ) -> None:
        """Codes, scales and packed codes of the next copy."""
        w = next(self.copies)
        for row in range(0, self.rows, TILE_ROWS):
            block = slice(row, row + TILE_ROWS)
            kernels.quantize_groups(
                w[block],
                None if mask is None else mask[block],
                bits=4,
                group_size=GROUP,
                symmetric=symmetric,
                scale_dtype="F16",
                search=search,
                signed_scale=True,
                codes=None if packed else self.codes,
                scale=self.scale[block],
                zero_point=None if symmetric else self.zero[block],
                sums=self.sums[block],
                packed=self.packed[block] if packed else None,
            )
            if not packed:
                kernels.pack_bits(self.codes, 4, self.packed[block])


def onnxruntime_call(w: np.ndarray) -> Call:
    """onnxruntime's quantizer on the float32 [K, N] layout that it wants (transposed for free)."""
    from onnxruntime.capi import _pybind_state

    rows, columns = w.shape
    transposed = np.ascontiguousarray(w.T)
    packed = np.zeros((rows, columns // GROUP, GROUP // 2), np.uint8)
    scale = np.zeros(rows * (columns // GROUP), np.float32)
    zero = np.zeros(rows * ((columns // GROUP + 1) // 2), np.uint8)

    def call() -> None:
        _pybind_state.quantize_matmul_4bits(
            packed, transposed, scale, zero, GROUP, rows, columns, True
        )

    return call


def ggml_call(library: str, w: np.ndarray) -> Call:
    """ggml's own Q4_0 quantizer."""
    quantize = ctypes.CDLL(library).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    number, pointer, integer = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [number, pointer, pointer, integer, integer, integer, pointer]
    blocks = np.zeros(w.size // 32 * 18, np.uint8)
    q4_0 = 2
    return lambda: quantize(q4_0, w.ctypes.data, blocks.ctypes.data, 0, *w.shape, None)


def quantize_rows(
    shape: tuple[int, int], rounds: int, ggml: str | None = None
) -> list[dict[str, Any]]:
    w = weights(*shape)
    narrow = w.astype(ml_dtypes.bfloat16)
    quantizer = Quantizer([narrow, narrow.copy()])
    mask = np.random.default_rng(1).random(shape) < 0.5
    baseline = "onnxruntime quantize_matmul_4bits"
    calls: dict[str, Call] = {
        baseline: onnxruntime_call(w),
        **({"ggml Q4_0": ggml_call(ggml, w)} if ggml else {}),
        "read bf16 (finite_index)": lambda: kernels.finite_index(next(quantizer.copies)),
        "int4 symmetric": lambda: quantizer.run("none", True),
        "int4 symmetric, packed at once": lambda: quantizer.run("none", True, packed=True),
        "int4 symmetric, half pruned": lambda: quantizer.run("none", True, mask),
        "int4 asymmetric": lambda: quantizer.run("none", False),
        "int4 symmetric, searched": lambda: quantizer.run("mse", True),
        "int4 symmetric, searched, half pruned": lambda: quantizer.run("mse", True, mask),
        "int4 asymmetric, searched": lambda: quantizer.run("mse", False),
    }
    seconds = medians(calls, rounds)
    return [
        {
            "kernel": name,
            "ms": 1e3 * value.wall,
            "processor ms": 1e3 * value.processor,
            "Gweights/s": w.size / value.processor / 1e9,
            "ratio": seconds[baseline].wall / value.wall,
            "by processor": seconds[baseline].processor / value.processor,
            "ratio to": baseline,
        }
        for name, value in seconds.items()
    ]


def memory_rows(shape: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """Kernels bounded by memory, as bytes read and written against a read-only sweep."""
    wide = weights(*shape)
    narrow = wide.astype(ml_dtypes.bfloat16)
    both = itertools.cycle([narrow, narrow.copy()])
    rows, columns = shape
    counts, low = np.zeros(1 << 15, np.uint64), np.zeros(1 << 16, np.uint64)
    mask = np.zeros(shape, bool)
    chosen = np.random.default_rng(1).random(shape) < 0.5
    kept = np.zeros(int(chosen.sum()), np.uint16)
    bits = np.zeros((rows, columns // 8), np.uint8)
    expanded = np.zeros(shape, np.uint16)
    codes = np.random.default_rng(2).integers(0, 16, shape, dtype=np.uint8)
    packed = np.zeros((rows, columns // 2), np.uint8)
    scale = np.ones((rows, columns // GROUP), np.float32)
    decoded = np.zeros(shape, np.float32)
    sums = np.zeros(2)
    n = wide.size
    baseline = "read float32 (finite_index)"
    calls: dict[str, tuple[Call, float]] = {
        baseline: (lambda: kernels.finite_index(wide), 4),
        "read bf16 (finite_index)": (lambda: kernels.finite_index(next(both)), 2),
        "magnitude_histogram bf16": (lambda: kernels.magnitude_histogram(next(both), counts), 2),
        "magnitude_histogram float32": (lambda: kernels.magnitude_histogram(wide, counts), 4),
        "magnitude_histogram_low float32": (
            lambda: kernels.magnitude_histogram_low(wide, 0x3C80, low),
            4,
        ),
        "threshold_mask bf16": (lambda: kernels.threshold_mask(next(both), 0x3C80, 9, mask), 3),
        "threshold_mask float32": (lambda: kernels.threshold_mask(wide, 0x3C800000, 9, mask), 5),
        "pack_bits 4": (lambda: kernels.pack_bits(codes, 4, packed), 1.5),
        "unpack_bits 4": (lambda: kernels.unpack_bits(packed, 4, codes), 1.5),
        "dequantize": (lambda: kernels.dequantize(codes, scale, None, 4, GROUP, decoded), 5),
        "bitmask_compress bf16 50 %": (
            lambda: kernels.bitmask_compress(expanded, chosen, bits, kept),
            4.125,
        ),
        "bitmask_expand bf16 50 %": (
            lambda: kernels.bitmask_expand(bits, kept, 0, expanded),
            3.125,
        ),
        "error_sums bf16": (lambda: kernels.error_sums(next(both), decoded, sums), 6),
    }
    kernels.bitmask_compress(expanded, chosen, bits, kept)
    seconds = medians({name: call for name, (call, _) in calls.items()}, rounds)
    speed = {name: n * calls[name][1] / s.processor / 1e9 for name, s in seconds.items()}
    return [
        {
            "kernel": name,
            "ms": 1e3 * value.wall,
            "processor ms": 1e3 * value.processor,
            "GB/s": speed[name],
            "ratio": speed[name] / speed[baseline],
            "ratio to": "read-only sweep",
        }
        for name, value in seconds.items()
    ]


def pruning_rows(n: int, rounds: int) -> list[dict[str, Any]]:
    """Exact global 50 % threshold and mask, against torch's, on float32 weights."""
    import torch
    from torch.nn.utils import prune

    torch.set_num_threads(1)
    w = weights(1, n).reshape(-1)
    mask = np.zeros(n, bool)

    def select() -> None:
        keep = n // 2
        counts, low = np.zeros(1 << 15, np.uint64), np.zeros(1 << 16, np.uint64)
        kernels.magnitude_histogram(w, counts)
        prefix, above = cut(counts, keep)
        kernels.magnitude_histogram_low(w, prefix, low)
        tail, above_low = cut(low, keep - above)
        kernels.threshold_mask(w, prefix << 16 | tail, keep - above - above_low, mask)

    ours = medians({"select": select}, rounds)["select"].wall
    assert mask.sum() == n // 2
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.from_numpy(w))
    start = time.perf_counter()
    prune.global_unstructured([(module, "weight")], prune.L1Unstructured, amount=0.5)
    theirs = time.perf_counter() - start
    name = "torch global_unstructured (once)"
    return [
        {"kernel": name, "ms": 1e3 * theirs, "ratio": 1.0, "ratio to": name},
        {
            "kernel": "histograms + threshold_mask",
            "ms": 1e3 * ours,
            "ratio": theirs / ours,
            "ratio to": name,
        },
    ]


def cut(counts: np.ndarray, keep: int) -> tuple[int, int]:
    """The bin of the keep-th largest entry, and how many lie above it."""
    above = np.cumsum(counts[::-1])
    position = int(np.searchsorted(above, keep))
    return counts.size - 1 - position, int(above[position - 1]) if position else 0


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if column in LEFT else "right")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        table.add_row(*(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells))
    console.print(table)


def figures(
    quantizers: list[dict[str, Any]], memory: list[dict[str, Any]], pruning: list[dict[str, Any]]
) -> list[Figure]:
    """The goals. By processor time where a neighbour's work would show in the clock's."""
    by = {row["kernel"]: row for row in quantizers}
    reading = by["read bf16 (finite_index)"]["processor ms"]
    speeds = {row["kernel"]: row["GB/s"] for row in memory}
    found = []
    for name, what in (
        ("int4 symmetric", "packed after"),
        ("int4 symmetric, packed at once", "at once"),
    ):
        row = by[name]
        found += [
            Figure(f"int4 plain, {what} / onnxruntime's quantizer", row["by processor"], 25),
            Figure(
                f"int4 plain, {what}, share of reading", reading / row["processor ms"], 0.25, 0.5
            ),
        ]
        if "ggml Q4_0" in by:
            ratio = by["ggml Q4_0"]["processor ms"] / row["processor ms"]
            found.append(Figure(f"int4 plain, {what} / ggml Q4_0", ratio, 3))
    searched = by["int4 symmetric, searched"]["by processor"]
    return [
        *found,
        Figure("int4 searched / onnxruntime's plain quantizer", searched, 3),
        Figure("bf16 histogram, GB/s a thread", speeds["magnitude_histogram bf16"], 5, 10),
        Figure("threshold and mask / torch global_unstructured", pruning[-1]["ratio"], 150),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ggml", help="a build of ggml: the path of libggml-base.so")
    parser.add_argument("--small", action="store_true", help="a sixteenth of every size")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    divisor = 16 if options.small else 1
    shape = (4096 // divisor, 14336)
    backend = dispatch.current().backend
    console = Console(width=140)
    console.print(f"backend {backend.name}, {backend.isa} ({backend.reason})")
    tables = {
        "Quantizers, packed output included": quantize_rows(shape, options.rounds, options.ggml),
        "Bounded by memory": memory_rows(shape, options.rounds),
        "Global magnitude pruning": pruning_rows(10**8 // divisor, options.rounds),
    }
    for title, rows in tables.items():
        show(console, title, rows)
    found = figures(*tables.values())
    goals.show(TITLE, found)
    if options.json:
        goals.save(options.json, TITLE, found)


if __name__ == "__main__":
    main()
