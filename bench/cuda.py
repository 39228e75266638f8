"""The CUDA kernels beside cuBLAS float16 and beside the copy bandwidth of the same device.

    python bench/cuda.py [--rounds 20] [--json FILE]

Weights: as many distinct copies as fill more than twice the L2 cache, used in turn. Products run
from CUDA graphs of one pass over all copies, so that no launch is waited for; kernels that return a
number (and therefore wait) are timed with that wait. Times are medians of `--rounds` by CUDA
events, the candidates of a row interleaved. "of copy" is the rate of the bytes that the kernel has
to read and write, as a share of a device-to-device copy's. Where there is no device it says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from compress.kernels import cuda, cuda_products

DEVICE = "cuda"
GROUP, RANK = 128, 64
SHAPES = [(4096, 14_336), (14_336, 4096)]  # rows, columns
BATCHES = [1, 2, 4, 8, 16, 32, 64]
Call = Callable[[], Any]


class Timer:
    """Times callables by events on the current stream."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def medians(self, calls: dict[str, Call]) -> dict[str, float]:
        """Seconds of each, interleaved, two warm-up rounds."""
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(self.rounds + 2):
            for name, call in calls.items():
                begin = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                begin.record()
                call()
                end.record()
                end.synchronize()
                if turn >= 2:
                    seconds[name].append(begin.elapsed_time(end) / 1e3)
        return {name: statistics.median(values) for name, values in seconds.items()}


def graph_of(call: Call) -> Call:
    """`call` captured once; what comes back replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # what is set up at a first call must not happen while capturing
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copies_for(size: int, cache: int) -> int:
    """How many weights of `size` bytes fill more than twice the cache (at least three)."""
    return max(3, 2 * cache // size + 1)


def random_words(*shape: int) -> torch.Tensor:
    """int32 with random bits."""
    return torch.randint(-(1 << 31), (1 << 31) - 1, shape, dtype=torch.int32, device=DEVICE)


def copy_rate(timer: Timer) -> float:
    """Bytes a second, read plus written, of a copy of 1 GiB."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    seconds = timer.medians({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.numel() / seconds


