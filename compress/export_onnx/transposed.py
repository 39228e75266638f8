"""The standard form of a product: integers [in, out] behind a blocked DequantizeLinear.

onnxruntime turns DequantizeLinear and MatMul into MatMulNBits where integers lie [in, out]; every
other engine of opset 21 runs the two nodes as they are. The weight files hold rows of outputs, so
codes and scales are written once more, transposed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compress.checkpoint.skeleton import TYPES
from compress.export_onnx.builder import INT4, INT8, UINT4, UINT8
from compress.export_onnx.matrices import Matrix
from compress.formats.arrays import pack_rows, packed_bytes
from compress.formats.onnx_forms import Form
from compress.tensor import DTYPES, Array


def dequantize_transposed(matrix: Matrix, nodes: list[Any], form: Form) -> str:
    """A node that gives the matrix [in, out] in the activations' type."""
    builder, name = matrix.builder, matrix.name
    spec = matrix.spec()
    bits = 4 if form.bits <= 4 else 8
    group = matrix.group()
    groups = -(-matrix.columns // group)
    types = (INT4, INT8) if spec.symmetric else (UINT4, UINT8)
    data_type = types[bits == 8]
    dims = (matrix.columns, matrix.rows)
    codes = matrix.copied(f"{name}.integers", data_type, dims, lambda: _codes(matrix, bits))
    scale_type = TYPES[spec.scale_dtype]
    scale_dims = (groups, matrix.rows) if groups > 1 else (matrix.rows,)
    scales = matrix.copied(f"{name}.scales", scale_type, scale_dims, lambda: _scales(matrix))
    inputs = [codes, builder.cast(builder.prelude, scales, scale_type, matrix.data_type)]
    if not spec.symmetric:
        points = matrix.copied(
            f"{name}.points", data_type, scale_dims, lambda: _points(matrix, bits)
        )
        inputs.append(points)
    attributes: dict[str, Any] = {"axis": 0, "block_size": group} if groups > 1 else {"axis": 1}
    builder.facts.operators[f"DequantizeLinear {bits} bits"] += 1
    return builder.node(nodes, "DequantizeLinear", inputs, f"{name}.decoded", **attributes)


def _codes(matrix: Matrix, bits: int) -> Array:
    codes = matrix.read_codes()
    values = codes.values
    if codes.zero_point is None:  # offset binary to two's complement
        values = values - np.uint8(1 << (codes.bits - 1))
        values = values & np.uint8((1 << bits) - 1)
    return _stream(np.ascontiguousarray(values.T), bits)


def _points(matrix: Matrix, bits: int) -> Array:
    points = matrix.read_codes().zero_point
    if points is None:
        raise ValueError(f"{matrix.name}: its codes have no zero points")
    spread = np.broadcast_to(points, (matrix.rows, points.shape[1]))
    return _stream(np.ascontiguousarray(spread.T), bits)


def _scales(matrix: Matrix) -> Array:
    codes = matrix.read_codes()
    scale = codes.scale.astype(DTYPES[matrix.spec().scale_dtype])
    spread = np.broadcast_to(scale, (matrix.rows, scale.shape[1]))
    return np.ascontiguousarray(spread.T)


def _stream(values: Array, bits: int) -> Array:
    """Integers as one stream over the whole array, low bits first."""
    if bits == 8:
        return values
    return pack_rows(values.reshape(1, -1), bits, packed_bytes(values.size, bits))
