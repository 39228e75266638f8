"""What the weights of an ONNX graph are to it: by the nodes that read them, not by their names.

A weight that goes through Identity, or through a Transpose of two axes, is read by whatever reads
the result. All its readers have to agree: a matrix that is multiplied in one orientation and added
somewhere else is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from compress.checkpoint.skeleton import DOMAIN, LINEAR
from compress.tensor import Role

STANDARD = ("", "ai.onnx")
# (operator, place of the input) -> what a vector there is.
_VECTORS = {
    ("LayerNormalization", 1): Role.NORM, ("LayerNormalization", 2): Role.BIAS,
    ("SimplifiedLayerNormalization", 1): Role.NORM, ("RMSNormalization", 1): Role.NORM,
    ("SkipLayerNormalization", 2): Role.NORM, ("SkipLayerNormalization", 3): Role.BIAS,
    ("SkipLayerNormalization", 4): Role.BIAS, ("SkipSimplifiedLayerNormalization", 2): Role.NORM,
    ("EmbedLayerNormalization", 5): Role.NORM, ("EmbedLayerNormalization", 6): Role.BIAS,
    ("BatchNormalization", 1): Role.NORM, ("BatchNormalization", 2): Role.BIAS,
    ("BatchNormalization", 3): Role.STATE, ("BatchNormalization", 4): Role.STATE,
    ("InstanceNormalization", 1): Role.NORM, ("InstanceNormalization", 2): Role.BIAS,
    ("GroupNormalization", 1): Role.NORM, ("GroupNormalization", 2): Role.BIAS,
    ("GroupNorm", 1): Role.NORM, ("GroupNorm", 2): Role.BIAS,
    ("Gemm", 2): Role.BIAS, ("Conv", 2): Role.BIAS, ("ConvTranspose", 2): Role.BIAS,
    ("Add", 0): Role.BIAS, ("Add", 1): Role.BIAS, ("BiasGelu", 1): Role.BIAS,
    ("FastGelu", 1): Role.BIAS,
}  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """How a Conv takes patches: sizes by axis; `pads` are (before, behind) by axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    groups: int
    auto: str = "NOTSET"  # else SAME_UPPER or SAME_LOWER, which depend on the input's size

    def padding(self, size: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """(before, behind) by axis for an input of this size."""
        if self.auto == "NOTSET":
            return self.pads
        found = []
        for length, kernel, stride, gap in zip(
            size, self.kernel, self.strides, self.dilations, strict=True
        ):
            reach = gap * (kernel - 1) + 1
            whole = max(0, (math.ceil(length / stride) - 1) * stride + reach - length)
            less, more = whole // 2, whole - whole // 2
            found.append((less, more) if self.auto == "SAME_UPPER" else (more, less))
        return tuple(found)


@dataclass(frozen=True)
class Use:
    """An input of a weight: the value's name, and the patches that are taken of it.

    transposed  a Gemm that reads its input [columns, n]
    """

    value: str
    geometry: Geometry | None = None
    transposed: bool = False


@dataclass
class Weight:
    """What is known of an initializer: its role, and the inputs it is multiplied with.

    uses  in the order of the nodes; empty where nothing multiplies by it, and where it is UNCLEAR
    """

    role: Role
    uses: tuple[Use, ...] = ()


@dataclass
class _Readers:
    """The roles that an initializer's readers give it; None for a reader that gives none."""

    roles: set[Role | None] = field(default_factory=set)
    uses: list[tuple[int, Use]] = field(default_factory=list)


def weights_of_graph(model: Any) -> dict[str, Weight]:
    """Every initializer of the main graph by name, with its role. `model` is a ModelProto.

    No data is looked at; a skeleton does.
    """
    graph = model.graph
    nodes = list(graph.node)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    consumers: dict[str, list[tuple[int, int]]] = {}
    for number, node in enumerate(nodes):
        for place, value in enumerate(node.input):
            if value:
                consumers.setdefault(value, []).append((number, place))
    elsewhere = {output.name for output in graph.output} | _captured(nodes)
    constants = _passed_on(nodes, consumers, list(tensors))
    return {
        name: _weight(tensor, nodes, consumers, elsewhere, constants)
        for name, tensor in tensors.items()
    }


def _weight(
    tensor: Any, nodes: list[Any], consumers: Mapping[str, list[tuple[int, int]]],
    elsewhere: set[str], constants: set[str],
) -> Weight:  # fmt: skip
    found = _Readers()
    pending, seen = [(str(tensor.name), False)], set()
    while pending:
        value, turned = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in elsewhere:
            found.roles.add(None)
        for number, place in consumers.get(value, ()):
            node = nodes[number]
            if (passed := passes_on(node, place)) is not None:
                pending.append((node.output[0], turned != passed))
                continue
            role, use = _read(tensor, node, place, turned=turned, constants=constants)
            found.roles.add(role)
            if use is not None:
                found.uses.append((number, use))
    return _judged(tensor, found)


def _judged(tensor: Any, found: _Readers) -> Weight:
    if len(tensor.dims) < 2:
        vector = len(tensor.dims) == 1 and len(found.roles) == 1
        role = next(iter(found.roles)) if vector else None
        return Weight(role or Role.STATE)
    # A table that is also multiplied, row by row: tied embeddings.
    tied = found.roles == {Role.EMBEDDING, Role.LINEAR}
    if len(found.roles) != 1 and not tied:
        return Weight(Role.UNCLEAR)
    role = Role.EMBEDDING if tied else next(iter(found.roles)) or Role.UNCLEAR
    return Weight(role, tuple(use for _, use in sorted(found.uses, key=lambda pair: pair[0])))


def _read(
    tensor: Any, node: Any, place: int, *, turned: bool, constants: set[str]
) -> tuple[Role | None, Use | None]:
    """What one reader makes of a weight, which comes to it transposed where `turned`."""
    rank, kind = len(tensor.dims), node.op_type
    if rank == 1:
        return _VECTORS.get((kind, place)), None
    if place == 1 and node.input[0] in constants:
        return None, None
    attributes = {a.name: a for a in node.attribute}
    if node.domain == DOMAIN and node.op_type == LINEAR and place == 1 and not turned:
        is_transposed = _integer(attributes, "transposed", 0) == 1
        return (Role.CONV1D if is_transposed else Role.LINEAR), Use(node.input[0])
    if node.domain not in STANDARD:
        return None, None
    if kind == "MatMul" and place == 1 and rank == 2:
        return (Role.LINEAR if turned else Role.CONV1D), Use(node.input[0])
    if kind == "Gemm" and place == 1 and rank == 2:
        flipped = (_integer(attributes, "transB", 0) != 0) != turned
        use = Use(node.input[0], transposed=_integer(attributes, "transA", 0) != 0)
        return (Role.LINEAR if flipped else Role.CONV1D), use
    if kind == "Conv" and place == 1 and rank >= 3 and not turned:
        return Role.CONV, Use(node.input[0], _geometry(attributes, tuple(tensor.dims)))
    if kind == "Gather" and place == 0 and rank == 2 and not turned:
        axis = _integer(attributes, "axis", 0)
        return (Role.EMBEDDING if axis in (0, -2) else None), None
    return None, None


def passes_on(node: Any, place: int) -> bool | None:
    """Whether a node hands its input on: transposed (True), as it is (False), or not (None)."""
    if node.domain not in STANDARD or place != 0 or not node.output:
        return None
    if node.op_type == "Identity":
        return False
    if node.op_type == "Transpose":
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        return True if order == [1, 0] else None
    return None


def _passed_on(
    nodes: list[Any], consumers: Mapping[str, list[tuple[int, int]]], names: list[str]
) -> set[str]:
    """Values that are initializers under another name, and these themselves."""
    found: set[str] = set()
    pending = names
    while pending:
        value = pending.pop()
        if value in found:
            continue
        found.add(value)
        for number, place in consumers.get(value, ()):
            if passes_on(nodes[number], place) is not None:
                pending.append(nodes[number].output[0])
    return found


def _captured(nodes: list[Any]) -> set[str]:
    """Names that graphs inside of nodes read or give out, their own ones among them."""
    found: set[str] = set()
    for graph in _inner(nodes):
        for node in graph.node:
            found.update(node.input)
        found.update(output.name for output in graph.output)
    return found


def _inner(nodes: list[Any]) -> Iterator[Any]:
    pending = list(nodes)
    while pending:
        for attribute in pending.pop().attribute:
            graphs = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
            for graph in graphs:
                yield graph
                pending.extend(graph.node)


def _integer(attributes: Mapping[str, Any], name: str, default: int) -> int:
    return int(attributes[name].i) if name in attributes else default


def _geometry(attributes: Mapping[str, Any], shape: tuple[int, ...]) -> Geometry:
    axes = len(shape) - 2

    def numbers(name: str, default: int, count: int) -> tuple[int, ...]:
        found = tuple(int(n) for n in attributes[name].ints) if name in attributes else ()
        return found if len(found) == count else (default,) * count

    pads = numbers("pads", 0, 2 * axes)
    auto = attributes["auto_pad"].s.decode("ascii", "replace") if "auto_pad" in attributes else ""
    if auto == "VALID":
        pads = (0,) * (2 * axes)
    return Geometry(
        kernel=shape[2:],
        strides=numbers("strides", 1, axes),
        dilations=numbers("dilations", 1, axes),
        pads=tuple((pads[a], pads[a + axes]) for a in range(axes)),
        groups=_integer(attributes, "group", 1),
        auto=auto if auto in ("SAME_UPPER", "SAME_LOWER") else "NOTSET",
    )
