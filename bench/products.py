"""Products with 2-, 4- and 8-bit codes against onnxruntime's MatMulNBits and torch's bf16.

    python bench/products.py [--shape 4096x14336] [--batch 1,32,512] [--threads 1,2] [--json FILE]

Every candidate has a turn a round, in one process; a round goes through at least 150 MB of distinct
weights, so that none waits in a cache; medians of the rounds are compared. onnxruntime's weights
are distinct, too (it merges equal ones), its threads spin as they do by default, and both sides
round their activations inside the time. torch runs in a process of its own, behind the rest:
its threads would share the processors with ours.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from goals import Figure, save, show

from compress import kernels
from compress.kernels import dispatch
from compress.kernels.packing import codes_segment, pack_linear
from compress.kernels.products import linear
from compress.tensor import Codes

GROUP = 128
ROTATED = 150e6  # bytes of weights
SETTLED = 0.08  # seconds
TITLE = "Products with codes"
Call = Callable[[], object]


def rounds_of(batch: int) -> int:
    return 12 if batch == 1 else 6 if batch < 100 else 4


class Weights:
    """Distinct random 2-, 4- or 8-bit matrices, packed for us and as an ONNX model."""

    def __init__(self, rows: int, columns: int, bits: int) -> None:
        self.rows, self.columns, self.bits = rows, columns, bits
        self.nbytes = rows * columns * bits // 8
        self.count = int(ROTATED // self.nbytes) + 1
        rng = np.random.default_rng(bits)
        self.packed, self.raw = [], []
        for _ in range(self.count):
            values = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
            scale = (rng.random((rows, columns // GROUP), np.float32) * 0.01 + 1e-3).astype(
                np.float16
            )
            own = Codes(values, scale, None, bits, GROUP)
            self.packed.append(pack_linear(rows, columns, [codes_segment(own)]))
            stored = np.empty((rows, columns * bits // 8), np.uint8)
            kernels.pack_bits(values, bits, stored)
            self.raw.append((stored, scale))
        self.last = own

    def session(self, accuracy: int, threads: int) -> onnxruntime.InferenceSession:
        """One node a matrix, all of one input."""
        helper, arrays = onnx.helper, onnx.numpy_helper
        nodes, initializers, outputs = [], [], []
        for i, (stored, scale) in enumerate(self.raw):
            blocks = stored.reshape(self.rows, self.columns // GROUP, GROUP * self.bits // 8)
            initializers += [
                arrays.from_array(blocks, f"B{i}"),
                arrays.from_array(scale.astype(np.float32), f"S{i}"),
            ]
            nodes.append(
                helper.make_node(
                    "MatMulNBits",
                    ["X", f"B{i}", f"S{i}"],
                    [f"Y{i}"],
                    domain="com.microsoft",
                    K=self.columns,
                    N=self.rows,
                    bits=self.bits,
                    block_size=GROUP,
                    accuracy_level=accuracy,
                )
            )
            outputs.append(helper.make_tensor_value_info(f"Y{i}", 1, ["M", self.rows]))
        x = helper.make_tensor_value_info("X", 1, ["M", self.columns])
        model = helper.make_model(
            helper.make_graph(nodes, "products", [x], outputs, initializers),
            opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
            ir_version=10,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of each call, one warm-up round.

    In its turn a short call runs for a while before it counts, and then for as long: the threads
    of the candidate before spin for milliseconds, and a scheduler takes as long to put a thread
    that it woke on a processor of its own.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            repeats = 1
            if seconds[name] and seconds[name][0] < SETTLED:
                repeats = int(SETTLED / seconds[name][0]) + 1
                for _ in range(repeats):
                    call()
            started = time.perf_counter()
            for _ in range(repeats):
                call()
            if turn:
                seconds[name].append((time.perf_counter() - started) / repeats)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def product_error(weights: Weights, x: np.ndarray, precision: str) -> float:
    """Relative error of a product with the decoded weights, in float64."""
    y = np.empty((x.shape[0], weights.rows), np.float32)
    linear(x, weights.packed[-1], y, precision=precision)
    want = x.astype(np.float64) @ weights.last.dequantize().T.astype(np.float64)
    return float(np.linalg.norm(y - want) / np.linalg.norm(want))


def run_own(weights: Weights, x: np.ndarray, y: np.ndarray, precision: str, threads: int) -> Call:
    def call() -> None:
        for packed in weights.packed:
            linear(x, packed, y, precision=precision, threads=threads)

    return call


def measure(
    shape: tuple[int, int], batch: int, threads: int, tables: dict[int, Weights]
) -> dict[str, float]:
    """Milliseconds a matrix of every candidate."""
    rows, columns = shape
    x = np.random.default_rng(0).standard_normal((batch, columns), np.float32)
    y = np.empty((batch, rows), np.float32)
    calls: dict[str, Call] = {}
    counts: dict[str, float] = {}
    for bits, weights in tables.items():
        for precision in ("exact", "fast"):
            calls[f"int{bits} {precision}"] = run_own(weights, x, y, precision, threads)
        for accuracy in (0, 4) if bits == 4 else (4,):
            if bits == 2:
                continue
            session = weights.session(accuracy, threads)
            calls[f"onnxruntime int{bits} level {accuracy}"] = lambda s=session: s.run(
                None, {"X": x}
            )
        counts |= {name: weights.count for name in calls if f"int{bits} " in name}
    parts = np.array_split(np.ones(int(ROTATED) // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        # A sweep that only reads, on as many threads: the bytes of one 4-bit matrix.
        calls["read"] = lambda: list(pool.map(kernels.finite_index, parts))
        counts["read"] = ROTATED / tables[4].nbytes
        seconds = interleaved(calls, rounds_of(batch))
    return {name: 1e3 * value / counts[name] for name, value in seconds.items()}


def figures(batch: int, threads: int, ms: dict[str, float]) -> list[Figure]:
    """The goals of one batch size and number of threads."""
    where = f"batch {batch}, {threads} thread" + "s" * (threads > 1)
    exact, fast = ms["int4 exact"], ms["int4 fast"]
    zero, four = ms["onnxruntime int4 level 0"], ms["onnxruntime int4 level 4"]
    if batch == 1:
        return [
            Figure(f"int4 exact / onnxruntime level 0, {where}", zero / exact, 2.5),
            Figure(f"int4 exact / onnxruntime level 4, {where}", four / exact, 1.0, 1.15),
            Figure(f"int4 fast / onnxruntime level 4, {where}", four / fast, 1.2),
            Figure(f"int4 fast, share of reading, {where}", ms["read"] / fast, 0.7, 0.85),
            Figure(
                f"int8 exact / onnxruntime level 4, {where}",
                ms["onnxruntime int8 level 4"] / ms["int8 exact"],
                1.0,
            ),
        ]
    return [
        Figure(f"int4 exact / onnxruntime level 4, {where}", four / exact, 1.0),
        Figure(f"int4 fast / onnxruntime level 4, {where}", four / fast, 1.0),
        Figure(
            f"int8 exact / onnxruntime level 4, {where}",
            ms["onnxruntime int8 level 4"] / ms["int8 exact"],
        ),
    ]


TORCH = """
import sys, time, statistics, torch
rows, columns, batch, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
w = [torch.randn(rows, columns).bfloat16() for _ in range(2)]
x = torch.randn(batch, columns).bfloat16()
times = []
for turn in range(6 if batch < 100 else 3):
    started = time.perf_counter()
    torch.nn.functional.linear(x, w[turn % 2])
    times.append(time.perf_counter() - started)
