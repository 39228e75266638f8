"""How a node of a graph reads a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.checkpoint import skeleton
from compress.tensor import Role, TensorInfo


@dataclass(frozen=True)
class Use:
    """How a node reads a weight: `op` is linear, conv or gather; "" means in another way."""

    op: str
    value: str = ""
    bias: str = ""


def use_of(node: Any, info: TensorInfo) -> Use:
    """How a node reads the weight."""
    places = [n for n, value in enumerate(node.input) if value == info.name]
    if len(places) != 1:
        return Use("")
    attributes = {a.name: a for a in node.attribute}
    role = info.role
    is_transposed = role is Role.CONV1D
    if node.domain == skeleton.DOMAIN and node.op_type == skeleton.LINEAR and places == [1]:
        turned = integer(attributes, "transposed", 0) == 1
        bias = node.input[2] if len(node.input) > 2 else ""
        return Use("linear", node.input[0], bias) if turned == is_transposed else Use("")
    if node.domain not in ("", "ai.onnx"):
        return Use("")
    if node.op_type == "MatMul" and places == [1] and is_transposed:
        return Use("linear", node.input[0])
    if node.op_type == "Gemm" and places == [1]:
        plain = all(
            abs(attributes[key].f - 1) < 1e-12 for key in ("alpha", "beta") if key in attributes
        )
        straight = integer(attributes, "transA", 0) == 0
        turned = integer(attributes, "transB", 0) == 0
        if plain and straight and turned == is_transposed:
            return Use("linear", node.input[0], node.input[2] if len(node.input) > 2 else "")
    if node.op_type == "Conv" and places == [1] and role is Role.CONV:
        return Use("conv", node.input[0], node.input[2] if len(node.input) > 2 else "")
    if (
        node.op_type == "Gather"
        and places == [0]
        and len(node.input) == 2
        and integer(attributes, "axis", 0) == 0
    ):
        return Use("gather" if not is_transposed else "", node.input[1])
    return Use("")


def integer(attributes: Mapping[str, Any], name: str, default: int) -> int:
    """An attribute of a node."""
    return int(attributes[name].i) if name in attributes else default
