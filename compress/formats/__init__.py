"""Formats: how tensors with their terms become the named arrays of an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.errors import UsageError, show
from compress.formats.arrays import pack_super_weights, super_weight_layout
from compress.formats.base import Format
from compress.formats.compressed_tensors import CompressedTensors
from compress.formats.dense import Dense
from compress.formats.native import Native
from compress.passes.base import Terms
from compress.tensor import TensorInfo

FORMATS: dict[str, Format] = {f.name: f for f in (CompressedTensors(), Native(), Dense())}

NAMES = tuple(FORMATS)

__all__ = ["NAMES", "choose", "get", "pack_super_weights", "refusal", "super_weight_layout"]


def get(name: str) -> Format:
    """The format called `name`. Raises UsageError."""
    if name not in FORMATS:
        raise UsageError(f"no format called {show(name)}", hint=f"one of {', '.join(FORMATS)}")
    return FORMATS[name]


def refusal(
    fmt: Format,
    changed: Mapping[str, Terms],
    infos: Sequence[TensorInfo],
    config: Mapping[str, Any] | None,
) -> str | None:
    """Why a format cannot hold a result, or None; names the first tensor that forces it."""
    for info in infos:
        if info.name in changed and (reason := fmt.refuses(info, changed[info.name])):
            return f"tensor {show(info.name)}: {reason}"
    return fmt.refuses_model(changed, infos, config)


def choose(
    changed: Mapping[str, Terms],
    infos: Sequence[TensorInfo],
    config: Mapping[str, Any] | None,
) -> tuple[Format, str]:
    """The format of `--format auto` and why, in plain words.

    dense where there are no codes, compressed-tensors where it holds the result, else native.
    """
    if not any(terms.codes is not None for terms in changed.values()):
        return FORMATS["dense"], "no tensor has integer codes: plain tensors hold the result"
    preferred = FORMATS["compressed-tensors"]
    reason = refusal(preferred, changed, infos, config)
    if reason is None:
        return preferred, "transformers and vLLM load it"
    return FORMATS["native"], f"compressed-tensors cannot hold it: {reason}"
