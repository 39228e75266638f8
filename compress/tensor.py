"""A tensor of a checkpoint, the four terms that passes write, the one formula that decodes them.

W = overwrite( mask * dequant(codes) + B @ A ,  outliers )      dequant = (q - zero_point) * scale
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# safetensors tag -> numpy dtype. F4 and F6 tensors pass through as bytes and have no entry.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.uint8),  # copied byte for byte, never branched on
}
FLOAT_TAGS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


class Role(enum.Enum):
    """What a tensor is to the network, as far as headers and config tell."""

    LINEAR = "linear"  # [out_features, in_features]
    CONV = "conv"  # [out_channels, in_channels / groups, *kernel]
    CONV1D = "conv1d"  # GPT-2's transposed Linear, [in_features, out_features]
    EXPERTS = "experts"  # fused mixture-of-experts stack, [experts, out, in]
    EMBEDDING = "embedding"  # token table, [vocabulary, hidden]
    HEAD = "head"  # language-model head, [vocabulary, hidden]
    POSITION = "position"  # position or token-type table
    ROUTER = "router"  # mixture-of-experts gate
    NORM = "norm"
    BIAS = "bias"
    STATE = "state"  # recurrent or state-space parameters, buffers, running statistics
    UNCLEAR = "unclear"  # left alone and listed


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a checkpoint's headers: no data is read to make it.

    `file` is the name inside the checkpoint directory, `offset` the absolute byte position of
    the data in that file (-1 where the container is not addressable, e.g. a torch file).
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int = -1
    role: Role = Role.UNCLEAR

    @property
    def module(self) -> str:
        """The module's name: the tensor's without `.weight`."""
        return self.name.removesuffix(".weight")

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether passes may work on it at all."""
        return self.dtype in FLOAT_TAGS

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) as passes see it: [out, in], [out, in*kh*kw], [experts*out, in].

        GPT-2's Conv1D is seen through its transpose. Scalars and vectors are one row.
        """
        if self.role is Role.CONV1D and len(self.shape) == 2:
            return self.shape[1], self.shape[0]
        if len(self.shape) < 2:
            return 1, self.size
        if self.role is Role.EXPERTS:
            return math.prod(self.shape[:-1]), self.shape[-1]
        return self.shape[0], math.prod(self.shape[1:])

    def to_matrix(self, values: Array) -> Array:
        """View (or transpose) an array of this tensor's shape as its matrix."""
        if self.role is Role.CONV1D and values.ndim == 2:
            return np.ascontiguousarray(values.T)
        return values.reshape(self.matrix_shape)

    def from_matrix(self, matrix: Array) -> Array:
        """The inverse of `to_matrix`."""
        if self.role is Role.CONV1D and len(self.shape) == 2:
            return np.ascontiguousarray(matrix.T)
        return matrix.reshape(self.shape)


@dataclass(frozen=True)
class Codes:
    """Integer codes with one scale (and zero point) per group of columns of a row.

    values      uint8 [rows, columns], 0 .. 2^bits - 1 (offset binary: symmetric codes are
                stored as q + 2^(bits-1), so their zero point is 2^(bits-1))
    scale       float [rows, groups] in its stored dtype (fp16, bf16 or fp32); may be negative
    zero_point  uint8 [rows, groups], or None for symmetric codes
    group_size  columns that share a scale; the last group of a row may be short.
                Per tensor: scale is [1, 1] and group_size = columns.
    """

    values: NDArray[np.uint8]
    scale: Array
    zero_point: NDArray[np.uint8] | None
    bits: int
    group_size: int

    def dequantize(self) -> NDArray[np.float32]:
        """float32 [rows, columns]: (q - zero_point) * scale, one rounding a weight."""
        from compress import kernels

        rows, columns = self.values.shape
        scale = np.ascontiguousarray(
            np.broadcast_to(self.scale.astype(np.float32), (rows, self.scale.shape[1]))
        )
        zero_point = self.zero_point
        if zero_point is not None:
            zero_point = np.ascontiguousarray(np.broadcast_to(zero_point, scale.shape))
        out = np.empty((rows, columns), np.float32)
        kernels.dequantize(self.values, scale, zero_point, self.bits, self.group_size, out)
        return out


