"""One compressed matrix in a graph: its codes as an operator reads them, and the terms beside them.

The matrix is [out, in] as everywhere in this tool, whatever the orientation of the stored tensor.
Codes are shared with the weight file where the bytes there are what the operator reads
(compress/formats/onnx_forms.py), and copied in its form where they are not. Scales of 16 bits stay
so, behind a Cast that onnxruntime folds when it loads the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint.skeleton import TYPES
from compress.export_onnx.builder import (
    FLOAT,
    INT4,
    INT8,
    INT64,
    UINT4,
    UINT8,
    Builder,
)
from compress.formats.arrays import packed_bytes, plain
from compress.formats.base import ADAPTER, MODEL, Entry
from compress.formats.onnx_forms import (
    Form,
    Kind,
    blocks_of,
    form_of,
    pack_codes,
    pack_zero_points,
)
from compress.formats.peft import adapter_names, rank_bounds
from compress.passes.base import CodesSpec
from compress.tensor import Array, Codes, Role, Tensor, TensorInfo

_PACKED_ROLES = (Role.LINEAR, Role.HEAD)  # of compressed-tensors, whose other codes are tables
SPREAD_OPSET = 13  # whose Unsqueeze takes its axes as an input


@dataclass(frozen=True)
class Pair:
    """A low-rank product B @ A in the graph: names of `a` [rank, in] and `b` [out, rank]."""

    a: str
    b: str
    rank: int


@dataclass(frozen=True)
class Columns:
    """Single columns added to the product: `index` int64 [k], `values` [k, out]."""

    index: str
    values: str


class Matrix:
    """A compressed tensor in the graph; names are of initializers and of constant nodes.

    data_type  ONNX type of the activations that it meets
    """

    def __init__(self, builder: Builder, entry: Entry, data_type: int) -> None:
        self.builder, self.entry, self.data_type = builder, entry, data_type
        self.info: TensorInfo = entry.info
        self.name = entry.info.name
        self.rows, self.columns = entry.info.matrix_shape
        self.codes = entry.terms.codes
        self._copies: dict[tuple[str, int, tuple[int, ...]], str] = {}

    # -- codes ---------------------------------------------------------------------------------

    def form(self) -> Form:
        """The form in which the graph reads the codes."""
        codes = self.spec()
        if self.builder.weights.format == "compressed-tensors":
            group = self.group()
            if self.info.role not in _PACKED_ROLES:  # a table of signed bytes
                return Form(Kind.INTEGERS, 8, group, -(-self.columns // group))
            found = blocks_of(codes.bits, group, self.columns, exact=True)
            if found is not None:
                return found
        return form_of(self.info, codes)

    def blocks(self, form: Form, *, flat: bool = False) -> tuple[str, str, str]:
        """Names of codes [out, blocks, bytes], scales [out, blocks] and zero points ("": none).

        flat  codes [out, blocks * bytes]; a node that reshapes them would copy them
        """
        size = form.block * form.bits // 8
        dims = (self.rows, form.count * size) if flat else (self.rows, form.count, size)
        codes = self._codes(form, UINT8, dims)
        return codes, self._block_scales(form), self._zero_points(form, UINT8)

    def integers(self, form: Form, dims: tuple[int, ...]) -> str:
        """The codes as integers of the shape `dims`, for DequantizeLinear."""
        return self._codes(form, self._integer_type(form), dims)

    def integer_zero_points(self, form: Form, *, flat: bool) -> str:
        """Zero points of `integers`, [out, groups] or [out]; "" for symmetric codes."""
        return self._zero_points(form, self._integer_type(form), flat=flat)

    def scales(self, *, flat: bool = False) -> str:
        """Scales [out, groups] in the activations' type, or [out] where a row has one."""
        codes, builder = self.spec(), self.builder
        name = self._scale_name()
        stored = builder.weights.array(MODEL, name)
        dims = stored.shape
        per_tensor = dims == (1, 1) and self.rows != 1
        if flat and not per_tensor:
            dims = dims[:1]
        found = builder.pointer(stored, name, TYPES[codes.scale_dtype], dims)
        found = builder.cast(builder.prelude, found, TYPES[codes.scale_dtype], self.data_type)
        if per_tensor:
            shape = builder.constant(f"{name}.shape", [self.rows] if flat else [self.rows, 1])
            found = builder.node(builder.prelude, "Expand", [found, shape], f"{name}.rows")
            if flat:  # [1, 1] expands to [1, out]
                shape = builder.constant(f"{name}.flat", [-1])
                found = builder.node(builder.prelude, "Reshape", [found, shape], f"{name}.flat")
        return found

    def _codes(self, form: Form, data_type: int, dims: tuple[int, ...]) -> str:
        builder = self.builder
        stored = self._shareable(form)
        if stored is not None:
            return builder.pointer(builder.weights.array(MODEL, stored), stored, data_type, dims)
        return self.copied(f"{self.name}.codes", data_type, dims, lambda: self._packed(form))

    def _shareable(self, form: Form) -> str | None:
        """The stored array whose bytes are the codes in `form`, if there is one."""
        codes, columns = self.spec(), self.columns
        where = self.builder.weights.format
        if where == "onnx":
            return f"{self.name}.codes" if form == form_of(self.info, codes) else None
        straight = (
            form.kind is Kind.BLOCKS and form.bits == codes.bits and form.row_codes == columns
        )
        if where == "native":
            return f"{self.name}.codes" if straight and self.entry.terms.nonzeros is None else None
        if self.info.role in _PACKED_ROLES:
            return f"{self.info.module}.weight_packed" if straight else None
        return self.name if form.kind is Kind.INTEGERS and form.bits == 8 else None

    def _packed(self, form: Form) -> NDArray[np.uint8]:
        codes = self.read_codes()
        return pack_codes(codes.values, codes.bits, codes.zero_point is None, form)

    def _block_scales(self, form: Form) -> str:
        """Scales a block: those of groups that hold several blocks are repeated."""
        builder = self.builder
        scales = self.scales()
        groups = 1 if self.spec().per_tensor else self.spec().groups(self.columns)
        if form.repeat == 1 or form.count == groups:
            return scales
        nodes, name = builder.prelude, f"{self.name}.block_scales"
        axis = builder.constant(f"{name}.axis", [2])
        wide = builder.node(nodes, "Unsqueeze", [scales, axis], f"{name}.wide")
        shape = builder.constant(f"{name}.shape", [self.rows, groups, form.repeat])
        spread = builder.node(nodes, "Expand", [wide, shape], f"{name}.spread")
        flat = builder.constant(f"{name}.flat", [self.rows, groups * form.repeat])
        found = builder.node(nodes, "Reshape", [spread, flat], name)
        if groups * form.repeat == form.count:
            return found
        bounds = [builder.constant(f"{name}.{n}", [v]) for n, v in
                  (("from", 0), ("to", form.count), ("along", 1))]  # fmt: skip
        return builder.node(nodes, "Slice", [found, *bounds], f"{name}.cut")

    def _zero_points(self, form: Form, data_type: int, *, flat: bool = False) -> str:
        codes, builder = self.spec(), self.builder
        if codes.symmetric:
            return ""
        in_row = form.count
        if form.kind is Kind.BLOCKS:
            in_row = packed_bytes(form.count, form.bits)
        dims = (self.rows,) if flat else (self.rows, in_row)
        name = f"{self.name}.zero_point"
        shared = builder.weights.format == "onnx" and form == form_of(self.info, codes)
        shared = shared or (
            builder.weights.format == "native"
            and not codes.per_tensor
            and form.kind is Kind.BLOCKS
            and form.bits == codes.bits
            and form.repeat == 1
        )
        if shared:
            return builder.pointer(builder.weights.array(MODEL, name), name, data_type, dims)

        def make() -> Array:
            read = self.read_codes()
            points = read.zero_point
            if points is None:
                raise ValueError(f"{self.name}: its codes have no zero points")
            spread = np.broadcast_to(points, (self.rows, points.shape[1]))
            return pack_zero_points(np.ascontiguousarray(spread), form)

        return self.copied(name, data_type, dims, make)

    def copied(
        self, name: str, data_type: int, dims: tuple[int, ...], make: Callable[[], Array]
    ) -> str:
        """An initializer in the data file, written once however many nodes read the weight."""
        key = (name, data_type, dims)
        if key not in self._copies:
            self._copies[key] = self.builder.copied(name, data_type, dims, make)
        return self._copies[key]

    # -- the terms beside the codes --------------------------------------------------------------

    def pairs(self) -> list[Pair]:
        """The low-rank products that are added: factors, with the adapter's further columns."""
        if self._in_adapter():
            low = rank_bounds(self.info, self.entry.terms)[0]
            a_name, b_name = adapter_names(self.info)
            return [Pair(self._factor(ADAPTER, a_name), self._factor(ADAPTER, b_name), low)]
        if not self.entry.terms.rank:
            return []
        a, b = (self._factor(MODEL, f"{self.name}.factor_{one}") for one in "ab")
        if self.entry.terms.factor_dtype == "I8":
            a, b = self._scaled(a, "a", (-1, 1)), self._scaled(b, "b", (1, -1))
        return [Pair(a, b, self.entry.terms.rank)]

    def super_columns(self) -> Columns | None:
        """Exact entries that are no part of codes and pairs, as columns of differences."""
        terms, builder = self.entry.terms, self.builder
        count = terms.outlier_columns[1]
        is_inside = terms.codes is None and not terms.rank  # the stored values have them already
        if not count or is_inside or self._in_adapter():
            return None
        index = self.copied(f"{self.name}.super_columns", INT64, (count,), self._indices)
        values = self.copied(
            f"{self.name}.super_differences", FLOAT, (count, self.rows), self._differences
        )
        return Columns(index, builder.cast(builder.prelude, values, FLOAT, self.data_type))

    def plain(self) -> str:
        """The base of a weight without codes, in its own shape and the activations' type."""
        builder, info = self.builder, self.info
        have = TYPES[info.dtype]
        if builder.weights.format == "native":
            found = self.copied(f"{self.name}.values", have, info.shape, self._base)
        else:
            found = builder.pointer(
                builder.weights.array(MODEL, self.name), self.name, have, info.shape
            )
        return builder.cast(builder.prelude, found, have, self.data_type)

    def decoded(self) -> Array:
        """The whole decoded tensor in its own shape, float32."""
        return self.info.from_matrix(self._read().decode())

    def _in_adapter(self) -> bool:
        """Whether an adapter beside the weights has factors and exact entries."""
        where = self.builder.weights.format
        return where == "compressed-tensors" and rank_bounds(self.info, self.entry.terms)[1] > 0

    def _factor(self, part: str, name: str) -> str:
        builder = self.builder
        stored = builder.weights.array(part, name)
        found = builder.pointer(stored, name, TYPES[stored.dtype], stored.shape)
        return builder.cast(builder.prelude, found, TYPES[stored.dtype], self.data_type)

    def _scaled(self, factor: str, which: str, shape: tuple[int, int]) -> str:
        builder, name = self.builder, f"{self.name}.factor_{which}_scale"
        scale = self._factor(MODEL, name)
        dims = builder.constant(f"{name}.shape", list(shape))
        scale = builder.node(builder.prelude, "Reshape", [scale, dims], f"{name}.wide")
        return builder.node(builder.prelude, "Mul", [factor, scale], f"{name}.scaled")

    def _base(self) -> Array:
        tensor = self._read()
        outliers = None if tensor.factors is not None else tensor.outliers
        return self.info.from_matrix(plain(tensor.with_(factors=None, outliers=outliers)))

    def _indices(self) -> Array:
        outliers = self._read().outliers
        return np.unique(outliers.columns) if outliers is not None else np.zeros(0, np.int64)

    def _differences(self) -> Array:
        tensor = self._read()
        outliers = tensor.outliers
        if outliers is None:
            raise ValueError(f"{self.name}: it has no exact entries")
        columns = np.unique(outliers.columns)
        out = np.zeros((columns.size, self.rows), np.float32)
        base = tensor.with_(outliers=None).decode()
        there = base[outliers.rows, outliers.columns]
        at = np.searchsorted(columns, outliers.columns)
        out[at, outliers.rows] = outliers.values.astype(np.float32) - there
        return out

    # -- reading ---------------------------------------------------------------------------------

    def _read(self) -> Tensor:
        return self.builder.weights.tensor(self.name)

    def read_codes(self) -> Codes:
        """The codes, read from the output. Raises ValueError where it has none."""
        codes = self._read().codes
        if codes is None:
            raise ValueError(f"{self.name}: it has no codes")
        return codes

    def spec(self) -> CodesSpec:
        """What is known of the codes. Raises ValueError where it has none."""
        if self.codes is None:
            raise ValueError(f"{self.name}: it has no codes")
        return self.codes

    def group(self) -> int:
        """Columns that share a scale."""
        codes = self.spec()
        return self.columns if codes.per_tensor else min(codes.group_size, self.columns)

    def _scale_name(self) -> str:
        if self.builder.weights.format == "compressed-tensors":
            return f"{self.info.module}.weight_scale"
        return f"{self.name}.scale"

    def _integer_type(self, form: Form) -> int:
        if self.spec().symmetric:
            return INT8 if form.bits == 8 else INT4
        return UINT8 if form.bits == 8 else UINT4


