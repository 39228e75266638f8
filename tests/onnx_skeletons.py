"""Skeletons that are made runnable: every weight is the checkpoint's decoded tensor, dense."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from compress.checkpoint import Checkpoint, skeleton


def dense(model: Any, checkpoint: Checkpoint) -> Any:
    """The model that a skeleton stands for, in standard operators and float32."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for name, tensor in skeleton.weights_of(made).items():
        values = checkpoint.read(checkpoint.info(name)).astype(np.float32)
        assert list(values.shape) == list(tensor.dims)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))
    nodes = [new for node in made.graph.node for new in _lowered(node)]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    del made.opset_import[1:]
    return made


def _lowered(node: Any) -> list[Any]:
    if node.domain != skeleton.DOMAIN:
        return [node]
    assert node.op_type == skeleton.LINEAR
    x, weight, *bias = node.input
    result = node.output[0]
    nodes = []
    if not any(a.name == "transposed" and a.i for a in node.attribute):
        nodes.append(helper.make_node("Transpose", [weight], [f"{result}.w"], perm=[1, 0]))
        weight = f"{result}.w"
    product = f"{result}.xw" if bias else result
    nodes.append(helper.make_node("MatMul", [x, weight], [product]))
    if bias:
        nodes.append(helper.make_node("Add", [product, *bias], [result]))
    return nodes


def session(model: Any) -> Any:
    """onnxruntime on one thread, with the checker's word that the model is valid."""
    import onnxruntime

    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
