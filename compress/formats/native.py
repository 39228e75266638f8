"""The format that holds everything: any width, zero points, masks, Conv, experts, int8 factors.

Its files end in `.compress.safetensors`, so that no engine loads packed bytes as weights. The
bytes are documented in docs/format.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from compress import kernels
from compress.formats.arrays import (
    damaged,
    header_text,
    pack_rows,
    pack_super_weights,
    packed_bytes,
    plain,
    spread,
    stand_in,
    super_weight_layout,
    unpack_rows,
    unpack_super_weights,
    zero_codes,
)
from compress.formats.base import MODEL, ArraySpec, Entry, Fetch, Named
from compress.formats.factors import factors_layout, pack_factors, unpack_factors
from compress.formats.own import OwnFormat
from compress.passes.base import CodesSpec, Terms
from compress.tensor import DTYPES, Array, Codes, Tensor, TensorInfo

MIN_BITS, MAX_BITS = 2, 8


class Storage(Enum):
    """How the entries of a matrix are laid out."""

    DENSE = "dense"  # every entry, pruned ones included
    SPARSE = "sparse"  # a bitmask and the kept entries
    OPEN = "open"  # depends on a count that only a survey of the values can tell


def storage(info: TensorInfo, terms: Terms) -> Storage:
    """Whether a bitmask with the kept entries is smaller than every entry (a tie: dense)."""
    if terms.nonzeros is None:
        return Storage.DENSE
    low, high = (_sparse_bytes(info, terms, count) for count in terms.nonzeros)
    dense = _dense_bytes(info, terms)
    if high < dense:
        return Storage.SPARSE
    return Storage.DENSE if low >= dense else Storage.OPEN


class Native(OwnFormat):
    """Bit-packed rows, bitmasks, factors of any dtype, for every role."""

    name: ClassVar[str] = "native"
    weights_suffix: ClassVar[str] = ".compress.safetensors"

    def refuses(self, info: TensorInfo, terms: Terms) -> str | None:
        """What is no floating-point tensor, and codes of other widths."""
        if reason := super().refuses(info, terms):
            return reason
        if terms.codes is not None and not MIN_BITS <= terms.codes.bits <= MAX_BITS:
            return f"{terms.codes.bits}-bit codes: native holds 2 to 8 bits"
        return None

    def layout(self, info: TensorInfo, terms: Terms) -> list[ArraySpec]:
        """The arrays in order: mask, codes or values, scale, zero point, factors, super weights.

        While the storage is open, `.codes` or `.values` is one U8 array whose bounds are bytes.
        """
        specs = _entries_layout(info, terms)
        if terms.codes is not None:
            specs += _scale_layout(info, terms.codes)
        specs += factors_layout(info, terms)
        return specs + super_weight_layout(info, terms)

    def pack(self, tensor: Tensor, terms: Terms) -> Named:
        """The arrays of one tile. Raises ValueError where the terms do not match the tensor."""
        named: Named = {}
        if tensor.codes is not None:
            _pack_codes(tensor, tensor.codes, terms, named)
        else:
            _pack_values(tensor, terms, named)
        if tensor.factors is not None:
            pack_factors(tensor.info.name, tensor.factors, named)
        return named | pack_super_weights(tensor)

    def unpack(self, entry: Entry, fetch: Fetch) -> Tensor:
        """The tensor with its terms. Raises InputError on arrays that contradict each other."""
        info, terms = entry.info, entry.terms
        mask = None
        if storage(info, terms) is Storage.SPARSE:
            mask = _unpack_mask(info, fetch)
        codes = None
        if terms.codes is not None:
            codes = _unpack_codes(info, terms.codes, mask, fetch)
            source = stand_in(info)
        else:
            source = _unpack_values(info, mask, fetch)
        return Tensor(
            info,
            source,
            mask=mask,
            codes=codes,
            factors=unpack_factors(info, terms, fetch),
            outliers=unpack_super_weights(info, terms, fetch, in_scale=False),
        )

    def slack(self, entries: Sequence[Entry]) -> tuple[int, int]:
        """The names of bitmasks that are not there at one end.

        Where the storage is open, few kept entries give a bitmask and many give none.
        """
        total = sum(
            header_text(mask, self.weights_suffix)
            for entry in entries
            if storage(entry.info, entry.terms) is Storage.OPEN
            for mask in (_mask_layout(entry.info),)
        )
        return total, total


# -- sizes and layout ------------------------------------------------------------------------


def _dense_bytes(info: TensorInfo, terms: Terms) -> int:
    rows, columns = info.matrix_shape
    if terms.codes is None:
        return rows * columns * DTYPES[info.dtype].itemsize
    return rows * packed_bytes(columns, terms.codes.bits)


def _kept_bytes(info: TensorInfo, terms: Terms, kept: int) -> int:
    if terms.codes is None:
        return kept * DTYPES[info.dtype].itemsize
    return packed_bytes(kept, terms.codes.bits)


def _sparse_bytes(info: TensorInfo, terms: Terms, kept: int) -> int:
    """What a bitmask and `kept` entries take."""
    rows, columns = info.matrix_shape
    return rows * packed_bytes(columns, 1) + _kept_bytes(info, terms, kept)


def _entries_layout(info: TensorInfo, terms: Terms) -> list[ArraySpec]:
    rows, columns = info.matrix_shape
    what = storage(info, terms)
    suffix = "values" if terms.codes is None else "codes"
    name = f"{info.name}.{suffix}"
    if what is Storage.DENSE:
        if terms.codes is None:
            return [ArraySpec(MODEL, name, info.dtype, (rows, columns))]
        row_bytes = packed_bytes(columns, terms.codes.bits)
        return [ArraySpec(MODEL, name, "U8", (rows, row_bytes))]
    low, high = terms.nonzeros or (0, rows * columns)
    if what is Storage.OPEN:
        least, most = _sparse_bytes(info, terms, low), _dense_bytes(info, terms)
        return [ArraySpec(MODEL, name, "U8", (min(least, most),), most)]
    dtype = info.dtype
    if terms.codes is not None:
        dtype, low, high = "U8", _kept_bytes(info, terms, low), _kept_bytes(info, terms, high)
    kept = ArraySpec(MODEL, name, dtype, (low,), None if low == high else high)
    return [_mask_layout(info), kept]


def _mask_layout(info: TensorInfo) -> ArraySpec:
    rows, columns = info.matrix_shape
    return ArraySpec(MODEL, f"{info.name}.mask", "U8", (rows, packed_bytes(columns, 1)))


def _scale_layout(info: TensorInfo, codes: CodesSpec) -> list[ArraySpec]:
    rows, groups = _scale_shape(info, codes)
    specs = [ArraySpec(MODEL, f"{info.name}.scale", codes.scale_dtype, (rows, groups))]
    if not codes.symmetric:
        row_bytes = packed_bytes(groups, codes.bits)
        specs.append(ArraySpec(MODEL, f"{info.name}.zero_point", "U8", (rows, row_bytes)))
    return specs


def _scale_shape(info: TensorInfo, codes: CodesSpec) -> tuple[int, int]:
    rows, columns = info.matrix_shape
    return (1, 1) if codes.per_tensor else (rows, codes.groups(columns))


# -- pack ------------------------------------------------------------------------------------


def _settled(tensor: Tensor, terms: Terms) -> Storage:
    what = storage(tensor.info, terms)
    if what is Storage.OPEN:
        raise ValueError(f"{tensor.info.name}: the kept entries must be counted before packing")
    return what


def _pack_codes(tensor: Tensor, codes: Codes, terms: Terms, named: Named) -> None:
    name, mask = tensor.info.name, tensor.mask
    rows, columns = codes.values.shape
    if _settled(tensor, terms) is Storage.DENSE:
        row_bytes = packed_bytes(columns, codes.bits)
        named[MODEL, f"{name}.codes"] = pack_rows(codes.values, codes.bits, row_bytes)
    else:
        if not tensor.is_whole:
            raise ValueError(f"{name}: the kept codes are one bit stream, so it is packed whole")
        if mask is None:
            mask = np.ones((rows, columns), np.bool_)
        bitmask, kept = _compress(codes.values, mask)
        stream = pack_rows(kept[None], codes.bits, packed_bytes(kept.size, codes.bits))
        named[MODEL, f"{name}.mask"], named[MODEL, f"{name}.codes"] = bitmask, stream[0]
    per_tensor = terms.codes is not None and terms.codes.per_tensor
    if not per_tensor or tensor.first_row == 0:
        named[MODEL, f"{name}.scale"] = np.ascontiguousarray(codes.scale)
        if codes.zero_point is not None:
            row_bytes = packed_bytes(codes.zero_point.shape[1], codes.bits)
            packed = pack_rows(codes.zero_point, codes.bits, row_bytes)
            named[MODEL, f"{name}.zero_point"] = packed


def _pack_values(tensor: Tensor, terms: Terms, named: Named) -> None:
    """The source's own values, zeros where pruned; what the factors add is not in them."""
    name, mask = tensor.info.name, tensor.mask
    values = plain(tensor.with_(factors=None, outliers=None))
    if _settled(tensor, terms) is Storage.DENSE:
        named[MODEL, f"{name}.values"] = values
        return
    if mask is None:
        mask = np.ones(values.shape, np.bool_)
    bitmask, kept = _compress(values, mask)
    named[MODEL, f"{name}.mask"], named[MODEL, f"{name}.values"] = bitmask, kept


