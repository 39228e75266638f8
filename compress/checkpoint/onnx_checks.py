"""Checks of a parsed ONNX model: what is not understood, or could mean two things, is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compress.checkpoint.onnx_tensors import check_inline
from compress.checkpoint.onnx_uses import STANDARD
from compress.checkpoint.skeleton import DOMAIN, LINEAR
from compress.errors import InputError, show

MAX_DEPTH = 24  # of graphs in nodes of graphs; protobuf itself stops at 32
# Domains whose operators onnx and onnxruntime bring; no others are ever loaded.
DOMAINS = frozenset({
    "", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training", "com.microsoft",
    "com.microsoft.nchwc", "com.ms.internal.nhwc",
})  # fmt: skip
# Operators on integer codes of weights; further ones by the parts of their names.
_CODED = frozenset({
    "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "GatherBlockQuantized", "QMoE", "QGemm",
    "QAttention", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "DequantizeLinear",
    "QEmbedLayerNormalization", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
})  # fmt: skip
_CODES = frozenset({2, 3, 4, 5, 6, 17, 18, 19, 20, 21, 22, 23, 25, 26})  # TensorProto.DataType


def check_model(model: Any, where: str, *, is_skeleton: bool = False) -> None:
    """Check a ModelProto but for the data of its initializers. Raises InputError.

    where        the file's name, safe to print
    is_skeleton  take the operator of skeletons as well
    """
    if not model.HasField("graph") or not model.graph.node:
        raise _refused(f"{where}: a graph without nodes", hint="is this an ONNX model?")
    if not model.graph.output:
        raise _refused(f"{where}: a graph without outputs")
    for function in model.functions:
        _require_text(where, function.name, function.domain, *function.input, *function.output)
    imports = _imports(model.opset_import, where)
    if not imports:
        raise _refused(f"{where}: no opset_import, so what its operators do is not known")
    functions = {(_domain(f.domain), f.name) for f in model.functions}
    if len(functions) != len(model.functions):
        raise _refused(f"{where}: two functions with one name")
    if is_skeleton:
        functions.add((DOMAIN, LINEAR))
    for graph, depth in _graphs(model.graph):
        if depth > MAX_DEPTH:
            raise _refused(f"{where}: graphs inside of graphs, more than {MAX_DEPTH} levels deep")
        _check_graph(graph, imports, functions, where, is_main=depth == 0)
    for function in model.functions:
        if not function.name or _domain(function.domain) in STANDARD:
            raise _refused(
                f"{where}: function '{show(function.name)}' stands for an operator of ONNX itself"
            )
        own = _imports(function.opset_import, where)
        for graph, depth in _graphs(function):
            if depth > MAX_DEPTH:
                raise _refused(f"{where}: function '{show(function.name)}' is nested too deep")
            _check_nodes(graph, own | imports, functions, where)
            if depth:
                _check_inner(graph, where)


def refuse_coded(model: Any, where: str) -> None:
    """Raises InputError for a graph whose weights are integer codes already."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    renamed = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Identity" and len(node.input) == 1 and len(node.output) == 1
    }
    for node in model.graph.node:
        if not _is_coded(node.op_type):
            continue
        only_first = node.op_type == "DequantizeLinear"
        read = [
            tensors.get(renamed.get(v, v)) for v in (node.input[:1] if only_first else node.input)
        ]
        codes = [t for t in read if t is not None and t.data_type in _CODES]
        if codes:
            worst = max(codes, key=lambda tensor: len(tensor.dims))
            raise _refused(
                f"{where}: tensor '{show(worst.name)}': integer codes for node"
                f" '{show(node.name or node.output[0])}' ({show(node.op_type)}): the model is"
                " already quantized",
                hint="start from the original, unquantized model",
            )


def _is_coded(kind: str) -> bool:
    return kind in _CODED or kind.startswith(("QLinear", "QOrdered"))


def _refused(message: str, *, hint: str = "export the model again") -> InputError:
    return InputError(message, hint=hint)


