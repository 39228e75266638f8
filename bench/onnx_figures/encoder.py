"""MiniLM as ONNX against our own decode: embeddings of STS-B's test sentences, and Spearman."""

from __future__ import annotations

from pathlib import Path

from common import EXACT, SHARED, Figure, compressed, minilm, part

SHIP = ("quantize:bits=4,group=32",
        "quantize:bits=8,group=-1,targets=*word_embeddings")  # fmt: skip
PAIRS = SHARED / "data" / "stsb_en_test.csv"


def measure(work: Path) -> list[Figure]:
    import numpy as np

    from compress.evaluate import pairs
    from compress.evaluate.data import Request, load_data
    from compress.evaluate.onnx_outputs import Onnx
    from compress.evaluate.outputs import Decoded
    from compress.output import in_float32, open_any

    out = compressed(minilm(), work / "minilm", *SHIP, "--onnx", *EXACT)
    with open_any(out) as checkpoint:
        data = load_data(Request("pairs", PAIRS), checkpoint)
        ours = pairs.embed(Decoded(in_float32(checkpoint)), data.sentences)
    graph = pairs.embed(Onnx(out / "model.onnx"), data.sentences)
    distance = np.linalg.norm(graph - ours, axis=1)
    half = len(data.scores)
    rho = [
        100 * pairs.spearman(pairs.cosines(e[:half], e[half:]), data.scores) for e in (ours, graph)
    ]
    said = f"{len(data.sentences)} sentences"
    apart = abs(round(rho[0], 2) - round(rho[1], 2))
    least = float(pairs.cosines(graph, ours).min())
    return [
        Figure("embeddings, largest distance from our decode", float(distance.max()), 1e-4,
               at_most=True, note=said),
        Figure("embeddings, least cosine to our decode", least, 0.99999, note=said),
        Figure("STS-B Spearman, difference of two decimals", apart, 0, at_most=True,
               note=f"{rho[0]:.4f} and {rho[1]:.4f}"),
    ]  # fmt: skip


if __name__ == "__main__":
    part("ONNX: MiniLM, 4-bit linears and int8 table, level 0", __doc__, measure)