def _compress(values: Array, mask: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], Array]:
    """(bitmask [rows, ceil(columns / 8)], kept entries in row order)."""
    bitmask = np.empty((values.shape[0], packed_bytes(values.shape[1], 1)), np.uint8)
    kept = np.empty(int(np.count_nonzero(mask)), values.dtype)
    kernels.bitmask_compress(np.ascontiguousarray(values), mask, bitmask, kept)
    return bitmask, kept


# -- unpack ----------------------------------------------------------------------------------


def _unpack_mask(info: TensorInfo, fetch: Fetch) -> NDArray[np.bool_]:
    packed = fetch(MODEL, f"{info.name}.mask")
    columns = info.matrix_shape[1]
    bits = np.unpackbits(packed, axis=1, count=columns, bitorder="little")
    return bits.view(np.bool_)


def _unpack_codes(
    info: TensorInfo, spec: CodesSpec, mask: NDArray[np.bool_] | None, fetch: Fetch
) -> Codes:
    rows, columns = info.matrix_shape
    scale = fetch(MODEL, f"{info.name}.scale")
    zero_point = None
    if not spec.symmetric:
        groups = _scale_shape(info, spec)[1]
        zero_point = unpack_rows(fetch(MODEL, f"{info.name}.zero_point"), spec.bits, groups)
    packed = fetch(MODEL, f"{info.name}.codes")
    if mask is None:
        values = unpack_rows(packed, spec.bits, columns)
    else:
        fill = spread(zero_codes(zero_point, spec.bits, rows), spec.group_size, columns)
        values = np.array(np.broadcast_to(fill, mask.shape))
        values[mask] = _unpack_kept(info, packed, mask, spec.bits)
    group_size = columns if spec.per_tensor else spec.group_size
    return Codes(values, scale, zero_point, spec.bits, group_size)


def _unpack_kept(
    info: TensorInfo, packed: NDArray[np.uint8], mask: NDArray[np.bool_], bits: int
) -> NDArray[np.uint8]:
    """The kept codes [n] in row order. Raises InputError where mask and stream disagree."""
    kept = int(np.count_nonzero(mask))
    if packed_bytes(kept, bits) != packed.size:
        raise damaged(info, "its mask keeps another number of codes than are stored")
    codes: NDArray[np.uint8] = unpack_rows(packed[None], bits, kept)[0]
    return codes


def _unpack_values(info: TensorInfo, mask: NDArray[np.bool_] | None, fetch: Fetch) -> Array:
    stored = fetch(MODEL, f"{info.name}.values")
    if mask is None:
        return stored
    if stored.size != int(np.count_nonzero(mask)):
        raise damaged(info, "its mask keeps another number of values than are stored")
    out = np.zeros(info.matrix_shape, DTYPES[info.dtype])
    out[mask] = stored
    return out
