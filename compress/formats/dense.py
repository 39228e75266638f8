"""The format of plain tensors: decoded values under their own names, in the source's dtype."""

from __future__ import annotations

from typing import ClassVar

from compress.formats.arrays import (
    pack_super_weights,
    plain,
    plain_layout,
    super_weight_layout,
    tile_of,
    unpack_super_weights,
)
from compress.formats.base import MODEL, ArraySpec, Entry, Fetch, Named
from compress.formats.own import OwnFormat
from compress.passes.base import Terms
from compress.tensor import Tensor, TensorInfo


class Dense(OwnFormat):
    """Loads wherever the source loads; saves bytes only where the reader compresses zeros."""

    name: ClassVar[str] = "dense"

    def layout(self, info: TensorInfo, terms: Terms) -> list[ArraySpec]:
        """The tensor itself, and its exact entries beside it."""
        return plain_layout(info) + super_weight_layout(info, terms)

    def pack(self, tensor: Tensor, terms: Terms) -> Named:
        """The decoded values of one tile. Raises ValueError for a part of a transposed tensor."""
        named: Named = {(MODEL, tensor.info.name): tile_of(tensor.info, tensor, plain(tensor))}
        return named | pack_super_weights(tensor)

    def unpack(self, entry: Entry, fetch: Fetch) -> Tensor:
        """The stored values as the source; no other term is left to apply."""
        info = entry.info
        source = info.to_matrix(fetch(MODEL, info.name))
        return Tensor(
            info,
            source,
            outliers=unpack_super_weights(info, entry.terms, fetch, in_scale=False),
        )