def _check_graph(
    graph: Any, imports: set[str], functions: set[tuple[str, str]], where: str, *, is_main: bool
) -> None:
    seen: set[str] = set()
    values = [v.name for v in (*graph.input, *graph.output, *graph.value_info)]
    _require_text(where, graph.name, *values)
    for name in [t.name for t in graph.initializer] + [
        t.values.name for t in graph.sparse_initializer
    ]:
        _require_text(where, name)
        if not name or name == "__metadata__":
            raise _refused(f"{where}: an initializer called '{show(name)}'")
        if name in seen:
            raise _refused(f"{where}: tensor '{show(name)}': two initializers with this name")
        seen.add(name)
    _check_nodes(graph, imports, functions, where)
    given = seen | {value.name for value in graph.input}
    for node in graph.node:
        for name in node.output:
            if name and name in given:
                what = "an initializer" if name in seen else "an input or another node's output"
                raise _refused(
                    f"{where}: tensor '{show(name)}': the output of node"
                    f" '{show(node.name or node.op_type)}' is {what} as well"
                )
            given.add(name)
    if not is_main:
        _check_inner(graph, where)
    for sparse in graph.sparse_initializer:
        _check_sparse(sparse, where)


def _check_inner(graph: Any, where: str) -> None:
    for tensor in graph.initializer:
        check_inline(tensor, where)


def _check_nodes(
    graph: Any, imports: set[str], functions: set[tuple[str, str]], where: str
) -> None:
    for node in graph.node:
        names = [a.name for a in node.attribute]
        _require_text(where, node.op_type, node.domain, node.name, *names)
        _require_text(where, *node.input, *node.output)
        domain = _domain(node.domain)
        called = f"node '{show(node.name or ', '.join(node.output))}' ({show(node.op_type)})"
        if not node.op_type:
            raise _refused(f"{where}: node '{show(node.name)}' has no operator")
        if (domain, node.op_type) not in functions and domain not in DOMAINS:
            raise _refused(
                f"{where}: {called}: unknown operator domain '{show(domain)}'",
                hint="only operators that onnxruntime brings are read, and no others are loaded",
            )
        if domain not in imports:
            raise _refused(
                f"{where}: {called}: operator domain '{show(domain)}' is in no opset_import"
            )
        if not node.output:
            raise _refused(f"{where}: {called} has no output")
        for attribute in node.attribute:
            if attribute.HasField("t"):
                check_inline(attribute.t, where)
            for tensor in attribute.tensors:
                check_inline(tensor, where)
            if attribute.HasField("sparse_tensor"):
                _check_sparse(attribute.sparse_tensor, where)
            for sparse in attribute.sparse_tensors:
                _check_sparse(sparse, where)


def _check_sparse(sparse: Any, where: str) -> None:
    for tensor in (sparse.values, sparse.indices):
        check_inline(tensor, where)


def _graphs(root: Any) -> Iterator[tuple[Any, int]]:
    """A graph (or function) and the graphs inside its nodes, with their depth."""
    pending = [(root, 0)]
    while pending:
        graph, depth = pending.pop()
        yield graph, depth
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append((attribute.g, depth + 1))
                pending.extend((inner, depth + 1) for inner in attribute.graphs)


def _imports(entries: Any, where: str) -> set[str]:
    found: dict[str, int] = {}
    for entry in entries:
        _require_text(where, entry.domain)
        domain = _domain(entry.domain)
        if found.setdefault(domain, entry.version) != entry.version:
            raise _refused(f"{where}: two versions of operator domain '{show(domain)}'")
    return set(found)


def _require_text(where: str, *texts: Any) -> None:
    """Raises InputError for strings of a message that are not UTF-8, which come as bytes."""
    for text in texts:
        if not isinstance(text, str):
            raise _refused(f"{where}: a name in the graph is not UTF-8: {show(repr(text))}")


def _domain(domain: str) -> str:
    return "" if domain in STANDARD else str(domain)
