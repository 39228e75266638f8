"""Exporting synthetic models of 1 B shapes: peak memory of the process, and time by layers.

2, 8 and 16 layers of the same width (2048, feed-forward 8192, a tied table of 128,256 words). Each
export is a process of its own, into the output that it belongs to; seconds are of its processors,
not of the wall, which another program may share. Time is linear where a layer of the upper half
takes what one of the lower half takes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from common import TOOL, Figure, compressed, part, peak_of, synthetic

LAYERS = (2, 8, 16)
TABLE = "quantize:bits=8,group=128,targets=[model.embed_tokens]"
PASSES = ("quantize:bits=4,group=128", TABLE)
ALLOWED = 1.5e9


def measure(work: Path) -> list[Figure]:
    figures, seconds = [], {}
    for layers in LAYERS:
        out = work / f"1b-{layers}-out"
        if not out.exists():
            model = synthetic(work, "1b", layers)
            compressed(model, out, *PASSES)
            shutil.rmtree(model)
        packed = (out / "model.compress.safetensors").stat().st_size
        taken, peak = peak_of(
            [*TOOL, "export", str(out), "--to", "onnx", "--no-fsync", "--overwrite"]
        )
        seconds[layers] = taken
        if layers == LAYERS[-1]:
            figures.append(
                Figure("1 B, 16 layers: peak memory, less 1.5 GB / packed bytes",
                       (peak - ALLOWED) / packed, 1.0, at_most=True,
                       note=f"{peak / 1e9:.2f} GB, packed {packed / 1e9:.2f}, graph"
                            f" {(out / 'model.onnx').stat().st_size / 1e3:.0f} kB")
            )  # fmt: skip
        else:
            figures.append(
                Figure(f"{layers} layers: peak memory, less 1.5 GB / packed bytes",
                       (peak - ALLOWED) / packed, at_most=True,
                       note=f"{peak / 1e9:.2f} GB, packed {packed / 1e9:.2f}")
            )  # fmt: skip
        shutil.rmtree(out)
    low = (seconds[8] - seconds[2]) / 6
    high = (seconds[16] - seconds[8]) / 8
    said = ", ".join(f"{n} layers {s:.1f} s" for n, s in seconds.items())
    figures.append(Figure("seconds a layer, 8 to 16 layers", high, note=said))
    figures.append(
        Figure("seconds a layer, 8 to 16 layers / 2 to 8 layers", high / low, 1.25, at_most=True,
               note=f"{high:.2f} and {low:.2f} s")
    )  # fmt: skip
    return figures


if __name__ == "__main__":
    part("ONNX: export of large models", __doc__, measure)
