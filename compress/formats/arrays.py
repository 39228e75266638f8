"""What the formats share: bit-packed codes, exact entries, checks of arrays that were read back."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from compress import kernels
from compress.errors import InputError, show
from compress.formats.base import MODEL, SUPER_WEIGHTS, ArraySpec, Fetch, Named
from compress.passes.base import Terms
from compress.tensor import DTYPES, Array, Outliers, Role, Tensor, TensorInfo, masked

_CAST_BYTES = 1 << 20  # of float32 that are rounded at a time
_FAR = 10**15  # an offset that no weight file reaches


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits, the last byte padded with zero bits."""
    return (count * bits + 7) // 8


def pack_rows(values: NDArray[np.uint8], bits: int, row_bytes: int) -> NDArray[np.uint8]:
    """uint8 [rows, n] -> uint8 [rows, row_bytes]: each row a little-endian bit stream."""
    out = np.empty((values.shape[0], row_bytes), np.uint8)
    kernels.pack_bits(np.ascontiguousarray(values), bits, out)
    return out


def unpack_rows(packed: NDArray[np.uint8], bits: int, columns: int) -> NDArray[np.uint8]:
    """The inverse of `pack_rows`: uint8 [rows, row_bytes] -> uint8 [rows, columns]."""
    out = np.empty((packed.shape[0], columns), np.uint8)
    kernels.unpack_bits(np.ascontiguousarray(packed), bits, out)
    return out


def zero_codes(zero_point: NDArray[np.uint8] | None, bits: int, rows: int) -> NDArray[np.uint8]:
    """uint8 [rows, groups or 1]: the code that dequantizes to zero."""
    if zero_point is None:
        return np.full((rows, 1), 1 << (bits - 1), np.uint8)
    return np.broadcast_to(zero_point, (rows, zero_point.shape[1]))


def spread(per_group: Array, group_size: int, columns: int) -> Array:
    """[rows, groups] -> [rows, columns]: one value a group, repeated over its columns."""
    if per_group.shape[1] == 1:
        return np.broadcast_to(per_group, (per_group.shape[0], columns))
    return np.repeat(per_group, group_size, axis=1)[:, :columns]


def plain(tensor: Tensor) -> Array:
    """[rows, columns] in the source's dtype: the decoded values without codes or with them.

    A tensor that was only pruned is never rounded through float32. Values that rounding pushed
    past the dtype's largest number are set to that number: the alternative is an infinity.
    """
    dtype = DTYPES[tensor.info.dtype]
    if tensor.codes is None and tensor.factors is None:
        matrix = tensor.source if tensor.values is None else tensor.values
        if tensor.mask is not None:
            matrix = masked(matrix, tensor.mask)
        if tensor.outliers is not None and tensor.outliers.rows.size:
            matrix = np.array(matrix)
            matrix[tensor.outliers.rows, tensor.outliers.columns] = tensor.outliers.values
        return np.ascontiguousarray(matrix, dtype)
    values = cast_like(tensor.decode(), dtype)
    if tensor.outliers is not None and tensor.outliers.rows.size and dtype == np.float64:
        # The formula is in float32, which a float64 does not survive: exact entries are exact.
        values[tensor.outliers.rows, tensor.outliers.columns] = tensor.outliers.values
    return values