class Products:
    """Rows of the table of products for one shape."""

    def __init__(self, timer: Timer, cache: int, rate: float, rows: int, columns: int) -> None:
        self.timer, self.rate, self.rows, self.columns = timer, rate, rows, columns
        self.cache = cache
        dense = copies_for(2 * rows * columns, cache)
        self.dense = [self._half(rows, columns) for _ in range(dense)]

    def _half(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.float16)

    def _sum(self, batch: int, size: int, calls: list[Call], name: str) -> dict[str, Any]:
        """One row: ours over all copies beside torch.matmul over its own."""
        x = self._half(batch, self.columns)

        def blas() -> None:
            for w in self.dense:
                torch.matmul(x, w.T)

        def ours() -> None:
            for call in calls:
                call()

        taken = self.timer.medians({"ours": graph_of(ours), "blas": graph_of(blas)})
        seconds, blas_seconds = taken["ours"] / len(calls), taken["blas"] / len(self.dense)
        moved = size + 2 * batch * (self.rows + self.columns)
        return {
            "kernel": name,
            "shape": f"{self.rows} x {self.columns}",
            "batch": batch,
            "us": seconds * 1e6,
            "GB/s": moved / seconds / 1e9,
            "of copy": moved / seconds / self.rate,
            "cuBLAS us": blas_seconds * 1e6,
            "x cuBLAS": blas_seconds / seconds,
        }

    def codes(self, bits: int, batch: int, *, low_rank: bool = False) -> dict[str, Any]:
        """Group-quantized weights of `bits` bits, with or without a low-rank term."""
        rows, columns = self.rows, self.columns
        words = columns * bits // 32
        size = 4 * rows * words + 2 * rows * (columns // GROUP)
        count = copies_for(size, self.cache)
        packed = [random_words(rows, words) for _ in range(count)]
        scale = [self._half(rows, columns // GROUP) for _ in range(count)]
        x = self._half(batch, columns)
        factors = (self._half(rows, RANK), self._half(RANK, columns)) if low_rank else None
        if low_rank:
            size += 2 * RANK * (rows + columns)

        def call(k: int) -> Call:
            return lambda: cuda_products.product_codes(
                x, packed[k], scale[k], bits=bits, group_size=GROUP, low_rank=factors
            )

        name = f"int{bits} g{GROUP}" + (f" + rank {RANK}" if low_rank else "")
        return self._sum(batch, size, [call(k) for k in range(count)], name)

    def bitmask(self, density: float, batch: int) -> dict[str, Any]:
        """Bitmask-sparse float16 weights with this share of entries kept."""
        rows, columns = self.rows, self.columns
        count = copies_for(int(rows * columns * (2 * density + 0.125)), self.cache)
        parts = []
        for _ in range(count):
            mask = torch.rand(rows, columns, device=DEVICE) < density
            bits = torch.empty(rows, columns // 8, dtype=torch.uint8, device=DEVICE)
            kept = torch.empty(int(mask.sum()), dtype=torch.float16, device=DEVICE)
            cuda.bitmask_compress(self._half(rows, columns), mask, bits, kept)
            parts.append((bits, kept, cuda.row_offsets(bits, columns)))
        size = sum(t.numel() * t.element_size() for t in parts[0])
        x = self._half(batch, columns)

        def call(k: int) -> Call:
            return lambda: cuda_products.product_bitmask(x, *parts[k])

        name = f"bitmask {100 - round(100 * density)} % zero"
        return self._sum(batch, size, [call(k) for k in range(count)], name)


def product_rows(timer: Timer, cache: int, rate: float) -> list[dict[str, Any]]:
    """All products, shape by shape."""
    found = []
    for rows, columns in SHAPES:
        products = Products(timer, cache, rate, rows, columns)
        for bits in (4, 8, 2):
            found += [products.codes(bits, batch) for batch in BATCHES]
        found += [products.codes(4, batch, low_rank=True) for batch in (1, 8, 32)]
        for density in (0.5, 0.3):
            found += [products.bitmask(density, batch) for batch in (1, 2, 4, 8)]
    return found


def quantizer_rows(timer: Timer, rate: float) -> list[dict[str, Any]]:
    """Histogram, mask, quantizers and packer on one bf16 matrix of 117 MB."""
    rows, columns = SHAPES[0]
    n, groups = rows * columns, columns // GROUP
    w = torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
    counts = torch.zeros(1 << 15, dtype=torch.int64, device=DEVICE)
    mask = torch.empty(rows, columns, dtype=torch.bool, device=DEVICE)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=DEVICE)
    scale = torch.empty(rows, groups, dtype=torch.float16, device=DEVICE)
    sums = torch.empty(rows, 3, dtype=torch.float64, device=DEVICE)
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=DEVICE)

    def quantize(search: str) -> Call:
        return lambda: cuda.quantize_groups(
            w,
            None,
            bits=4,
            group_size=GROUP,
            symmetric=True,
            scale_dtype="F16",
            search=search,
            signed_scale=True,
            codes=codes,
            scale=scale,
            zero_point=None,
            sums=sums,
        )

    calls: dict[str, tuple[Call, int]] = {
        "magnitude_histogram": (lambda: cuda.magnitude_histogram(w, counts), 2 * n),
        "threshold_mask": (lambda: cuda.threshold_mask(w, 0x3F80, 1000, mask), 5 * n),
        "finite_index": (lambda: cuda.finite_index(w), 2 * n),
        "quantize_groups plain": (quantize("none"), 3 * n),
        "quantize_groups searched": (quantize("mse"), 3 * n),
        "pack_bits": (lambda: cuda.pack_bits(codes, 4, packed), 3 * n // 2),
    }
    taken = timer.medians({name: call for name, (call, _) in calls.items()})
    return [
        {
            "kernel": name,
            "us": taken[name] * 1e6,
            "GB/s": size / taken[name] / 1e9,
            "of copy": size / taken[name] / rate,
        }
        for name, (_, size) in calls.items()
    ]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        justify: Any = "left" if name in ("kernel", "shape") else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = cuda.availability()
    if not found.available:
        print(f"bench/cuda.py: nothing measured: {found.reason}")
        return
    timer = Timer(options.rounds)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    rate = copy_rate(timer)
    print(f"{found.reason}: L2 {cache >> 20} MiB, copy {rate / 1e9:.0f} GB/s (read + written)")
    tables = {
        "products, float16 activations": product_rows(timer, cache, rate),
        "quantizing 4096 x 14336 bfloat16": quantizer_rows(timer, rate),
    }
    for title, rows in tables.items():
        show(title, rows)
    if options.json:
        options.json.write_text(json.dumps({"device": found.reason, **tables}, indent=2))


if __name__ == "__main__":
    main()
