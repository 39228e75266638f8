"""How integer codes have to lie for onnxruntime's operators to read them where they are.

BLOCKS is what MatMulNBits and GatherBlockQuantized read: rows of blocks of a power of two of
columns, codes offset binary, low bits first, 2, 4 or 8 bits. INTEGERS is what DequantizeLinear
reads: 4- or 8-bit integers, signed where the codes are symmetric. Codes of 3, 5, 6 and 7 bits take
the next width there is; their values do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from compress.formats.arrays import pack_rows, packed_bytes, unpack_rows
from compress.passes.base import CodesSpec
from compress.tensor import Role, TensorInfo

# What MatMulNBits takes, measured on onnxruntime 1.32: blocks of 2 bits beyond 128 and below 32
# leave its kernels for a path that is a hundred times as slow.
MIN_BLOCK, MAX_BLOCK = 16, 4096
_FAST_2_BITS = (32, 128)
_BLOCK_ROLES = frozenset({Role.LINEAR, Role.CONV1D, Role.HEAD, Role.EMBEDDING})
_SCALE_BYTES = 2


class Kind(Enum):
    """The operator that reads a form."""

    BLOCKS = "blocks"
    INTEGERS = "integers"


@dataclass(frozen=True)
class Form:
    """Where codes and scales of a matrix of `columns` columns lie.

    bits    of the operator: 2, 4 or 8
    block   BLOCKS: columns of a block; INTEGERS: columns that share a scale
    count   blocks, or scales, in a row
    repeat  blocks that share one stored scale
    """

    kind: Kind
    bits: int
    block: int
    count: int
    repeat: int = 1

    @property
    def row_codes(self) -> int:
        """Codes of a row, those that fill its last block included."""
        return self.block * self.count

    def row_bytes(self, columns: int) -> int:
        """Bytes of the codes of a row."""
        stored = self.row_codes if self.kind is Kind.BLOCKS else columns
        return packed_bytes(stored, self.bits)


def wider(bits: int) -> int:
    """The operators' width that holds codes of `bits` bits."""
    return 2 if bits == 2 else 4 if bits <= 4 else 8


def blocks_of(bits: int, group_size: int, columns: int, *, exact: bool) -> Form | None:
    """The BLOCKS form of groups in rows of `columns`; None where no block fits the groups.

    exact  only blocks that divide the columns, so that rows have no filling
    """
    low, high = _FAST_2_BITS if bits == 2 else (MIN_BLOCK, MAX_BLOCK)
    sizes = [1 << n for n in range(low.bit_length() - 1, high.bit_length())]
    if group_size < columns:
        fitting = [size for size in sizes if group_size % size == 0]
        if not fitting or (exact and columns % fitting[-1]):
            return None
        block = fitting[-1]
        return Form(Kind.BLOCKS, bits, block, -(-columns // block), group_size // block)
    fitting = [size for size in sizes if not exact or columns % size == 0]
    if not fitting:
        return None

    def row_bytes(block: int) -> int:
        count = -(-columns // block)
        return packed_bytes(block * count, bits) + count * _SCALE_BYTES

    block = min(fitting, key=lambda size: (row_bytes(size), -size))
    count = -(-columns // block)
    return Form(Kind.BLOCKS, bits, block, count, count)


def form_of(info: TensorInfo, codes: CodesSpec) -> Form:
    """The form that a tensor's codes take in the onnx format."""
    columns = max(info.matrix_shape[1], 1)
    group = columns if codes.per_tensor else min(codes.group_size, columns)
    bits = wider(codes.bits)
    if info.role in _BLOCK_ROLES:
        # GatherBlockQuantized knows no filling of rows.
        found = blocks_of(bits, group, columns, exact=info.role is Role.EMBEDDING)
        if found is not None:
            return found
    groups = -(-columns // group)
    # Integers of 4 bits lie in one stream over the whole array, so rows have to end on bytes.
    whole = columns % 2 == 0 and (codes.symmetric or groups % 2 == 0)
    integers = 8 if bits == 8 or not whole or info.role is Role.EMBEDDING else 4
    return Form(Kind.INTEGERS, integers, group, groups)


def pack_codes(
    values: NDArray[np.uint8], bits: int, symmetric: bool, form: Form
) -> NDArray[np.uint8]:
    """uint8 [rows, columns] of codes of `bits` bits -> uint8 [rows, row bytes] in `form`."""
    columns = values.shape[1]
    moved = values + np.uint8(_shift(bits, form)) if symmetric else values
    if form.kind is Kind.INTEGERS:
        if symmetric:
            moved = moved ^ np.uint8(1 << (form.bits - 1))
        return moved if form.bits == 8 else pack_rows(moved, form.bits, form.row_bytes(columns))
    if form.row_codes != columns:
        moved = np.pad(moved, ((0, 0), (0, form.row_codes - columns)))
    return moved if form.bits == 8 else pack_rows(moved, form.bits, form.row_bytes(columns))


def unpack_codes(
    packed: NDArray[np.uint8], columns: int, bits: int, symmetric: bool, form: Form
) -> NDArray[np.uint8]:
    """The inverse of `pack_codes`: uint8 [rows, columns]."""
    values = packed[:, :columns]
    if form.bits != 8:
        values = unpack_rows(packed, form.bits, columns)
    if not symmetric:
        return np.ascontiguousarray(values)
    if form.kind is Kind.INTEGERS:
        values = values ^ np.uint8(1 << (form.bits - 1))
    return np.ascontiguousarray(values - np.uint8(_shift(bits, form)))


def pack_zero_points(zero_point: NDArray[np.uint8], form: Form) -> NDArray[np.uint8]:
    """uint8 [rows, groups] -> uint8 [rows, bytes]: one a block, or one a scale."""
    if form.kind is Kind.BLOCKS and form.repeat > 1:
        zero_point = np.repeat(zero_point, form.repeat, axis=1)[:, : form.count]
    if form.bits == 8:
        return np.ascontiguousarray(zero_point)
    return pack_rows(zero_point, form.bits, packed_bytes(zero_point.shape[1], form.bits))


def unpack_zero_points(packed: NDArray[np.uint8], form: Form) -> NDArray[np.uint8]:
    """The inverse of `pack_zero_points`."""
    found = packed if form.bits == 8 else unpack_rows(packed, form.bits, form.count)
    return np.ascontiguousarray(found[:, :: form.repeat])


def _shift(bits: int, form: Form) -> int:
    """What a symmetric code gains when its zero moves to the middle of the wider range."""
    return (1 << (form.bits - 1)) - (1 << (bits - 1))
