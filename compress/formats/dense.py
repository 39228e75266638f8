"""The format of plain tensors: decoded values under their own names, in the source's dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from compress.formats.arrays import (
    collision,
    pack_super_weights,
    plain,
    plain_layout,
    super_weight_layout,
    tile_of,
    unpack_super_weights,
)
from compress.formats.base import MODEL, ArraySpec, Entry, Fetch, Format, Named
from compress.passes.base import Terms
from compress.tensor import DTYPES, Tensor, TensorInfo


class Dense(Format):
    """Loads wherever the source loads; saves bytes only where the reader compresses zeros."""

    name: ClassVar[str] = "dense"

    def refuses(self, info: TensorInfo, terms: Terms) -> str | None:
        """Only what is not of a floating-point dtype."""
        if info.dtype not in DTYPES or not info.is_float:
            return f"its dtype {info.dtype} is not a floating-point type that can be decoded"
        return None

    def refuses_model(
        self,
        changed: Mapping[str, Terms],
        infos: Sequence[TensorInfo],
        config: Mapping[str, Any] | None,
        aliases: Mapping[str, str] | None = None,
    ) -> str | None:
        """Nothing: every tensor keeps its name."""
        layouts = [(i, self.layout(i, changed[i.name])) for i in infos if i.name in changed]
        return collision(layouts, infos)

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
