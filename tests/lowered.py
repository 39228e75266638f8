"""Skeletons made to run: a plain stand-in for the back end, with the weights inline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from compress.checkpoint import Checkpoint, skeleton


def values_of(model: Any, checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The weights of a skeleton, float32."""
    return {n: np.asarray(checkpoint.read(checkpoint.info(n))) for n in skeleton.weights_of(model)}


def filled(model: Any, values: Mapping[str, np.ndarray]) -> Any:
    """The model with these values, compress::Linear as Gemm or MatMul."""
    import onnx
    from onnx import helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if skeleton.is_weight(tensor):
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    nodes = []
    for node in made.graph.node:
        if node.domain != skeleton.DOMAIN:
            nodes.append(node)
            continue
        x, weight, *bias = node.input
        turned, product = f"{node.output[0]}/turned", f"{node.output[0]}/product"
        nodes.append(helper.make_node("Transpose", [weight], [turned], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [x, turned], [product if bias else node.output[0]]))
        if bias:
            nodes.append(helper.make_node("Add", [product, *bias], [node.output[0]]))
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    kept = [o for o in made.opset_import if o.domain != skeleton.DOMAIN]
    del made.opset_import[:]
    made.opset_import.extend(kept)
    return made


def with_int8_kernels(
    model: Any, *, half: bool = True, offset: bool = False, aliased: bool = False
) -> Any:
    """A filled model whose kernels are int8 by channel, behind DequantizeLinear.

    half    scales are float16 behind a Cast
    offset  codes are uint8 with the zero point 128
    aliased every constant is read through an Identity
    """
    import onnx
    from onnx import helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(model)
    tensors = {t.name: t for t in made.graph.initializer}
    before = []
    for node in made.graph.node:
        name = node.input[1] if node.op_type == "Conv" else ""
        if name not in tensors:
            continue
        values = numpy_helper.to_array(tensors[name])
        scale = np.abs(values).max(axis=tuple(range(1, values.ndim))) / np.float32(127)
        scale = np.maximum(scale, np.float32(2**-14)).astype("f2" if half else "f4")
        wide = scale.astype("f4").reshape(-1, *[1] * (values.ndim - 1))
        codes = np.clip(np.rint(values / wide), -127, 127).astype(np.int8)
        inputs = [f"{name}.codes", f"{name}.scale"]
        if half:
            before.append(helper.make_node("Cast", inputs[1:], [f"{name}.wide"], to=1))
            inputs[1] = f"{name}.wide"
        if offset:
            inputs.append(f"{name}.zero")
            zero = np.full(len(scale), 128, np.uint8)
            made.graph.initializer.append(numpy_helper.from_array(zero, inputs[2]))
            codes = (codes.astype(np.int16) + 128).astype(np.uint8)
        made.graph.initializer.append(numpy_helper.from_array(codes, f"{name}.codes"))
        made.graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
        before.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.kernel"], axis=0))
        node.input[1] = f"{name}.kernel"
        made.graph.initializer.remove(tensors[name])
    after = list(made.graph.node)
    del made.graph.node[:]
    made.graph.node.extend([*before, *after])
    if aliased:
        names = [t.name for t in made.graph.initializer]
        for one in made.graph.node:
            for place, name in enumerate(one.input):
                one.input[place] = f"{name}.alias" if name in names else name
        for name in names:
            made.graph.node.insert(0, helper.make_node("Identity", [name], [f"{name}.alias"]))
    return made