def dequantize(matrix: Matrix, nodes: list[Any], form: Form) -> str:
    """A node that gives the matrix [out, in] (or the tensor's shape, for one scale a row)."""
    builder, info = matrix.builder, matrix.info
    whole_rows = form.count == 1
    dims = (matrix.rows, matrix.columns)
    attributes: dict[str, Any] = {"axis": 0}
    if not whole_rows:
        attributes = {"axis": 1, "block_size": form.block}
    elif info.role is Role.CONV:
        dims = tuple(info.shape)  # type: ignore[assignment]
    codes = matrix.integers(form, dims)
    points = matrix.integer_zero_points(form, flat=whole_rows)
    inputs = [codes, matrix.scales(flat=whole_rows), *([points] if points else [])]
    builder.facts.operators[f"DequantizeLinear {form.bits} bits"] += 1
    return builder.node(nodes, "DequantizeLinear", inputs, f"{matrix.name}.decoded", **attributes)


def opset_of(form: Form, data_type: int) -> int:
    """The opset from which on DequantizeLinear takes this form and gives this type."""
    if form.kind is Kind.BLOCKS or form.bits == 4 or form.count > 1:
        return 21  # blocks, and integers of 4 bits
    return 13 if data_type == FLOAT else 19  # a scale a row; scales of 16 bits
