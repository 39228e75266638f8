"""From a skeleton to the graph that runs: operators for compressed weights, pointers for the rest.

A node that multiplies by a compressed weight becomes

    y = base(x) + (x A^T) B^T + x[columns] D + bias

with the terms that the weight has. `base` is MatMulNBits where blocks fit the groups, else a
DequantizeLinear in front of a MatMul or Conv; a table becomes GatherBlockQuantized, or a Gather of
signed bytes and of scales. A node that reads a compressed weight in any other way gets its decoded
values, which are named in `Facts.dense`: never a wrong graph, and never silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.checkpoint import skeleton
from compress.checkpoint.skeleton import TAGS, TYPES
from compress.errors import InputError, show
from compress.export_onnx.builder import (
    FLOAT,
    FLOAT16,
    MICROSOFT,
    Builder,
    Copy,
    Facts,
)
from compress.export_onnx.matrices import SPREAD_OPSET, Matrix, opset_of
from compress.export_onnx.operators import Operators, give_name
from compress.export_onnx.options import OPSET
from compress.export_onnx.stored import Weights
from compress.export_onnx.style import Style
from compress.export_onnx.uses import use_of
from compress.formats.base import MODEL, Entry
from compress.formats.onnx_forms import Kind
from compress.tensor import FLOAT_TAGS

_BLOCK_TYPES = (FLOAT, FLOAT16)  # of activations that the block operators take


@dataclass(frozen=True)
class Lowered:
    """A graph that runs, and what is to be written for it.

    model   ModelProto whose weights point into the output's files and `model.onnx.data`
    copies  the arrays of `model.onnx.data` in order; data_bytes its size
    """

    model: Any
    copies: tuple[Copy, ...]
    data_bytes: int
    facts: Facts


def lower(graph: Any, weights: Weights, style: Style, called: str | None = None) -> Lowered:
    """Turn a skeleton (ModelProto) into the graph that reads an output's weights.

    called  the file that the graph was read from, which errors name; None for a captured one
    Raises InputError where the graph names a weight that the output has not, of another shape, or
    as integers where it holds floats.
    """
    try:
        return _Lowering(graph, weights, style).run()
    except InputError as error:
        if called is None:
            raise
        raise InputError(f"{show(called)}: {error.message}", hint=error.hint) from error


class _Lowering:
    def __init__(self, graph: Any, weights: Weights, style: Style) -> None:
        from onnx import ModelProto

        self.model = ModelProto()
        self.model.CopyFrom(graph)
        self.weights, self.style = weights, style
        self.wanted = skeleton.weights_of(self.model)
        self.builder = Builder(weights, style, _names(self.model))
        self.facts = self.builder.facts
        self.outer = self.model.graph
        self.matrices: dict[str, Matrix] = {}
        self.narrow: dict[str, str] = {}  # weights as they are stored, behind no Cast
        if all(o.domain not in ("", "ai.onnx") for o in self.model.opset_import):
            self.model.opset_import.add(version=OPSET)  # of the operators that are put in
        self.opset = _opset(self.model)

    def run(self) -> Lowered:
        for name, tensor in self.wanted.items():
            self._check(name, tensor)
        compressed = {
            name: Matrix(self.builder, entry, self.wanted[name].data_type)
            for name in self.wanted
            if (entry := self.weights.entries.get(name)) is not None and self._is_coded(entry)
        }
        readers = _readers(self.outer)
        lost = _read_inside(self.model)
        for name, matrix in compressed.items():
            nodes = readers.get(name, [])
            why = self._obstacle(matrix, nodes, is_inside=name in lost)
            if why is not None:
                self.facts.dense[name] = why
            else:
                self.matrices[name] = matrix
        self._raise_opset(max((self._opset_of(m) for m in self.matrices.values()), default=1))
        kept = [t for t in self.outer.initializer if t.name not in self.wanted]
        # A weight's name is free for the cast or decoded value that takes its place.
        for name, tensor in self.wanted.items():
            if name not in self.matrices:
                used = [] if name in lost else readers.get(name, [])
                self._plain(name, tensor, compressed.get(name), used)
        self.operators = Operators(self.builder)
        body: list[Any] = []
        for node in self.outer.node:
            self._add(node, body)
        del self.outer.node[:], self.outer.initializer[:]
        self.outer.node.extend([*self.builder.prelude, *body])
        self.outer.initializer.extend([*kept, *self.builder.initializers])
        self._drop_unused()
        self._finish()
        return Lowered(self.model, tuple(self.builder.copies), self.builder.data_bytes, self.facts)

    # -- what can be lowered ---------------------------------------------------------------------

    def _is_coded(self, entry: Entry) -> bool:
        """Whether the weight file has other arrays than the tensor itself."""
        terms = entry.terms
        return terms.codes is not None or terms.rank > 0 or self.weights.format == "native"

    def _check(self, name: str, tensor: Any) -> None:
        info = self.weights.info(name)
        if tuple(tensor.dims) != info.shape:
            raise InputError(
                f"the graph reads the weight {show(name)} as {list(tensor.dims)}, the weight files"
                f" hold {list(info.shape)}"
            )
        if (TAGS.get(tensor.data_type) in FLOAT_TAGS) != (info.dtype in FLOAT_TAGS):
            wanted = TAGS.get(tensor.data_type, f"data type {tensor.data_type}")
            raise InputError(
                f"the graph reads the weight {show(name)} as {wanted}, the weight files hold"
                f" {show(info.dtype)}"
            )

    def _obstacle(self, matrix: Matrix, nodes: Sequence[Any], *, is_inside: bool) -> str | None:
        """Why a compressed weight has to be dense in the graph, or None."""
        if is_inside:
            return "it is read inside a branch or loop"
        if any(output.name == matrix.name for output in self.outer.output):
            return "it is an output of the graph"
        if matrix.data_type not in _BLOCK_TYPES:
            return "activations are neither float32 nor float16"
        uses = {use_of(node, matrix.info).op for node in nodes}
        if "" in uses or not uses:
            kinds = sorted({n.op_type for n in nodes if not use_of(n, matrix.info).op})
            return f"it is read by {', '.join(kinds) or 'no node'}"
        terms = matrix.entry.terms
        if "gather" in uses and (terms.outlier_columns[1] or not _is_matrix(matrix)):
            return "a table with exact entries"
        if uses == {"gather", "linear"} and matrix.codes is not None:
            form = matrix.form()
            if form.kind is not Kind.BLOCKS:
                return None if form.count == 1 else "a table with groups that is multiplied, too"
        return None

    def _opset_of(self, matrix: Matrix) -> int:
        """The oldest opset that has the operators for a weight."""
        if matrix.codes is None:
            return 1
        form = matrix.form()
        if form.kind is Kind.BLOCKS and self.style.style == "nbits":
            return 1 if form.repeat == 1 else SPREAD_OPSET
        return opset_of(form, matrix.data_type)

    def _raise_opset(self, version: int) -> None:
        """Bring the graph to an opset, where its own is older."""
        if self.opset >= version:
            return
        from compress.export_onnx.opset import raised

        own = [o for o in self.model.opset_import if o.domain not in ("", "ai.onnx")]
        self.model = raised(self.model, version)
        present = {o.domain for o in self.model.opset_import}
        self.model.opset_import.extend(o for o in own if o.domain not in present)
        self.outer = self.model.graph
        self.wanted = skeleton.weights_of(self.model)
        self.opset = version

    # -- nodes -----------------------------------------------------------------------------------

    def _add(self, node: Any, body: list[Any]) -> None:
        """Append the node, or what takes its place."""
        name = next((value for value in node.input if value in self.matrices), None)
        if name is None:
            if node.domain == skeleton.DOMAIN:
                self.operators.dense_linear(node, body)
            elif (table := self._narrow_table(node)) is not None:
                held, wanted = self.narrow[table], self.wanted[table].data_type
                self.operators.narrow_rows(node, held, wanted, body)
            else:
                body.append(node)
            return
        matrix = self.matrices[name]
        use = use_of(node, matrix.info)
        if use.op == "gather":
            found = self.operators.gather(matrix, use, body)
            give_name(body, found, node.output[0])
            return
        make = self.operators.conv if use.op == "conv" else self.operators.linear
        make(matrix, use, node, body)

    # -- weights that are not compressed ---------------------------------------------------------

    def _narrow_table(self, node: Any) -> str | None:
        """The table of 16 bits that a node gathers rows of, if it does."""
        read = (value for value in node.input if value in self.narrow)
        return next((v for v in read if use_of(node, self.weights.info(v)).op == "gather"), None)

    def _plain(self, name: str, tensor: Any, matrix: Matrix | None, readers: Sequence[Any]) -> None:
        """The weight under its own name: a pointer, a pointer behind a Cast, or decoded values."""
        from onnx import helper

        builder = self.builder
        if matrix is not None:
            held = builder.copied(f"{name}.decoded", FLOAT, tensor.dims, matrix.decoded)
            have = FLOAT
        else:
            stored = self.weights.array(MODEL, name)
            if stored.dtype not in TYPES:
                raise InputError(
                    f"tensor {show(name)}: ONNX has no {stored.dtype} weights",
                    hint="store it in another dtype: --untouched bf16 or fp16",
                )
            have = TYPES[stored.dtype]
            if have == tensor.data_type and builder.named(stored, name, have, stored.shape) == name:
                return
            held = builder.pointer(stored, f"{name}.stored", have, stored.shape)
        op_type, attributes = "Identity", {}
        if have != tensor.data_type:
            op_type, attributes = "Cast", {"to": tensor.data_type}
            if len(tensor.dims) > 1:
                self.narrow[name] = held
                uses = {use_of(node, self.weights.info(name)).op for node in readers}
                if uses == {"gather"} and name not in {o.name for o in self.outer.output}:
                    return  # its rows are cast
        builder.prelude.append(
            helper.make_node(
                op_type, [held], [name], name=builder.unique(f"{name}.load"), **attributes
            )
        )

    def _drop_unused(self) -> None:
        """Take away initializers that nothing reads any more, and inputs that stood for weights."""
        used = {
            value for one in skeleton.graphs_of(self.model) for n in one.node for value in n.input
        }
        used |= {output.name for output in self.outer.output}
        kept = [t for t in self.outer.initializer if t.name in used]
        del self.outer.initializer[:]
        self.outer.initializer.extend(kept)
        inputs = [i for i in self.outer.input if i.name not in self.wanted]
        del self.outer.input[:]
        self.outer.input.extend(inputs)
        infos = [i for i in self.outer.value_info if i.name not in self.wanted]
        del self.outer.value_info[:]
        self.outer.value_info.extend(infos)

    def _finish(self) -> None:
        """Domains, and the one line that says who made the file."""
        from onnx import helper

        from compress import __version__

        kept = [o for o in self.model.opset_import if o.domain != skeleton.DOMAIN]
        domains = {o.domain for o in kept}
        if any(n.domain == MICROSOFT for n in self.outer.node) and MICROSOFT not in domains:
            kept.append(helper.make_opsetid(MICROSOFT, 1))
        del self.model.opset_import[:]
        self.model.opset_import.extend(kept)
        skeleton.strip_metadata(self.model)
        self.model.producer_name, self.model.producer_version = "compress", __version__


def _readers(graph: Any) -> Mapping[str, list[Any]]:
    """Nodes of the outer graph by what they read."""
    found: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            found.setdefault(name, []).append(node)
    return found


def _read_inside(model: Any) -> set[str]:
    """Names that graphs inside of nodes read."""
    return {
        value
        for one in skeleton.graphs_of(model)
        if one is not model.graph
        for node in one.node
        for value in node.input
    }


def _names(model: Any) -> set[str]:
    names = {value for one in skeleton.graphs_of(model) for n in one.node for value in n.output}
    names |= {node.name for one in skeleton.graphs_of(model) for node in one.node}
    graph = model.graph
    for kind in (graph.initializer, graph.input, graph.output):
        names |= {one.name for one in kind}
    return names


def _opset(model: Any) -> int:
    return int(next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")))


def _is_matrix(matrix: Matrix) -> bool:
    return len(matrix.info.shape) == 2
