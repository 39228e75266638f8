"""What a format is: pure functions between a decoded-by-formula `Tensor` and named arrays.

A format never opens a file. `layout` says from headers which arrays a tensor becomes, `pack`
makes them, `unpack` turns them back into a `Tensor`. Arrays of a tensor that was cut into row
tiles are concatenated along their first axis by the writer, so every array of a sliceable
tensor must be stackable by rows; a tensor with factors or outliers, or with a mask under codes,
is never cut. Sizes are exact once the terms are: a stream of kept codes is one bit stream over the
whole tensor, ceil(nonzeros * bits / 8) bytes, without padding of rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from compress.passes.base import Terms
from compress.tensor import Array, Tensor, TensorInfo

# The files an array can go to. "model" is the weight file (sharded), the others are one file each.
MODEL, ADAPTER, SUPER_WEIGHTS = "model", "adapter", "super_weights"


@dataclass(frozen=True)
class ArraySpec:
    """One array a tensor becomes: (part, name, safetensors dtype tag, shape).

    `at_most` is the upper bound of the first dimension where it depends on the values;
    `shape[0]` is then the lower bound. Where the terms give bounds instead of counts, an array
    may be listed as one U8 vector of so many bytes: such a layout is for estimates only.
    """

    part: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    at_most: int | None = None


Named = dict[tuple[str, str], Array]  # (part, array name) -> array
Fetch = Callable[[str, str], Array]  # (part, array name) -> the whole stored array


@dataclass(frozen=True)
class Entry:
    """A changed tensor as recorded in the weight file's metadata: enough to decode it.

    `info` carries the original name, dtype, shape and role.
    """

    info: TensorInfo
    terms: Terms


class Format(ABC):
    """Base of every format."""

    name: ClassVar[str]
    weights_suffix: ClassVar[str] = ".safetensors"  # model.safetensors, model-00001-of-...
    base_stands_alone: ClassVar[bool] = False  # engines run the codes without the other terms

    def refuses(self, info: TensorInfo, terms: Terms) -> str | None:
        """Why this tensor with these terms cannot be held, or None. From headers alone."""
        return None

    def refuses_model(
        self,
        changed: Mapping[str, Terms],
        infos: Sequence[TensorInfo],
        config: Mapping[str, Any] | None,
        aliases: Mapping[str, str] | None = None,
    ) -> str | None:
        """Why the model as a whole cannot be held (e.g. fused sets of unequal width), or None.

        `infos` are all tensors of the checkpoint, `config` its config.json, None where it has none,
        `aliases` the names of tied tensors that are not stored, with the names that are.
        """
        return None

    @abstractmethod
    def layout(self, info: TensorInfo, terms: Terms) -> list[ArraySpec]:
        """The arrays of a changed tensor, in the order they are written."""

    @abstractmethod
    def pack(self, tensor: Tensor, terms: Terms) -> Named:
        """The arrays of one tile, named, shaped and typed as `layout` says."""

    @abstractmethod
    def unpack(self, entry: Entry, fetch: Fetch) -> Tensor:
        """The tensor with its terms, from stored arrays. `source` is an empty stand-in."""

    def extra_files(
        self, entries: Sequence[Entry], config: dict[str, Any] | None, infos: Sequence[TensorInfo]
    ) -> dict[str, bytes]:
        """Further files by relative path: the changed config.json, the adapter's config."""
        return {}

    def slack(self, entries: Sequence[Entry]) -> tuple[int, int]:
        """(below, above): bytes of names and headers by which sizes at the ends can be no bounds.

        An output can be smaller than with every open count at its low end by `below`, and larger
        than with every count at its high end by `above`, because an array (or a line of a config)
        may exist between the ends that does not exist at one of them.
        """
        return 0, 0

    def notes(self, terms: Sequence[Terms], infos: Sequence[TensorInfo]) -> list[str]:
        """What a user of the output should know, in plain words, for the report."""
        return []
