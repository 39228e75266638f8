"""Times of single products: each shape of a model's Linear layers, beside dense and sparse ones.

Every call reads another copy of its weights, 150 MB in all, so that none finds them in a cache.
Products that share their copies take turns in them: what one has read, the other reads last.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.kernels import reference_products
from compress.kernels.packing import CODES, pack_linear
from compress.kernels.segments import bitmask_segment
from compress.runtime import ops
from compress.runtime.modules import CompressedLinear

ROTATED = 150_000_000  # bytes
MOST_COPIES = 1024
LARGEST = 1 << 26  # weights of a matrix that is also measured dense and sparse
ROUNDS = 5
CALLS = 24  # a round
SPARSITIES = (30, 50, 70, 80, 90)  # percent
BREAK_EVEN_NOTE = (
    "Zeros make products with 16-bit weights faster from the break-even on. Zeros under 4-bit"
    " codes save bytes on the disk, not time: codes are read whole."
)

Call = Callable[[Any], Any]


@dataclass
class _Copies:
    """Copies of a weight, and which of them was read last, by whatever product."""

    tensors: list[torch.Tensor]
    place: int = -1

    def next(self) -> torch.Tensor:
        """The copy that was read longest ago."""
        self.place = (self.place + 1) % len(self.tensors)
        return self.tensors[self.place]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


@dataclass
class _Runner:
    """A product and the copies of its weights."""

    call: Call
    copies: _Copies

    def run(self, calls: int) -> float:
        """Seconds a call, over `calls` calls."""
        started = time.perf_counter()
        for _ in range(calls):
            self.call(self.copies.next())
        return (time.perf_counter() - started) / calls


def time_layers(model: nn.Module) -> list[dict[str, Any]]:
    """Median milliseconds by kind of product, for each distinct shape and width of a model."""
    found: dict[tuple[int, int, int | None], list[CompressedLinear]] = {}
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            key = module.out_features, module.in_features, bits_of(module)
            found.setdefault(key, []).append(module)
    return [_time_layer(key, modules) for key, modules in sorted(found.items(), key=str)]


def bits_of(module: CompressedLinear) -> int | None:
    """The width of a layer's codes in memory, None for stored values."""
    v = reference_products.view(module.packed.numpy())
    at, kind, _ = next(iter(reference_products.segments(v)))
    return int(v.words[at + 3]) if kind == CODES else None


def _time_layer(
    key: tuple[int, int, int | None], modules: list[CompressedLinear]
) -> dict[str, Any]:
    rows, columns, bits = key
    x = torch.randn(1, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = _rotated([m.packed for m in modules])
    runners = {name: _Runner(_packed_call(x, rows, name), packed) for name in ("exact", "fast")}
    if rows * columns <= LARGEST:
        _add_others(runners, x, rows, columns)
    times = _medians(runners)
    return {
        "shape": [rows, columns],
        "count": len(modules),
        "bits": bits,
        "bytes": modules[0].packed.numel(),
        "rotated_bytes": {name: runner.copies.nbytes for name, runner in runners.items()},
        "milliseconds": {name: 1e3 * seconds for name, seconds in times.items()},
        "break_even": break_even(times),
    }


def cache_note(layers: list[dict[str, Any]]) -> str | None:
    """What to say where copies hold less than ROTATED bytes: a cache may keep them."""
    least = min((min(layer["rotated_bytes"].values()) for layer in layers), default=ROTATED)
    if least >= ROTATED:
        return None
    return (
        f"Some products rotate through {least / 1e6:,.1f} MB of weights only ({MOST_COPIES}"
        f" copies), not {ROTATED / 1e6:,.0f} MB: a cache may hold them, times may be too short."
    )


def _packed_call(x: torch.Tensor, rows: int, precision: str) -> Call:
    return lambda packed: ops.linear(x, packed, rows, precision)


def _add_others(runners: dict[str, _Runner], x: torch.Tensor, rows: int, columns: int) -> None:
    """Dense bfloat16 weights by torch and by our kernel, and bitmasks of several sparsities."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
    weight = torch.from_numpy(values).bfloat16()
    copies = _rotated([weight])
    runners["dense, torch"] = _Runner(lambda w: nn.functional.linear(x, w), copies)
    runners["dense"] = _Runner(lambda w: ops.dense_linear(x, w), copies)
    chance = rng.random((rows, columns), dtype=np.float32)
    stored = ops.numpy_view(weight)
    for percent in SPARSITIES:
        mask = chance >= percent / 100
        bits = np.packbits(mask, axis=1, bitorder="little")
        segment = bitmask_segment(bits, stored[mask], columns)
        packed = torch.from_numpy(pack_linear(rows, columns, [segment]))
        runners[f"sparse {percent}"] = _Runner(_packed_call(x, rows, "exact"), _rotated([packed]))


def _rotated(tensors: list[torch.Tensor]) -> _Copies:
    """The tensors and copies of them: ROTATED bytes, but MOST_COPIES at most."""
    wanted = min(MOST_COPIES, -(-ROTATED // max(1, tensors[0].nbytes)))
    copies = [tensors[i] if i < len(tensors) else tensors[i % len(tensors)].clone()
              for i in range(max(wanted, 1))]  # fmt: skip
    return _Copies(copies)


def _medians(runners: dict[str, _Runner]) -> dict[str, float]:
    """Seconds a call, rounds interleaved, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(ROUNDS + 1):
        for name, runner in runners.items():
            found = runner.run(min(len(runner.copies.tensors), CALLS))
            if turn:
                seconds[name].append(found)
    return {name: statistics.median(values) for name, values in seconds.items()}


def break_even(times: dict[str, float]) -> dict[str, Any] | None:
    """The sparsity from which the bitmask product is faster than the dense one, interpolated.

    times  seconds by kind of product, "dense" and "sparse P" for percentages P

    None where they were not measured. `sparsity` is None where no measured sparsity is faster.
    """
    if "dense" not in times or f"sparse {SPARSITIES[0]}" not in times:
        return None
    points = [(p, times[f"sparse {p}"] / times["dense"]) for p in SPARSITIES]
    if points[0][1] <= 1:
        text = f"bitmasks are faster than dense bf16 from {points[0][0]} % zeros or less"
        return {"sparsity": points[0][0] / 100, "at_most": True, "text": text}
    for (low, slow), (high, quick) in itertools.pairwise(points):
        if slow > 1 >= quick:
            at = low + (high - low) * (slow - 1) / (slow - quick)
            text = f"bitmasks are faster than dense bf16 from {at:.0f} % zeros on"
            return {"sparsity": at / 100, "at_most": False, "text": text}
    text = f"bitmasks are slower than dense bf16 up to {points[-1][0]} % zeros"
    return {"sparsity": None, "at_most": False, "text": text}
