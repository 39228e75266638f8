"""A skeleton whose weights are read directly: no Identity or Transpose between them and products.

What works on it only has to know nodes that name a weight. A MatMul with a transposed weight
becomes the skeleton's own Linear, a Gemm's transB is turned over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.checkpoint.onnx_uses import Weight, passes_on
from compress.checkpoint.skeleton import DOMAIN, LINEAR
from compress.tensor import Role

_READ = (Role.LINEAR, Role.CONV1D, Role.CONV, Role.EMBEDDING)


def read_directly(model: Any, weights: Mapping[str, Weight]) -> None:
    """Rewrite the main graph of `model` (ModelProto); `weights` are its initializers' roles.

    Only weights whose readers agree are touched, so all nodes in between lose their readers.
    """
    nodes = list(model.graph.node)
    consumers: dict[str, list[tuple[int, int]]] = {}
    for number, node in enumerate(nodes):
        for place, value in enumerate(node.input):
            if value:  # an output without a name can be no input: nodes could pass it on for ever
                consumers.setdefault(value, []).append((number, place))
    unread: set[int] = set()
    for name, weight in weights.items():
        if weight.role not in _READ:
            continue
        pending = [(name, False)]
        while pending:
            value, turned = pending.pop()
            for number, place in consumers.get(value, ()):
                node = nodes[number]
                if (passed := passes_on(node, place)) is not None:
                    unread.add(number)
                    pending.append((node.output[0], turned != passed))
                    continue
                node.input[place] = name
                if turned:
                    _turn(node)
    if unread:
        kept = [node for number, node in enumerate(nodes) if number not in unread]
        del model.graph.node[:]
        model.graph.node.extend(kept)
    made = any(node.domain == DOMAIN for node in model.graph.node)
    if made and all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.add(domain=DOMAIN, version=1)


def in_standard_operators(model: Any) -> None:
    """Turn the skeleton's own Linear without a bias back into Transpose and MatMul, to run it."""
    from onnx import helper

    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.domain == DOMAIN and node.op_type == LINEAR and len(node.input) == 2:
            turned = f"{node.output[0]}.{DOMAIN}.transposed"
            made = helper.make_node("Transpose", [node.input[1]], [turned], perm=[1, 0])
            model.graph.node.append(made)
            node.input[1], node.op_type = turned, "MatMul"
            node.ClearField("domain")
        model.graph.node.append(node)
    if all(node.domain != DOMAIN for node in model.graph.node):
        kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(kept)


def _turn(node: Any) -> None:
    """Let a product read its weight untransposed."""
    if node.op_type == "MatMul":
        node.domain, node.op_type = DOMAIN, LINEAR
        return
    for attribute in node.attribute:
        if attribute.name == "transB":
            attribute.i = 0 if attribute.i else 1
            return
    node.attribute.add(name="transB", type=2, i=1)  # AttributeProto.INT
