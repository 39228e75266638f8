"""Checks of a graph that operators are put into: what the lowering takes for granted is so.

compress/checkpoint/onnx_checks.py says whether a graph can be understood. Here every value that a
node reads is given by something, every node has the inputs that its operator takes, and the one
operator that skeletons have of their own is used as it is written.
"""

from __future__ import annotations

from typing import Any

from compress.checkpoint import skeleton
from compress.checkpoint.onnx_checks import check_model
from compress.checkpoint.onnx_tensors import check_inline, needed_bytes
from compress.checkpoint.onnx_uses import STANDARD
from compress.errors import InputError, show

_INT = 2  # AttributeProto.AttributeType
_DAMAGED = "the file was changed: see compress verify"
_INVALID = "no runtime loads such a graph: export the model again"


def check_skeleton(model: Any, where: str) -> None:
    """Check the skeleton of an output, which may come from a stranger. Raises InputError.

    where  the file's name, safe to print
    """
    check_model(model, where, is_skeleton=True)
    check_lowerable(model, where)
    for graph in skeleton.graphs_of(model):
        for node in graph.node:
            if node.domain == skeleton.DOMAIN and graph is not model.graph:
                raise InputError(
                    f"{where}: {_called(node)} lies in a graph inside of a node", hint=_DAMAGED
                )
    matrices = {t.name for t in model.graph.initializer if len(t.dims) == 2}
    for node in model.graph.node:
        if node.domain == skeleton.DOMAIN and node.op_type == skeleton.LINEAR:
            _check_linear(node, matrices, where)
    for tensor in model.graph.initializer:
        if not tensor.data_location:
            check_inline(tensor, where)
            continue
        called = f"{where}: tensor '{show(tensor.name)}'"
        if not skeleton.is_weight(tensor):
            raise InputError(f"{called}: its data is said to lie elsewhere", hint=_DAMAGED)
        needed_bytes(where, tensor.name, tensor.data_type, list(tensor.dims))
        if tensor.data_type not in skeleton.TAGS:
            raise InputError(
                f"{called}: data type {tensor.data_type}, which no weight has", hint=_DAMAGED
            )


def check_lowerable(model: Any, where: str) -> None:
    """Check what `onnx_checks.check_model` has passed for what the lowering relies on.

    Raises InputError for an opset that the package onnx does not know, a value that nothing gives,
    a node of the main graph that its operator's definition forbids.
    """
    version = _opset(model, where)
    graph = model.graph
    given = {value.name for value in (*graph.input, *graph.initializer)}
    given |= {sparse.values.name for sparse in graph.sparse_initializer}
    given |= {name for node in graph.node for name in node.output if name}
    for node in graph.node:
        for name in node.input:
            if name and name not in given:
                raise InputError(
                    f"{where}: {_called(node)} reads '{show(name)}', which is no input, no"
                    " initializer and no node's output",
                    hint=_INVALID,
                )
    for output in graph.output:
        if output.name not in given:
            raise InputError(
                f"{where}: nothing computes the output '{show(output.name)}' of the graph",
                hint=_INVALID,
            )
    _check_nodes(model, version, where)


def _check_linear(node: Any, matrices: set[str], where: str) -> None:
    """x, a matrix of the graph, maybe a bias; `transposed` is 0 or 1."""
    called = f"{where}: {_called(node)}"
    inputs = list(node.input)
    if len(inputs) not in (2, 3) or not all(inputs[:2]):
        raise InputError(f"{called}: {len(inputs)} inputs, it takes 2 or 3", hint=_DAMAGED)
    if inputs[1] not in matrices:
        raise InputError(
            f"{called}: its second input '{show(inputs[1])}' is no matrix among the weights",
            hint=_DAMAGED,
        )
    if len(node.output) != 1 or not node.output[0]:
        raise InputError(f"{called}: {len(node.output)} outputs, it gives one", hint=_DAMAGED)
    for attribute in node.attribute:
        known = attribute.name == "transposed" and attribute.type == _INT
        if not known or attribute.i not in (0, 1) or attribute.ref_attr_name:
            raise InputError(
                f"{called}: attribute '{show(attribute.name)}' is not transposed = 0 or 1",
                hint=_DAMAGED,
            )


def _opset(model: Any, where: str) -> int:
    """The version of the operators of ONNX itself; the newest one where none is used."""
    from onnx import defs

    newest = int(defs.onnx_opset_version())
    version = next((o.version for o in model.opset_import if o.domain in STANDARD), newest)
    if not 1 <= version <= newest:
        raise InputError(
            f"{where}: opset {version}, the installed package onnx knows 1 to {newest}",
            hint="a newer onnx may know it" if version > newest else _INVALID,
        )
    return int(version)


def _check_nodes(model: Any, version: int, where: str) -> None:
    """Hold the main graph's nodes to the definitions of ONNX, where it has one."""
    from onnx import checker, defs

    context: Any = checker.C.CheckerContext()
    context.ir_version = max(1, model.ir_version)
    context.opset_imports = {"": version}
    for node in model.graph.node:
        if node.domain not in STANDARD or not defs.has(node.op_type, version, ""):
            continue  # onnxruntime has operators of its own, in the default domain too
        if any(a.HasField("g") or len(a.graphs) for a in node.attribute):
            continue  # these read values of the graph around them, which the checker is not told
        try:
            checker.check_node(node, context)
        except (checker.ValidationError, RuntimeError) as error:
            raise InputError(
                f"{where}: {_called(node)}: {show(str(error).strip().splitlines()[0], 200)}",
                hint=_INVALID,
            ) from error


def _called(node: Any) -> str:
    return f"node '{show(node.name or ', '.join(node.output))}' ({show(node.op_type)})"
