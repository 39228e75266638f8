"""onnxruntime's time on our file beside the dense graph and onnxruntime's own quantizer, batch 1.

One sentence of 12 tokens through MiniLM, one token of a decoder (160 M weights, 64 tokens in its
cache); every ratio is of times taken in turns in one process, their lower quartiles: what is slower
was another program's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
from common import Figure, compressed, minilm, part, session, synthetic, times

GROUP = 32
PAST, LENGTH = 64, 12
ROUNDS = 60
NOISE = 0.97  # that much two runs of one file differ
Feed = dict[str, Any]


def measure(work: Path) -> list[Figure]:
    figures = []
    llama = synthetic(work, "160m")
    for name, model in (("MiniLM", minilm()), ("llama 160 M", llama)):
        folder = work / f"speed-{name.split()[0].lower()}"
        figures += of_model(folder, name, model, has_head=model == llama)
    return figures


def of_model(work: Path, name: str, model: Path, *, has_head: bool) -> list[Figure]:
    dense = peers.dense(model, work / "dense")
    files = {"fp32": dense, "fp16": peers.half(dense, work / "half")}
    sizes: dict[str, int] = {}
    for bits in (4, 8):
        words = [f"quantize:bits={bits},group={GROUP}"]
        if has_head:  # the quantizer takes the head, too
            words.append(f"{words[0]},targets=lm_head*")
        out = compressed(model, work / f"ours{bits}", *words, "--onnx")
        for level in (0, 4) if bits == 4 else (4,):
            key = f"{bits} bits, level {level}"
            files[f"ours, {key}"] = peers.at_level(out / "model.onnx", level)
            theirs = peers.nbits(dense, work / f"theirs{bits}-{level}", bits, GROUP, level)
            files[f"theirs, {key}"] = theirs
        read = [p for p in out.iterdir() if p.suffix in (".safetensors", ".data")]
        read.append(out / "model.onnx")
        sizes[f"ours, {bits} bits"] = sum(p.stat().st_size for p in read)
        sizes[f"theirs, {bits} bits"] = sum(
            (theirs.parent / one).stat().st_size for one in ("model.onnx", peers.DATA)
        )
        for who, path in (("ours", out / "model.onnx"), ("theirs", theirs)):
            sizes[f"{who}, products of {bits} bits"] = peers.product_bytes(path)
    found = []
    for threads in (1, 2):
        runs = {key: runner(path, threads) for key, path in files.items()}
        found += ratios(f"{name}, {threads} threads", times(runs, ROUNDS))
    for what, label in (
        ("{} bits", "bytes of both files"), ("products of {} bits", "bytes of the products")
    ):  # fmt: skip
        for bits in (4, 8):
            ours, other = (sizes[f"{who}, {what.format(bits)}"] for who in ("ours", "theirs"))
            found.append(
                Figure(f"{name}: {label}, {bits} bits: ours / its quantizer's", ours / other, 1.0,
                       at_most=True, note=f"{ours / 1e6:.2f} and {other / 1e6:.2f} MB")
            )  # fmt: skip
    return found


def ratios(name: str, medians: dict[str, float]) -> list[Figure]:
    """Ours against the rest; above 1: ours is faster."""
    found = []
    for key, seconds in medians.items():
        if not key.startswith("ours"):
            continue
        what = key.removeprefix("ours, ")
        said = f"{1e3 * seconds:.2f} ms"
        other = medians[f"theirs, {what}"]
        found.append(Figure(f"{name}, {what}: its quantizer's time / ours", other / seconds, NOISE,
                            note=f"{said}, theirs {1e3 * other:.2f}"))  # fmt: skip
        for kind in ("fp32", "fp16"):
            found.append(Figure(f"{name}, {what}: {kind} / ours", medians[kind] / seconds,
                                note=f"{kind} {1e3 * medians[kind]:.2f} ms"))  # fmt: skip
    return found


def runner(path: Path, threads: int) -> Callable[[], Any]:
    """Runs a graph on one sentence, or on one token behind a cache."""
    import numpy as np

    # A session whose threads go on spinning behind a run would take them from the next one.
    graph = session(path, threads, force_spinning_stop="1")
    rng = np.random.default_rng(0)
    inputs = {one.name: one for one in graph.get_inputs()}
    cached = any(name.startswith("past_key_values") for name in inputs)
    length, past = (1, PAST) if cached else (LENGTH, 0)
    feed: Feed = {"input_ids": rng.integers(1000, 2000, (1, length))}
    feed["attention_mask"] = np.ones((1, past + length), np.int64)
    feed["token_type_ids"] = np.zeros((1, length), np.int64)
    feed["position_ids"] = np.arange(past, past + length)[None]
    feed = {name: values for name, values in feed.items() if name in inputs}
    for name, spec in inputs.items():
        if name.startswith("past_key_values"):
            shape = (1, spec.shape[1], past, spec.shape[3])
            feed[name] = rng.standard_normal(shape).astype(np.float32)
    outputs = [one.name for one in graph.get_outputs()]
    return lambda: graph.run(outputs, feed)


if __name__ == "__main__":
    part("ONNX: speed and bytes beside onnxruntime's own", __doc__, measure)
