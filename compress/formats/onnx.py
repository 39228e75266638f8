"""The format of ONNX outputs that transformers cannot load: codes as onnxruntime's operators lie.

model.onnx points into these files, so nothing is stored twice. It holds what native holds; masks
are kept as zeros (the operators know no bitmask) and codes of odd widths take the next width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from compress.formats.arrays import (
    pack_super_weights,
    plain,
    plain_layout,
    stand_in,
    super_weight_layout,
    tile_of,
    unpack_super_weights,
)
from compress.formats.base import MODEL, ArraySpec, Entry, Fetch, Named
from compress.formats.factors import factors_layout, pack_factors, unpack_factors
from compress.formats.onnx_forms import (
    Form,
    Kind,
    form_of,
    pack_codes,
    pack_zero_points,
    unpack_codes,
    unpack_zero_points,
)
from compress.formats.own import OwnFormat
from compress.passes.base import CodesSpec, Terms
from compress.tensor import Codes, Tensor, TensorInfo


class Onnx(OwnFormat):
    """Every width, zero points, Conv, factors: in the operators' own layout."""

    name: ClassVar[str] = "onnx"
    weights_suffix: ClassVar[str] = ".compress.safetensors"

    def layout(self, info: TensorInfo, terms: Terms) -> list[ArraySpec]:
        """The arrays in order: codes or the tensor itself, scale, zero point, factors, the rest."""
        specs = plain_layout(info) if terms.codes is None else _codes_layout(info, terms.codes)
        return specs + factors_layout(info, terms) + super_weight_layout(info, terms)

    def pack(self, tensor: Tensor, terms: Terms) -> Named:
        """The arrays of one tile. Raises ValueError where the terms do not match the tensor."""
        named: Named = {}
        name = tensor.info.name
        if tensor.codes is None or terms.codes is None:
            outliers = None if tensor.factors is not None else tensor.outliers
            values = plain(tensor.with_(factors=None, outliers=outliers))
            named[MODEL, name] = tile_of(tensor.info, tensor, values)
        else:
            _pack(tensor, tensor.codes, terms.codes, named)
        if tensor.factors is not None:
            pack_factors(name, tensor.factors, named)
        return named | pack_super_weights(tensor)

    def unpack(self, entry: Entry, fetch: Fetch) -> Tensor:
        """The tensor with its terms; a mask is gone, its zeros are in the codes."""
        info, terms = entry.info, entry.terms
        codes, source = None, stand_in(info)
        if terms.codes is None:
            source = info.to_matrix(fetch(MODEL, info.name))
        else:
            codes = _unpack(info, terms.codes, fetch)
        return Tensor(
            info,
            source,
            codes=codes,
            factors=unpack_factors(info, terms, fetch),
            outliers=unpack_super_weights(info, terms, fetch, in_scale=False),
        )

    def notes(self, terms: Sequence[Terms], infos: Sequence[TensorInfo]) -> list[str]:
        """Codes that take more bits than they have."""
        pairs = [
            (t.codes, form_of(i, t.codes)) for i, t in zip(infos, terms, strict=True) if t.codes
        ]
        widths = sorted({(c.bits, f.bits) for c, f in pairs if c.bits != f.bits})
        return [
            f"onnx: codes of {bits} bits take {wide} bits each, which onnxruntime's operators read"
            for bits, wide in widths
        ]


def _codes_layout(info: TensorInfo, codes: CodesSpec) -> list[ArraySpec]:
    rows, columns = info.matrix_shape
    form = form_of(info, codes)
    signed = form.kind is Kind.INTEGERS and form.bits == 8 and codes.symmetric
    scale = (1, 1) if codes.per_tensor else (rows, codes.groups(columns))
    specs = [
        ArraySpec(
            MODEL, f"{info.name}.codes", "I8" if signed else "U8", (rows, form.row_bytes(columns))
        ),
        ArraySpec(MODEL, f"{info.name}.scale", codes.scale_dtype, scale),
    ]
    if not codes.symmetric:
        row_bytes = -(-form.count * form.bits // 8)
        specs.append(ArraySpec(MODEL, f"{info.name}.zero_point", "U8", (rows, row_bytes)))
    return specs


def _pack(tensor: Tensor, codes: Codes, spec: CodesSpec, named: Named) -> None:
    info, form = tensor.info, form_of(tensor.info, spec)
    packed = pack_codes(codes.values, codes.bits, spec.symmetric, form)
    signed = form.kind is Kind.INTEGERS and form.bits == 8 and spec.symmetric
    named[MODEL, f"{info.name}.codes"] = packed.view(np.int8) if signed else packed
    if not spec.per_tensor or tensor.first_row == 0:
        named[MODEL, f"{info.name}.scale"] = np.ascontiguousarray(codes.scale)
    if codes.zero_point is not None:
        # Operators read a zero point a row, one for the whole tensor is repeated.
        rows = (codes.values.shape[0], codes.zero_point.shape[1])
        spread = np.ascontiguousarray(np.broadcast_to(codes.zero_point, rows))
        named[MODEL, f"{info.name}.zero_point"] = pack_zero_points(spread, form)


def _unpack(info: TensorInfo, spec: CodesSpec, fetch: Fetch) -> Codes:
    columns = info.matrix_shape[1]
    form: Form = form_of(info, spec)
    packed = fetch(MODEL, f"{info.name}.codes").view(np.uint8)
    values = unpack_codes(packed, columns, spec.bits, spec.symmetric, form)
    zero_point = None
    if not spec.symmetric:
        zero_point = unpack_zero_points(fetch(MODEL, f"{info.name}.zero_point"), form)
        if spec.per_tensor:
            zero_point = np.ascontiguousarray(zero_point[:1])
    group = columns if spec.per_tensor else spec.group_size
    return Codes(values, fetch(MODEL, f"{info.name}.scale"), zero_point, spec.bits, group)