@dataclass(frozen=True)
class Factors:
    """A low-rank term B @ A: `b` [rows, rank], `a` [rank, columns], in their stored dtype.

    int8 factors carry one float32 scale a column of B and a row of A (`b_scale`, `a_scale`,
    shape [rank]); floating-point factors carry none. For fused experts the matrix is the stack
    of experts and `b`, `a` are [experts, out, rank] and [experts, rank, in].
    """

    b: Array
    a: Array
    b_scale: NDArray[np.float32] | None = None
    a_scale: NDArray[np.float32] | None = None

    @property
    def rank(self) -> int:
        """Columns of B."""
        return int(self.b.shape[-1])

    def as_float32(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(B, A) in float32, scales applied."""
        b, a = self.b.astype(np.float32), self.a.astype(np.float32)
        if self.b_scale is not None:
            b *= self.b_scale[..., None, :]
        if self.a_scale is not None:
            a *= self.a_scale[..., :, None]
        return b, a

    def add_to(self, matrix: NDArray[np.float32]) -> None:
        """matrix += B @ A in place, as `rank` sequential rank-1 float32 updates without FMA."""
        from compress import kernels

        b, a = self.as_float32()
        if b.ndim == 2:
            kernels.add_low_rank(matrix, np.ascontiguousarray(b), np.ascontiguousarray(a))
            return
        experts, out_features, _ = b.shape
        for e in range(experts):
            rows = matrix[e * out_features : (e + 1) * out_features]
            kernels.add_low_rank(rows, np.ascontiguousarray(b[e]), np.ascontiguousarray(a[e]))


@dataclass(frozen=True)
class Outliers:
    """Exact original values of single entries, applied last.

    rows, columns  int64 [n], sorted by (row, column), relative to the tile's first row
    values         [n] in the source's dtype
    in_scale       True where the base must be usable without this term (compressed-tensors):
                   the entry then takes part in its group's scale like any other weight
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: Array
    in_scale: bool = False


@dataclass(frozen=True)
class Tensor:
    """A tile (a range of rows, often all) of a tensor's matrix, and the terms written so far.

    source  [rows, columns] in the source's dtype, never changed
    mask    bool [rows, columns], True = kept; None = all kept
    values  [rows, columns] in the source's dtype: a vector that was estimated anew
    """

    info: TensorInfo
    source: Array
    first_row: int = 0
    mask: NDArray[np.bool_] | None = None
    codes: Codes | None = None
    factors: Factors | None = None
    outliers: Outliers | None = None
    values: Array | None = None  # stands for the source where no other term is written
    notes: dict[str, float] = field(default_factory=dict)  # measured on the way, for the report

    @property
    def key(self) -> tuple[str, int]:
        """Identifies the tile: (tensor name, first row)."""
        return self.info.name, self.first_row

    @property
    def is_whole(self) -> bool:
        """Whether the tile holds every row."""
        return bool(self.source.shape[0] == self.info.matrix_shape[0])

    @property
    def changed(self) -> bool:
        """Whether any pass wrote a term that changes the decoded values or their storage."""
        return self.mask is not None or self.codes is not None or self.factors is not None

    def with_(self, **terms: Any) -> Tensor:
        """A copy with some terms replaced."""
        return replace(self, **terms)

    def decode(self) -> NDArray[np.float32]:
        """float32 [rows, columns]: the formula at the top of this module."""
        if self.codes is not None:
            matrix = self.codes.dequantize()  # pruned entries carry the code of zero already
        else:
            matrix = (self.source if self.values is None else self.values).astype(np.float32)
            if self.mask is not None:
                matrix = masked(matrix, self.mask)
        if self.factors is not None:
            self.factors.add_to(matrix)
        if self.outliers is not None and self.outliers.rows.size:
            matrix[self.outliers.rows, self.outliers.columns] = self.outliers.values.astype(
                np.float32
            )
        return matrix


def masked(matrix: Array, mask: NDArray[np.bool_]) -> Array:
    """A copy with exact zeros where the mask is False.

    The bits are multiplied as unsigned integers: numpy's `where` takes ten times as long on a
    random mask, and more on bfloat16.
    """
    bits = np.dtype(f"u{matrix.dtype.itemsize}")
    kept: Array = np.multiply(np.ascontiguousarray(matrix).view(bits), mask, dtype=bits)
    return kept.view(matrix.dtype)
