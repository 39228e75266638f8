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

import numpy as np

from compress.checkpoint import skeleton
from compress.checkpoint.skeleton import TYPES
from compress.errors import InputError, show
from compress.export_onnx.builder import (
    DATA_FILE,
    FLOAT,
    FLOAT16,
    MICROSOFT,
    Builder,
    Copy,
    Facts,
)
from compress.export_onnx.matrices import SPREAD_OPSET, Matrix, dequantize, opset_of
from compress.export_onnx.stored import Weights
from compress.export_onnx.style import Style
from compress.export_onnx.transposed import dequantize_transposed
from compress.formats.base import MODEL, Entry
from compress.formats.onnx_forms import Form, Kind
from compress.tensor import Array, Role

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


@dataclass(frozen=True)
class _Use:
    """How a node reads a weight: `op` is linear, conv or gather; "" means in another way."""

    op: str
    value: str = ""
    bias: str = ""


def lower(graph: Any, weights: Weights, style: Style) -> Lowered:
    """Turn a skeleton (ModelProto) into the graph that reads an output's weights.

    Raises InputError where the graph names a weight that the output has not, or of another shape.
    """
    return _Lowering(graph, weights, style).run()


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
                self._plain(name, tensor, compressed.get(name))
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

    def _obstacle(self, matrix: Matrix, nodes: Sequence[Any], *, is_inside: bool) -> str | None:
        """Why a compressed weight has to be dense in the graph, or None."""
        if is_inside:
            return "it is read inside a branch or loop"
        if any(output.name == matrix.name for output in self.outer.output):
            return "it is an output of the graph"
        if matrix.data_type not in _BLOCK_TYPES:
            return "activations are neither float32 nor float16"
        uses = {self._use(node, matrix.name).op for node in nodes}
        if "" in uses or not uses:
            kinds = sorted({n.op_type for n in nodes if not self._use(n, matrix.name).op})
            return f"it is read by {', '.join(kinds) or 'no node'}"
        terms = matrix.entry.terms
        if "gather" in uses and (terms.outlier_columns[1] or not _is_matrix(matrix)):
            return "a table with exact entries"
        if uses == {"gather", "linear"} and matrix.codes is not None:
            form = matrix.form()
            if form.kind is not Kind.BLOCKS:
                return None if form.count == 1 else "a table with groups that is multiplied, too"
        return None

    def _use(self, node: Any, name: str) -> _Use:
        """How a node reads the weight."""
        places = [n for n, value in enumerate(node.input) if value == name]
        if len(places) != 1:
            return _Use("")
        attributes = {a.name: a for a in node.attribute}
        role = self.weights.info(name).role
        is_transposed = role is Role.CONV1D
        if node.domain == skeleton.DOMAIN and node.op_type == skeleton.LINEAR and places == [1]:
            turned = _integer(attributes, "transposed", 0) == 1
            bias = node.input[2] if len(node.input) > 2 else ""
            return _Use("linear", node.input[0], bias) if turned == is_transposed else _Use("")
        if node.domain not in ("", "ai.onnx"):
            return _Use("")
        if node.op_type == "MatMul" and places == [1] and is_transposed:
            return _Use("linear", node.input[0])
        if node.op_type == "Gemm" and places == [1]:
            plain = all(
                abs(attributes[key].f - 1) < 1e-12 for key in ("alpha", "beta") if key in attributes
            )
            straight = _integer(attributes, "transA", 0) == 0
            turned = _integer(attributes, "transB", 0) == 0
            if plain and straight and turned == is_transposed:
                return _Use("linear", node.input[0], node.input[2] if len(node.input) > 2 else "")
        if node.op_type == "Conv" and places == [1] and role is Role.CONV:
            return _Use("conv", node.input[0], node.input[2] if len(node.input) > 2 else "")
        if node.op_type == "Gather" and places == [0] and _integer(attributes, "axis", 0) == 0:
            return _Use("gather" if not is_transposed else "", node.input[1])
        return _Use("")

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
                self._dense_linear(node, body)
            else:
                body.append(node)
            return
        matrix, use = self.matrices[name], self._use(node, name)
        if use.op == "gather":
            found = self._gather(matrix, use, body)
            _identity(body, found, node.output[0])
            return
        make = self._conv if use.op == "conv" else self._linear
        make(matrix, use, node, body)

    def _linear(self, matrix: Matrix, use: _Use, node: Any, body: list[Any]) -> None:
        """y = base(x) + pairs + columns + bias."""
        builder, name = self.builder, matrix.name
        parts: list[str] = []
        pairs, columns = matrix.pairs(), matrix.super_columns()
        alone = not pairs and columns is None
        bias = use.bias
        fused = bool(bias) and alone and self._is_vector(bias, matrix.rows)
        parts.append(self._product(matrix, use.value, bias if fused else "", body))
        for pair in pairs:
            a = self._turned(pair.a, f"{name}.a")
            b = self._turned(pair.b, f"{name}.b")
            inner = builder.node(body, "MatMul", [use.value, a], f"{name}.inner")
            parts.append(builder.node(body, "MatMul", [inner, b], f"{name}.low_rank"))
            self.facts.operators["low-rank pairs"] += 1
        if columns is not None:
            picked = builder.node(
                body, "Gather", [use.value, columns.index], f"{name}.picked", axis=-1
            )
            parts.append(builder.node(body, "MatMul", [picked, columns.values], f"{name}.super"))
            self.facts.operators["super-weight columns"] += 1
        if bias and not fused:
            parts.append(bias)
        self._sum(parts, node.output[0], body, name)

    def _product(self, matrix: Matrix, value: str, bias: str, body: list[Any]) -> str:
        """x times the codes (or the plain matrix), with the bias where there is one."""
        builder, name = self.builder, matrix.name
        if matrix.codes is None:
            held = matrix.plain()
            if matrix.info.role is not Role.CONV1D:
                held = self._turned(held, name)
            found = builder.node(body, "MatMul", [value, held], f"{name}.product")
            return self._plus(found, bias, body, name)
        form = matrix.form()
        if form.kind is Kind.BLOCKS and self.style.style == "nbits":
            return self._nbits(matrix, form, value, bias, body)
        if form.kind is Kind.BLOCKS:
            held = dequantize_transposed(matrix, body, form)
        else:
            held = self._turned(dequantize(matrix, body, form), name, body)
        found = builder.node(body, "MatMul", [value, held], f"{name}.product")
        return self._plus(found, bias, body, name)

    def _nbits(self, matrix: Matrix, form: Form, value: str, bias: str, body: list[Any]) -> str:
        codes, scales, points = matrix.blocks(form)
        inputs = [value, codes, scales, points, "", bias]
        while inputs and not inputs[-1]:
            inputs.pop()
        self.facts.operators[f"MatMulNBits {form.bits} bits"] += 1
        return self.builder.node(
            body,
            "MatMulNBits",
            inputs,
            f"{matrix.name}.product",
            MICROSOFT,
            K=matrix.columns,
            N=matrix.rows,
            bits=form.bits,
            block_size=form.block,
            accuracy_level=self.style.level(form.bits),
        )

    def _conv(self, matrix: Matrix, use: _Use, node: Any, body: list[Any]) -> None:
        """A Conv with the base as its kernel, and for each pair a narrow Conv and a 1x1 Conv."""
        from onnx import NodeProto

        builder, name, info = self.builder, matrix.name, matrix.info
        shape = builder.constant(f"{name}.kernel", info.shape)
        if matrix.codes is None:
            kernel = matrix.plain()
        else:
            form = matrix.form()
            kernel = dequantize(matrix, body, form)
            if form.count > 1:
                kernel = builder.node(body, "Reshape", [kernel, shape], f"{name}.reshaped")
        pairs = [(p.a, p.b, p.rank) for p in matrix.pairs()]
        columns = matrix.super_columns()
        groups = _integer({a.name: a for a in node.attribute}, "group", 1)
        if columns is not None or (pairs and groups != 1):
            kernel = self._patched(matrix, kernel, shape, body)
            pairs = []
        parts = []
        for a, b, rank in pairs:
            narrow, wide = (
                [rank, *info.shape[1:]],
                [matrix.rows, rank, *[1] * (len(info.shape) - 2)],
            )
            first = NodeProto()
            first.CopyFrom(node)
            del first.input[:], first.output[:]
            kernel_a = self._shaped(a, narrow, f"{name}.a")
            first.input.extend([use.value, kernel_a])
            first.output.append(builder.unique(f"{name}.inner"))
            first.name = first.output[0]
            body.append(first)
            kernel_b = self._shaped(b, wide, f"{name}.b")
            parts.append(
                builder.node(body, "Conv", [first.output[0], kernel_b], f"{name}.low_rank")
            )
            self.facts.operators["low-rank pairs"] += 1
        main = NodeProto()
        main.CopyFrom(node)
        main.input[1] = kernel
        if parts:
            main.output[0] = builder.unique(f"{name}.product")
        body.append(main)
        if parts:
            self._sum([main.output[0], *parts], node.output[0], body, name)

    def _patched(self, matrix: Matrix, kernel: str, shape: str, body: list[Any]) -> str:
        """The kernel plus what the other terms add to it, which lies in the data file."""
        builder, name = self.builder, matrix.name

        def make() -> Array:
            tensor = self.weights.tensor(name)
            rest = tensor.decode() - tensor.with_(factors=None, outliers=None).decode()
            return np.ascontiguousarray(rest)

        rest = matrix.copied(f"{name}.rest", FLOAT, (matrix.rows, matrix.columns), make)
        rest = builder.cast(builder.prelude, rest, FLOAT, matrix.data_type)
        rest = builder.node(builder.prelude, "Reshape", [rest, shape], f"{name}.rest.kernel")
        self.facts.operators["kernel corrections"] += 1
        return builder.node(body, "Add", [kernel, rest], f"{name}.corrected")

    def _gather(self, matrix: Matrix, use: _Use, body: list[Any]) -> str:
        """Rows of a table."""
        builder, name = self.builder, matrix.name
        if matrix.codes is None:
            rows = builder.node(body, "Gather", [matrix.plain(), use.value], f"{name}.rows", axis=0)
        else:
            form = matrix.form()
            if form.kind is Kind.BLOCKS:
                codes, scales, points = matrix.blocks(form, flat=True)
                rows = builder.node(
                    body,
                    "GatherBlockQuantized",
                    [codes, use.value, scales, *([points] if points else [])],
                    f"{name}.rows",
                    MICROSOFT,
                    bits=form.bits,
                    block_size=form.block,
                    gather_axis=0,
                    quantize_axis=1,
                )
                self.facts.operators[f"GatherBlockQuantized {form.bits} bits"] += 1
            else:
                rows = self._gathered_integers(matrix, form, use.value, body)
        for pair in matrix.pairs():
            picked = builder.node(body, "Gather", [pair.b, use.value], f"{name}.b", axis=0)
            more = builder.node(body, "MatMul", [picked, pair.a], f"{name}.low_rank")
            rows = builder.node(body, "Add", [rows, more], f"{name}.corrected")
        return rows

    def _gathered_integers(self, matrix: Matrix, form: Form, ids: str, body: list[Any]) -> str:
        """Rows of a table of bytes, decoded after they were gathered."""
        builder, name = self.builder, matrix.name
        codes = matrix.integers(form, (matrix.rows, matrix.columns))
        points = matrix.integer_zero_points(form, flat=False)
        rows = builder.node(body, "Gather", [codes, ids], f"{name}.codes.rows", axis=0)
        rows = builder.node(body, "Cast", [rows], f"{name}.codes.cast", to=matrix.data_type)
        scale = builder.node(body, "Gather", [matrix.scales(), ids], f"{name}.scale.rows", axis=0)
        self.facts.operators["Gather of 8 bits"] += 1
        if form.count == 1:
            if points:
                shift = builder.node(body, "Gather", [points, ids], f"{name}.points", axis=0)
                shift = builder.node(
                    body, "Cast", [shift], f"{name}.points.cast", to=matrix.data_type
                )
                rows = builder.node(body, "Sub", [rows, shift], f"{name}.shifted")
            return builder.node(body, "Mul", [rows, scale], f"{name}.rows")
        shape = builder.node(body, "Shape", [ids], f"{name}.ids")
        split = builder.constant(f"{name}.split", [form.count, form.block])
        grouped = builder.node(body, "Concat", [shape, split], f"{name}.grouped", axis=0)
        rows = builder.node(body, "Reshape", [rows, grouped], f"{name}.groups")
        last = builder.constant(f"{name}.last", [-1])
        if points:
            shift = builder.node(body, "Gather", [points, ids], f"{name}.points", axis=0)
            shift = builder.node(body, "Cast", [shift], f"{name}.points.cast", to=matrix.data_type)
            shift = builder.node(body, "Unsqueeze", [shift, last], f"{name}.points.wide")
            rows = builder.node(body, "Sub", [rows, shift], f"{name}.shifted")
        scale = builder.node(body, "Unsqueeze", [scale, last], f"{name}.scale.wide")
        rows = builder.node(body, "Mul", [rows, scale], f"{name}.scaled")
        width = builder.constant(f"{name}.width", [matrix.columns])
        whole = builder.node(body, "Concat", [shape, width], f"{name}.whole", axis=0)
        return builder.node(body, "Reshape", [rows, whole], f"{name}.rows")

    def _dense_linear(self, node: Any, body: list[Any]) -> None:
        """A captured Linear whose weight is not compressed: MatMul with the transposed weight."""
        attributes = {a.name: a for a in node.attribute}
        name = node.input[1]
        held = name
        if not _integer(attributes, "transposed", 0):
            held = self._turned(name, name)
        parts = [self.builder.node(body, "MatMul", [node.input[0], held], f"{name}.product")]
        if len(node.input) > 2 and node.input[2]:
            parts.append(node.input[2])
        self._sum(parts, node.output[0], body, name)

    # -- weights that are not compressed ---------------------------------------------------------

    def _plain(self, name: str, tensor: Any, matrix: Matrix | None) -> None:
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
        builder.prelude.append(
            helper.make_node(
                op_type, [held], [name], name=builder.unique(f"{name}.load"), **attributes
            )
        )

    # -- small things ----------------------------------------------------------------------------

    def _turned(self, value: str, name: str, nodes: list[Any] | None = None) -> str:
        where = self.builder.prelude if nodes is None else nodes
        return self.builder.node(where, "Transpose", [value], f"{name}.transposed", perm=[1, 0])

    def _shaped(self, value: str, shape: Sequence[int], name: str) -> str:
        dims = self.builder.constant(f"{name}.shape", list(shape))
        return self.builder.node(self.builder.prelude, "Reshape", [value, dims], f"{name}.kernel")

    def _plus(self, value: str, bias: str, body: list[Any], name: str) -> str:
        return self.builder.node(body, "Add", [value, bias], f"{name}.biased") if bias else value

    def _is_vector(self, name: str, size: int) -> bool:
        """Whether a bias is a constant of one number an output."""
        tensor = self.wanted.get(name)
        if tensor is None:
            tensor = next((t for t in self.outer.initializer if t.name == name), None)
        return tensor is not None and list(tensor.dims) == [size]

    def _sum(self, parts: Sequence[str], output: str, body: list[Any], name: str) -> None:
        """The sum of the parts, under the name that the replaced node's output had."""
        from onnx import helper

        if len(parts) == 1:
            _identity(body, parts[0], output)
            return
        found = parts[0]
        for part in parts[1:-1]:
            found = self.builder.node(body, "Add", [found, part], f"{name}.sum")
        unique = self.builder.unique(f"{name}.add")
        body.append(helper.make_node("Add", [found, parts[-1]], [output], name=unique))

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


def _identity(body: list[Any], value: str, output: str) -> None:
    """Give a value the name that other nodes know; the node that makes it is renamed."""
    for node in reversed(body):
        for place, name in enumerate(node.output):
            if name == value:
                node.output[place] = output
                return
    from onnx import helper

    body.append(helper.make_node("Identity", [value], [output], name=f"{output}.same"))


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
    found = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    return int(found[0]) if found else 1


def _integer(attributes: Mapping[str, Any], name: str, default: int) -> int:
    return int(attributes[name].i) if name in attributes else default


def _is_matrix(matrix: Matrix) -> bool:
    return len(matrix.info.shape) == 2


__all__ = ["DATA_FILE", "Entry", "Lowered", "lower"]
