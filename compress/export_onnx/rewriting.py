"""From what torch exports to a skeleton: weights and axes by name, no traces of the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compress import __version__
from compress.checkpoint import skeleton
from compress.errors import InputError, show
from compress.export_onnx.named_weights import WEIGHT
from compress.export_onnx.tasks import PAST, SEQUENCE, TOTAL, Input

_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_FLOAT = skeleton.TYPES["F32"]
# The oldest IR version that may hold an opset; readers refuse what is newer than they are.
_IR = {24: 12, 25: 13}
_OLDEST_IR = 10


def to_skeleton(
    model: Any, shapes: Mapping[str, tuple[int, ...]], inputs: Sequence[Input], task: str
) -> None:
    """Turn an exported model into a skeleton, in place.

    shapes  of the stored tensors, by name
    Raises InputError where a stored tensor is called as an input or an output is, or where the
    model's code fixed the size of an axis that has to be free.
    """
    opset = max(one.version for one in model.opset_import if one.domain == "")
    _name_weights(model.graph, shapes)
    _name_axes(model.graph, inputs)
    skeleton.strip_metadata(model)
    model.ir_version = _IR.get(opset, _OLDEST_IR)
    model.producer_name, model.producer_version = "compress", __version__
    model.graph.name = task


def _name_weights(graph: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Put an initializer that is called as the tensor is in the place of each Weight node."""
    found: dict[str, str] = {}  # value -> tensor
    kept = []
    for node in graph.node:
        if node.domain == skeleton.DOMAIN and node.op_type == WEIGHT:
            found[node.output[0]] = _attribute(node, "name")
        else:
            kept.append(node)
    taken = set(found.values())
    for value in (*graph.input, *graph.output):
        if value.name in taken:
            raise InputError(
                f"tensor {show(value.name)}: an input or output of the graph has its name",
                hint="rename the tensor in the checkpoint",
            )
    renamed = found | {name: f"{name}.value" for name in _values(graph, found) if name in taken}
    del graph.node[:]
    graph.node.extend(kept)
    for one in _graphs(graph):
        _rename(one, renamed)
    used = {name for one in _graphs(graph) for node in one.node for name in node.input}
    graph.initializer.extend(
        skeleton.weight(name, _FLOAT, shapes[name]) for name in shapes if name in used & taken
    )
    drop = [i for i, value in enumerate(graph.value_info) if value.name in taken]
    for index in reversed(drop):
        del graph.value_info[index]


def _attribute(node: Any, name: str) -> str:
    return next(str(a.s.decode()) for a in node.attribute if a.name == name)


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and the graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _values(graph: Any, weights: Mapping[str, str]) -> set[str]:
    """The names of all values that are computed or constant, without the weights."""
    names: set[str] = set()
    for one in _graphs(graph):
        names.update(name for node in one.node for name in node.output)
        names.update(tensor.name for tensor in one.initializer)
    return names - weights.keys()


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    for node in graph.node:
        for values in (node.input, node.output):
            for index, name in enumerate(values):
                if name in names:
                    values[index] = names[name]
    for one in (*graph.initializer, *graph.value_info, *graph.input, *graph.output):
        one.name = names.get(one.name, one.name)


def _name_axes(graph: Any, inputs: Sequence[Input]) -> None:
    """Call axes by what they are, wherever the graph's shapes speak of them."""
    known: dict[str, str] = {}
    values = {value.name: value for value in graph.input}
    for one in inputs:
        for axis, dim in zip(one.axes, _dims(values[one.name]), strict=True):
            if not isinstance(axis, str):
                continue
            if not dim.dim_param:
                raise InputError(
                    f"the model's code allows {dim.dim_value} only as the {axis} axis of"
                    f" {one.name}, so a graph of any size cannot be captured"
                )
            if _SYMBOL.fullmatch(dim.dim_param):
                known.setdefault(dim.dim_param, axis)
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in _dims(value):
            if dim.dim_param:
                dim.dim_param = _named(dim.dim_param, known)
    for one in inputs:  # an axis that torch found to be a sum of others
        for axis, dim in zip(one.axes, _dims(values[one.name]), strict=True):
            if isinstance(axis, str):
                dim.dim_param = axis


def _named(expression: str, known: dict[str, str]) -> str:
    """An expression of torch's symbols in our names; a symbol of no input gets a number."""

    def name(match: re.Match[str]) -> str:
        return known.setdefault(match[0], f"axis_{len(known)}")

    named = _SYMBOL.sub(name, expression)
    return TOTAL if set(named.split(" + ")) == {PAST, SEQUENCE} else named


def _dims(value: Any) -> Any:
    return value.type.tensor_type.shape.dim
