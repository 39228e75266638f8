"""What formats have in common that hold any floating-point tensor under its own name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.formats.arrays import collision
from compress.formats.base import Format
from compress.passes.base import Terms
from compress.tensor import DTYPES, TensorInfo


class OwnFormat(Format):
    """A format that no engine's rules bind: only dtypes and taken names are refused."""

    def refuses(self, info: TensorInfo, terms: Terms) -> str | None:
        """What is not of a floating-point dtype."""
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
        """Array names that another tensor already has."""
        layouts = [(i, self.layout(i, changed[i.name])) for i in infos if i.name in changed]
        return collision(layouts, infos)
