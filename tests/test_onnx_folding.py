"""A convolutional .onnx file through the command line: integers between its layers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from toolbox import tool

pytest.importorskip("onnxruntime")


def network(path: Path) -> None:
    """Two Convs, each with a BatchNormalization behind it, and the mean of each map."""
    rng = np.random.default_rng(5)
    arrays = {}
    nodes = []
    value, channels = "image", 3
    for layer in ("a", "b"):
        norm = [f"{layer}.{part}" for part in ("weight", "bias", "mean", "var")]
        arrays |= {
            f"{layer}.kernel": rng.normal(size=(16, channels, 3, 3)) / 4,
            norm[0]: rng.uniform(0.5, 2, 16), norm[1]: rng.normal(size=16) / 4,
            norm[2]: rng.normal(size=16) / 4, norm[3]: rng.uniform(0.5, 2, 16),
        }  # fmt: skip
        nodes += [
            helper.make_node("Conv", [value, f"{layer}.kernel"], [f"{layer}.maps"], pads=[1] * 4),
            helper.make_node("BatchNormalization", [f"{layer}.maps", *norm], [f"{layer}.normed"]),
            helper.make_node("Relu", [f"{layer}.normed"], [f"{layer}.out"]),
        ]
        value, channels = f"{layer}.out", 16
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["logits"]))
    graph = helper.make_graph(
        nodes, "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path
    )


def test_batch_norms_are_folded_and_activations_rounded(tmp_path: Path) -> None:
    network(tmp_path / "model.onnx")
    images = np.random.default_rng(1).integers(0, 256, (24, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.zeros(24, np.int64))
    words = [str(tmp_path / "model.onnx"), "-o", str(tmp_path / "out"), "quantize:bits=8,group=-1"]
    done = tool("run", *words, "--images", str(tmp_path / "images.npz"))
    assert done.returncode == 0, done.stderr
    assert "no pass of the recipe" not in done.stdout + done.stderr  # activations make use of them
    made = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    kinds = Counter(node.op_type for node in made.graph.node)
    assert kinds["Conv"] == 2 and kinds["BatchNormalization"] == 0 and kinds["Identity"] == 0
    assert kinds["QuantizeLinear"] == 3  # the image and what each layer gives
    said = json.loads((tmp_path / "out" / "report.json").read_text())["onnx"]
    assert said["operators"]["QuantizeLinear"] == 3
    assert 1e-4 < said["parity"]["relative_error"] < 0.05
    assert said["parity"]["exact_relative_error"] < 1e-5
