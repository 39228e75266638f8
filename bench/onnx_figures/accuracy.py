"""Our file beside onnxruntime's own quantizer, at the same block and at the same bytes.

Codes of 4 bits in blocks of 32 with float16 scales take the bytes of blocks of 64 with float32
scales, which is what MatMulNBitsQuantizer writes. All are run at accuracy level 0.
"""

from __future__ import annotations

from pathlib import Path

import peers
from common import EXACT, SHARED, Figure, command, compressed, minilm, part

# What is compared with: name, block, symmetric.
THEIRS = (("blocks of 32, more bytes", 32, True), ("blocks of 64, as many bytes", 64, True),
          ("blocks of 32 with zero points, more bytes", 32, False))  # fmt: skip


def measure(work: Path) -> list[Figure]:
    pairs = ("--pairs", SHARED / "data" / "stsb_en_test.csv", "--samples", "100")
    text = ("--text", SHARED / "data" / "wikitext2_test.txt", "--window", "256", "--samples", "20")
    figures = []
    for name, model, data, bits in (
        ("MiniLM, 1 - cosine", minilm(), pairs, 4),
        ("tiny-llama-en, KL", SHARED / "models" / "tiny-llama-en", text, 4),
        ("tiny-llama-en, KL", SHARED / "models" / "tiny-llama-en", text, 8),
    ):
        folder = work / f"accuracy-{name.split()[0].strip(',').lower()}"
        dense = peers.dense(model, folder / "dense")
        words = [f"quantize:bits={bits},group=32"]
        if model != minilm():  # the quantizer takes a decoder's head, too
            words.append(f"{words[0]},targets=lm_head*")
        out = compressed(model, folder / f"ours{bits}", *words, "--onnx", *EXACT)
        ours = judged(out / "model.onnx", dense, data)
        mine = peers.product_bytes(out / "model.onnx")
        for kind, block, symmetric in THEIRS:
            path = peers.nbits(
                dense, folder / f"{bits}-{block}-{symmetric}", bits, block, 0, symmetric=symmetric
            )
            theirs = judged(path, dense, data)
            size = peers.product_bytes(path)
            goal = 1.0 if size >= mine else None
            figures.append(
                Figure(f"{name}, {bits} bits: ours / its quantizer's, {kind}", ours / theirs,
                       goal, at_most=True,
                       note=f"{ours:.3g} in {mine / 1e6:.2f} MB, {theirs:.3g} in {size / 1e6:.2f}")
            )  # fmt: skip
    return figures


def judged(graph: Path, dense: Path, data: tuple[object, ...]) -> float:
    """How far a graph is from the dense one: KL divergence, or 1 - the mean cosine."""
    found = command("eval", graph, "--reference", dense, *data)["metrics"]
    return float(found["kl"]) if "kl" in found else 1 - float(found["cosine"])


if __name__ == "__main__":
    part("ONNX: accuracy beside onnxruntime's own quantizer", __doc__, measure)
