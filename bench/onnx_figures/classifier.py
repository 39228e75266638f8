"""ResNet-20 as ONNX on 2,000 images: in float as our decode says, in integers close to it."""

from __future__ import annotations

from pathlib import Path

from common import EXACT, ROOT, SHARED, Figure, command, compressed, part

MODEL = SHARED / "models" / "resnet20-12fca82f.th"
MODULE = ("--module", f"{ROOT / 'tests' / 'resnet_cifar.py'}:resnet20")
PICKLE = ("--allow-pickle",)
CALIBRATION = SHARED / "data" / "cifar10_calib_600.npz"
TEST = ("--images", SHARED / "data" / "cifar10_test_2000.npz")
FLOAT = ("--onnx-activations", "float", *EXACT, "--image-shape", "32,32,3")
# Name, passes, options of the export, whether products are of integers.
CASES = (
    ("8 bits, float", "quantize:bits=8,group=-1", FLOAT, False),
    ("4 bits, float", "quantize:bits=4,group=-1", FLOAT, False),
    ("4 bits in groups, float", "quantize:bits=4,group=36,on_indivisible=short", FLOAT, False),
    ("8 bits, static activations", "quantize:bits=8,group=-1", ("--images", CALIBRATION), True),
)


def measure(work: Path) -> list[Figure]:
    dense = command("eval", MODEL, *TEST, *MODULE, *PICKLE)["metrics"]["accuracy"]
    figures = []
    for number, (name, passes, options, integers) in enumerate(CASES):
        out = work / f"resnet-{number}"
        compressed(MODEL, out, passes, *MODULE, *PICKLE, "--onnx", *options)
        ours = command("eval", out, *TEST, *MODULE)["metrics"]["accuracy"]
        graph = command("eval", out / "model.onnx", *TEST)["metrics"]["accuracy"]
        said = f"graph {graph:.2f}, our decode {ours:.2f}, dense {dense:.2f}"
        figures.append(
            Figure(f"{name}: points from our decode", abs(graph - ours), 0.5 if integers else 0,
                   at_most=True, note=said)
        )  # fmt: skip
    return figures


if __name__ == "__main__":
    part("ONNX: ResNet-20, top-1 on 2,000 images", __doc__, measure)
