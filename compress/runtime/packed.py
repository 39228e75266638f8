"""From a tensor with its terms to the one buffer that the products read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compress.kernels.packing import Segment, codes_segment, pack_linear
from compress.kernels.segments import bitmask_segment, dense_segment
from compress.tensor import Array, Codes, Factors, Tensor

U8 = NDArray[np.uint8]
Triple = tuple[Array, Array, Array]

MATRIX = 2  # dimensions
_DTYPES = frozenset({"F32", "F16", "BF16"})


def is_packable(tensor: Tensor) -> bool:
    """Whether the products take the tensor as it is stored.

    One matrix of codes or of values under a bitmask, with any other terms. Codes under a bitmask
    are packed with their zeros: products with them would be slower, not faster.
    """
    if min(tensor.info.matrix_shape) == 0 or tensor.info.dtype not in _DTYPES:
        return False
    if tensor.codes is None and tensor.mask is None:
        return False
    return tensor.factors is None or tensor.factors.b.ndim == MATRIX


def is_table(tensor: Tensor) -> bool:
    """Whether single rows can be read from the packed tensor."""
    if tensor.factors is not None and tensor.factors.rank:
        return False
    exact = tensor.outliers is not None and tensor.outliers.rows.size > 0
    return tensor.codes is not None and not exact


def pack_tensor(tensor: Tensor, bias: Array | None = None) -> U8:
    """uint8 [bytes]: the packed matrix of a tensor, and a Linear's bias [rows].

    A super weight becomes what its value differs from the decoded rest, so that the product
    restores it. Raises ValueError where `is_packable` is False.
    """
    if not is_packable(tensor):
        raise ValueError(f"{tensor.info.name}: it has neither codes nor a bitmask")
    rows, columns = tensor.info.matrix_shape
    return pack_linear(
        rows,
        columns,
        [_segment(tensor)],
        factors=tensor.factors,
        outliers=_differences(tensor),
        bias=bias,
    )


def _segment(tensor: Tensor) -> Segment:
    if tensor.codes is not None:
        return codes_segment(tensor.codes)
    if tensor.mask is None:
        return dense_segment(tensor.source)
    bits = np.packbits(tensor.mask, axis=1, bitorder="little")
    return bitmask_segment(bits, tensor.source[tensor.mask], tensor.mask.shape[1])


def _differences(tensor: Tensor) -> Triple | None:
    """(rows, columns, value - decoded value without the super weights), or None."""
    outliers = tensor.outliers
    if outliers is None or not outliers.rows.size:
        return None
    at = outliers.rows, outliers.columns
    if tensor.codes is not None:
        rest = _decoded_codes(tensor.codes, *at)
    else:
        rest = tensor.source[at].astype(np.float32)
        if tensor.mask is not None:
            rest *= tensor.mask[at]
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
