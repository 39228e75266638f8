"""The nodes that take the place of one that reads a compressed weight.

Each writes into a list of nodes, the last of which gives the output that the replaced node gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from compress.export_onnx.builder import FLOAT, MICROSOFT, Builder
from compress.export_onnx.matrices import Matrix, dequantize
from compress.export_onnx.transposed import dequantize_transposed
from compress.export_onnx.uses import Use, integer
from compress.formats.onnx_forms import Form, Kind
from compress.tensor import Array, Role


class Operators:
    """What each kind of node becomes; the nodes are made by a `Builder`."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.weights, self.style, self.facts = builder.weights, builder.style, builder.facts

    def linear(self, matrix: Matrix, use: Use, node: Any, body: list[Any]) -> None:
        """y = base(x) + pairs + columns + bias."""
        builder, name = self.builder, matrix.name
        parts: list[str] = []
        pairs, columns = matrix.pairs(), matrix.super_columns()
        parts.append(self._product(matrix, use.value, body))
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
        if use.bias:  # a node of its own, which engines fuse with what comes before or behind it
            parts.append(use.bias)
        self._sum(parts, node.output[0], body, name)

    def _product(self, matrix: Matrix, value: str, body: list[Any]) -> str:
        """x times the codes (or the plain matrix)."""
        builder, name = self.builder, matrix.name
        if matrix.codes is None:
            held = matrix.plain()
            if matrix.info.role is not Role.CONV1D:
                held = self._turned(held, name)
            return builder.node(body, "MatMul", [value, held], f"{name}.product")
        form = matrix.form()
        if form.kind is Kind.BLOCKS and self.style.style == "nbits":
            return self._nbits(matrix, form, value, body)
        if form.kind is Kind.BLOCKS:
            held = dequantize_transposed(matrix, body, form)
        else:
            held = self._turned(dequantize(matrix, body, form), name, body)
        return builder.node(body, "MatMul", [value, held], f"{name}.product")

    def _nbits(self, matrix: Matrix, form: Form, value: str, body: list[Any]) -> str:
        codes, scales, points = matrix.blocks(form)
        inputs = [value, codes, scales, *([points] if points else [])]
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

    def conv(self, matrix: Matrix, use: Use, node: Any, body: list[Any]) -> None:
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
        groups = integer({a.name: a for a in node.attribute}, "group", 1)
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

    def gather(self, matrix: Matrix, use: Use, body: list[Any]) -> str:
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

    def narrow_rows(self, node: Any, table: str, data_type: int, body: list[Any]) -> None:
        """Rows of a table of 16 bits, cast after they were gathered: the table stays as it is."""
        from onnx import NodeProto

        name = node.input[0]
        picked = NodeProto()
        picked.CopyFrom(node)
        picked.input[0] = table
        picked.output[0] = self.builder.unique(f"{name}.rows")
        body.append(picked)
        rows = self.builder.node(body, "Cast", [picked.output[0]], f"{name}.cast", to=data_type)
        give_name(body, rows, node.output[0])

    def dense_linear(self, node: Any, body: list[Any]) -> None:
        """A captured Linear whose weight is not compressed: MatMul with the transposed weight."""
        attributes = {a.name: a for a in node.attribute}
        name = node.input[1]
        held = name
        if not integer(attributes, "transposed", 0):
            held = self._turned(name, name)
        parts = [self.builder.node(body, "MatMul", [node.input[0], held], f"{name}.product")]
        if len(node.input) > 2 and node.input[2]:
            parts.append(node.input[2])
        self._sum(parts, node.output[0], body, name)

    def _turned(self, value: str, name: str, nodes: list[Any] | None = None) -> str:
        where = self.builder.prelude if nodes is None else nodes
        return self.builder.node(where, "Transpose", [value], f"{name}.transposed", perm=[1, 0])

    def _shaped(self, value: str, shape: Sequence[int], name: str) -> str:
        dims = self.builder.constant(f"{name}.shape", list(shape))
        return self.builder.node(self.builder.prelude, "Reshape", [value, dims], f"{name}.kernel")

    def _sum(self, parts: Sequence[str], output: str, body: list[Any], name: str) -> None:
        """The sum of the parts, under the name that the replaced node's output had."""
        from onnx import helper

        if len(parts) == 1:
            give_name(body, parts[0], output)
            return
        found = parts[0]
        for part in parts[1:-1]:
            found = self.builder.node(body, "Add", [found, part], f"{name}.sum")
        unique = self.builder.unique(f"{name}.add")
        body.append(helper.make_node("Add", [found, parts[-1]], [output], name=unique))


def give_name(body: list[Any], value: str, output: str) -> None:
    """Give a value the name that other nodes know; the node that makes it is renamed."""
    for node in reversed(body):
        for place, name in enumerate(node.output):
            if name == value:
                node.output[place] = output
                return
    from onnx import helper

    body.append(helper.make_node("Identity", [value], [output], name=f"{output}.same"))
