"""From a tensor with its terms to the one buffer that the products read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compress.kernels.packing import codes_segment, pack_linear
from compress.tensor import Array, Codes, Factors, Tensor

U8 = NDArray[np.uint8]
Triple = tuple[Array, Array, Array]

MATRIX = 2  # dimensions


def is_packable(tensor: Tensor) -> bool:
    """Whether the products take the tensor as it is: one matrix of codes, with any other terms."""
    if tensor.codes is None or min(tensor.info.matrix_shape) == 0:
        return False
    return tensor.factors is None or tensor.factors.b.ndim == MATRIX


def is_table(tensor: Tensor) -> bool:
    """Whether single rows can be read from the packed tensor."""
    plain = tensor.factors is None or tensor.factors.rank == 0
    return plain and (tensor.outliers is None or not tensor.outliers.rows.size)


def pack_tensor(tensor: Tensor, bias: Array | None = None) -> U8:
    """uint8 [bytes]: the packed matrix of a tensor with codes, and a Linear's bias.

    A super weight becomes what its value differs from the decoded rest, so that the product
    restores it. Raises ValueError where `is_packable` is False.
    """
    if tensor.codes is None or not is_packable(tensor):
        raise ValueError(f"{tensor.info.name}: it has no codes to multiply with")
    rows, columns = tensor.info.matrix_shape
    return pack_linear(
        rows,
        columns,
        [codes_segment(tensor.codes)],
        factors=tensor.factors,
        outliers=_differences(tensor, tensor.codes),
        bias=bias,
    )


def _differences(tensor: Tensor, codes: Codes) -> Triple | None:
    """(rows, columns, value - decoded value without the super weights), or None."""
    outliers = tensor.outliers
    if outliers is None or not outliers.rows.size:
        return None
    at = outliers.rows, outliers.columns
    rest = _decoded_codes(codes, *at)
    if tensor.factors is not None:
        _add_factors(tensor.factors, rest, *at)
    return *at, outliers.values.astype(np.float32) - rest


def _decoded_codes(codes: Codes, rows: Array, columns: Array) -> NDArray[np.float32]:
    shape = codes.values.shape[0], -(-codes.values.shape[1] // codes.group_size)
    group = columns // codes.group_size
    scale = np.broadcast_to(codes.scale, shape)[rows, group].astype(np.float32)
    zero = np.float32(1 << (codes.bits - 1))
    if codes.zero_point is not None:
        zero = np.broadcast_to(codes.zero_point, shape)[rows, group].astype(np.float32)
    decoded: NDArray[np.float32] = (codes.values[rows, columns].astype(np.float32) - zero) * scale
    return decoded


def _add_factors(factors: Factors, rest: NDArray[np.float32], rows: Array, columns: Array) -> None:
    b, a = factors.as_float32()
    for k in range(factors.rank):  # in the order of `Factors.add_to`
        rest += b[rows, k] * a[k, columns]
