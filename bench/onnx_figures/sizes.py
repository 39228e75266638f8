"""Bytes of an output with its graph beside the bytes without: the weights are not written twice."""

from __future__ import annotations

import json
from pathlib import Path

from common import SHARED, Figure, bytes_of, compressed, minilm, part

TABLE = "quantize:bits=8,group=-1,targets=*word_embeddings"
# Name, model, passes, whether all codes are of widths that onnxruntime reads as they lie.
CASES = (
    ("MiniLM, 4 bits, 8-bit table", "minilm", ("quantize:bits=4,group=32", TABLE), True),
    ("MiniLM, 8 bits", "minilm", ("quantize:bits=8,group=32",), True),
    ("MiniLM, 2 bits", "minilm", ("quantize:bits=2,group=32",), True),
    ("MiniLM, mixed 2, 4, 8 bits", "minilm", ("quantize:bpw=4.5,group=32,widths=[2,4,8]",), True),
    ("MiniLM, 3 bits", "minilm", ("quantize:bits=3,group=32",), False),
    ("MiniLM, 4 bits, rank 16, super weights", "minilm",
     ("super-weights", "quantize:bits=4,group=32", "low-rank:rank=16"), True),
    ("MiniLM, half of it pruned, 4 bits", "minilm",
     ("prune:sparsity=0.5", "quantize:bits=4,group=32"), True),
    ("tiny-llama-en, 4 bits", "tiny-llama-en", ("quantize:bits=4,group=32",), True),
    ("tiny-llama-en, 4 bits with zero points", "tiny-llama-en",
     ("quantize:bits=4,group=32,symmetric=false",), True),
)  # fmt: skip


def measure(work: Path) -> list[Figure]:
    figures = []
    for number, (name, model, passes, straight) in enumerate(CASES):
        source = minilm() if model == "minilm" else SHARED / "models" / model
        without = bytes_of(compressed(source, work / f"sizes-{number}-without", *passes))
        out = compressed(source, work / f"sizes-{number}", *passes, "--onnx")
        facts = json.loads((out / "report.json").read_text())
        more, graph = bytes_of(out, "model.onnx"), facts["onnx"]["graph_bytes"]
        said = f"format {facts['format']}, graph {graph / 1e3:.0f} kB"
        if facts["onnx"]["data_bytes"]:
            said += f", copied {facts['onnx']['data_bytes'] / 1e3:.0f} kB"
        if not straight:
            said += "; widened to 4 bits, no goal"
        figures.append(
            Figure(f"{name}: bytes with, less the graph / without", more / without,
                   1.02 if straight else None, at_most=True, note=said)
        )  # fmt: skip
    return figures


if __name__ == "__main__":
    part("ONNX: bytes", __doc__, measure)
