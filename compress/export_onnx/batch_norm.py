"""BatchNormalization behind a Conv of int8 weights goes into the scales, and the codes stay."""

from __future__ import annotations

from typing import Any

import numpy as np

from compress.export_onnx.graph_index import (
    GraphIndex,
    Read,
    attributes,
    floats,
    is_op,
    without_unread,
)


def fold_batch_norms(model: Any, read: Read) -> Any:
    """A copy of a model in which Conv takes over the BatchNormalization that follows it.

    read  the values of an initializer
    With g = weight / sqrt(var + epsilon) the kernel's scale becomes g * scale, which may be
    negative, and the bias g * (bias - mean) + shift. The codes are shared with other files, so they
    are left as they are; scale and bias are new float32 initializers. Only a kernel whose scales
    are one a channel and behind one DequantizeLinear is treated; others keep their node.
    """
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    index = GraphIndex(made)
    dropped = [
        node
        for node in index.nodes
        if is_op(node, "BatchNormalization") and _fold(made.graph, index, node, read)
    ]
    for node in dropped:
        made.graph.node.remove(node)
    if dropped:
        without_unread(made)
    return made


def _fold(graph: Any, index: GraphIndex, norm: Any, read: Read) -> bool:
    """Whether the Conv before `norm` has taken it over."""
    conv = index.maker(norm.input[0])
    if not is_op(conv, "Conv") or index.only_reader(conv.output[0]) is None:
        return False
    parts = [index.constant(name) for name in norm.input[1:5]]
    known = [part[0] for part in parts if part is not None]
    given = attributes(norm)
    if len(known) < 4 or given.get("training_mode", 0) or any(norm.output[1:]):
        return False
    kernel = index.maker(conv.input[1])
    if not is_op(kernel, "DequantizeLinear") or index.only_reader(conv.input[1]) is None:
        return False
    scale = index.constant(kernel.input[1])
    bias = index.constant(conv.input[2]) if len(conv.input) > 2 and conv.input[2] else None
    if scale is None or (len(conv.input) > 2 and conv.input[2] and bias is None):
        return False
    if len(scale[0].dims) != 1 or attributes(kernel).get("axis", 1) != 0:
        return False
    weight, shift, mean, variance = (floats(read, t).astype(np.float64) for t in known)
    gain = weight / np.sqrt(variance + given.get("epsilon", 1e-5))
    start = 0.0 if bias is None else floats(read, bias[0]).astype(np.float64)
    scales = floats(read, scale[0]) * gain
    if attributes(kernel).get("block_size", 0) or scales.shape != gain.shape:
        return False
    kernel.input[1] = _added(graph, index, f"{conv.input[1]}/scale", scales)
    added = _added(graph, index, f"{conv.input[1]}/bias", gain * (start - mean) + shift)
    del conv.input[2:]
    conv.input.append(added)
    conv.output[0] = norm.output[0]
    return True


def _added(graph: Any, index: GraphIndex, name: str, values: Any) -> str:
    """The name of a new float32 initializer."""
    from onnx import numpy_helper

    name = index.free(name)
    graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return name