def cast_like(matrix: NDArray[np.float32], dtype: np.dtype[np.generic]) -> Array:
    """float32 values in another floating-point dtype; finite values stay finite."""
    if dtype == np.float32:
        return matrix
    if dtype == np.float64:
        return matrix.astype(np.float64)
    import ml_dtypes

    largest = np.float32(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    result = np.empty(matrix.shape, dtype)
    step = max(1, _CAST_BYTES // max(1, matrix[:1].nbytes))
    for start in range(0, matrix.shape[0], step):  # in slices: the temporaries stay small
        part = matrix[start : start + step]
        clipped = np.clip(part, -largest, largest)
        result[start : start + step] = np.where(np.isinf(part), part, clipped)
    return result


def tile_of(info: TensorInfo, tensor: Tensor, matrix: Array) -> Array:
    """A tile of the matrix in the shape it has in the stored tensor.

    A tile that cuts an expert in two stays a matrix: its bytes are the same. A transposed
    tensor (GPT-2's Conv1D) cannot be cut. Raises ValueError.
    """
    if tensor.is_whole:
        return info.from_matrix(matrix)
    if info.role is Role.CONV1D:
        raise ValueError(f"{info.name}: a transposed tensor must be packed whole")
    rows_each = info.matrix_shape[0] // info.shape[0] if info.shape and info.shape[0] else 1
    if matrix.shape[0] % rows_each or tensor.first_row % rows_each:
        return matrix
    tile: Array = matrix.reshape(matrix.shape[0] // rows_each, *info.shape[1:])
    return tile


def stand_in(info: TensorInfo) -> Array:
    """[rows, columns] of zeros that take no memory: the source of a tensor that was read back."""
    return np.broadcast_to(np.zeros((), DTYPES[info.dtype]), info.matrix_shape)


def plain_layout(info: TensorInfo) -> list[ArraySpec]:
    """The tensor under its own name, dtype and shape."""
    return [ArraySpec(MODEL, info.name, info.dtype, info.shape)]


def super_weight_layout(info: TensorInfo, terms: Terms) -> list[ArraySpec]:
    """The exact entries of a tensor: rows, columns and values, each [n]."""
    low, high = terms.outliers
    if not high:
        return []
    at_most = high if high != low else None
    return [
        ArraySpec(SUPER_WEIGHTS, f"{info.name}.{what}", dtype, (low,), at_most)
        for what, dtype in (("rows", "I64"), ("columns", "I64"), ("values", info.dtype))
    ]


def pack_super_weights(tensor: Tensor) -> Named:
    """The exact entries of a tensor, or nothing where it has none."""
    outliers = tensor.outliers
    if outliers is None or not outliers.rows.size:
        return {}
    name, dtype = tensor.info.name, DTYPES[tensor.info.dtype]
    return {
        (SUPER_WEIGHTS, f"{name}.rows"): np.ascontiguousarray(outliers.rows, np.int64),
        (SUPER_WEIGHTS, f"{name}.columns"): np.ascontiguousarray(outliers.columns, np.int64),
        (SUPER_WEIGHTS, f"{name}.values"): np.ascontiguousarray(outliers.values, dtype),
    }


def unpack_super_weights(
    info: TensorInfo, terms: Terms, fetch: Fetch, *, in_scale: bool
) -> Outliers | None:
    """The exact entries, checked against the tensor's shape. Raises InputError."""
    if not terms.outliers[1]:
        return None
    rows = fetch(SUPER_WEIGHTS, f"{info.name}.rows")
    columns = fetch(SUPER_WEIGHTS, f"{info.name}.columns")
    values = fetch(SUPER_WEIGHTS, f"{info.name}.values")
    if not rows.shape == columns.shape == values.shape:
        raise damaged(info, "its super weights' rows, columns and values differ in length")
    for index, size in ((rows, info.matrix_shape[0]), (columns, info.matrix_shape[1])):
        if index.size and (int(index.min()) < 0 or int(index.max()) >= size):
            raise damaged(info, "a super weight lies outside the tensor")
    if not rows.size:
        return None
    return Outliers(rows, columns, values, in_scale=in_scale)


def damaged(info: TensorInfo, what: str) -> InputError:
    """An InputError about the stored arrays of one tensor."""
    return InputError(
        f"tensor {show(info.name)}: {what}", hint="the file is damaged; `compress verify` says more"
    )


def header_text(spec: ArraySpec, weights_suffix: str) -> int:
    """Bytes that an array's entries in a file's header and in the index take at most."""
    entry = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [_FAR, _FAR]}
    header = json.dumps({spec.name: entry}, separators=(",", ":"), ensure_ascii=False)
    index = json.dumps({spec.name: f"model-00000-of-00000{weights_suffix}"}, indent=4)
    return len(header.encode("utf-8", "surrogatepass")) + len(index)


def collision(
    layouts: Sequence[tuple[TensorInfo, list[ArraySpec]]], infos: Sequence[TensorInfo]
) -> str | None:
    """Why the arrays of the changed tensors cannot share a file with the other tensors, or None."""
    taken = {(MODEL, info.name) for info in infos} - {(MODEL, info.name) for info, _ in layouts}
    for info, specs in layouts:
        for spec in specs:
            if (spec.part, spec.name) in taken:
                return f"{show(info.name)} would become {show(spec.name)}, a name that is taken"
            taken.add((spec.part, spec.name))
    return None