print(1e3 * statistics.median(times[1:]))
"""


def torch_ms(shape: tuple[int, int], batch: int, threads: int) -> float:
    """torch's bf16 linear, in a process of its own."""
    arguments = [sys.executable, "-c", TORCH, *map(str, (*shape, batch, threads))]
    return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4096x14336")
    parser.add_argument("--batch", default="1,32,512")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    options = parser.parse_args()
    rows, columns = map(int, options.shape.split("x"))
    backend = dispatch.current().backend
    print(f"{rows} x {columns}, group {GROUP}; {backend.name}, {backend.isa}")
    tables = {bits: Weights(rows, columns, bits) for bits in (4, 8, 2)}
    found: list[Figure] = []
    for precision, bound in (("exact", 1e-4), ("fast", None)):
        x = np.random.default_rng(1).standard_normal((4, columns), np.float32)
        error = product_error(tables[4], x, precision)
        if bound:
            found.append(
                Figure("1e-4 / error of int4 exact", bound / error, 1.0, None, f"{error:.1e}")
            )
        print(f"error of int4 {precision} against the decoded weights: {error:.2e}")
    for threads in map(int, options.threads.split(",")):
        for batch in map(int, options.batch.split(",")):
            ms = measure((rows, columns), batch, threads, tables)
            ms["torch bf16"] = torch_ms((rows, columns), batch, threads)
            print(f"batch {batch}, {threads} threads, ms a matrix:")
            print("  " + ", ".join(f"{name} {value:.3g}" for name, value in ms.items()))
            found += figures(batch, threads, ms)
            found.append(
                Figure(
                    f"int4 exact / torch bf16, batch {batch}, {threads} threads",
                    ms["torch bf16"] / ms["int4 exact"],
                    None,
                    1.0 if batch > 1 else None,
                )
            )
    show(TITLE, found)
    if options.json:
        save(options.json, TITLE, found)


if __name__ == "__main__":
    main()
