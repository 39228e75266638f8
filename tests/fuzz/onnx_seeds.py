"""Small ONNX models for the fuzzer: one of every place that data can lie in, and of every role."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

_FLOATS = np.arange(4, dtype=np.float32).reshape(2, 2)


def models() -> Iterator[Any]:
    """ModelProtos, each under a kilobyte."""
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    yield _model([product], [numpy_helper.from_array(_FLOATS, "w")])
    yield _model([product], [helper.make_tensor("w", 1, [2, 2], [1, 2, 3, 4])])
    yield _model([product], [_external("w", location="w.bin", offset="0", length="16")])
    half = helper.make_tensor("w", 10, [2, 2], [1, 2, 3, 4])
    yield _model([product], [half])
    yield _model(
        [
            helper.make_node("Identity", ["w"], ["v"]),
            helper.make_node("Transpose", ["v"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["z"]),
            helper.make_node("Gemm", ["z", "u", "b"], ["y"], transB=1),
        ],
        [
            numpy_helper.from_array(_FLOATS, "w"),
            _external("u", location="w.bin", offset="16"),
            helper.make_tensor("b", 1, [2], [1, 2]),
        ],
    )
    kernel = numpy_helper.from_array(np.ones((1, 1, 2, 2), np.float32), "k")
    yield _model(
        [helper.make_node("Conv", ["x", "k"], ["y"], pads=[0, 1, 0, 1], group=1)], [kernel]
    )
    yield _model(
        [helper.make_node("Gather", ["e", "i"], ["y"], axis=0)],
        [numpy_helper.from_array(_FLOATS, "e"), helper.make_tensor("i", 7, [1], [0])],
    )
    yield _model(
        [helper.make_node("DequantizeLinear", ["q", "s"], ["w"]), product],
        [helper.make_tensor("q", 3, [2, 2], [1, 2, 3, 4]), helper.make_tensor("s", 1, [], [0.5])],
    )
    constant = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("", 9, [], [1]))
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["o"])], "then", [],
        [helper.make_tensor_value_info("o", 1, None)],
    )  # fmt: skip
    branches = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    yield _model([constant, branches], [])
    function = helper.make_function(
        "own", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    called = _model([helper.make_node("F", ["x"], ["y"], domain="own")], [])
    called.functions.append(function)
    called.opset_import.append(helper.make_opsetid("own", 1))
    yield called


def _model(nodes: list[Any], initializers: list[Any]) -> Any:
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _external(name: str, **entries: str) -> Any:
    made = TensorProto(name=name, data_type=1, dims=(2, 2), data_location=1)
    for key, value in entries.items():
        made.external_data.add(key=key, value=value)
    return made
