"""Formats: how tensors with their terms become the named arrays of an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.checkpoint import manifest, skeleton
from compress.checkpoint.writer import nbytes_of
from compress.errors import UsageError, show
from compress.formats.arrays import pack_super_weights, super_weight_layout
from compress.formats.base import ArraySpec, Entry, Format
from compress.formats.compressed_tensors import CompressedTensors
from compress.formats.dense import Dense
from compress.formats.native import Native
from compress.formats.onnx import Onnx
from compress.passes.base import Terms
from compress.tensor import TensorInfo

FORMATS: dict[str, Format] = {f.name: f for f in (CompressedTensors(), Native(), Onnx(), Dense())}

NAMES = tuple(FORMATS)
_REASONS = {
    "compressed-tensors": "transformers and vLLM load it",
    "onnx": "onnxruntime's operators read it where it lies",
}

# What this tool writes into an output beside config.json and the weights. A source's own file of
# such a name cannot lie beside ours, and none of these belongs to the model that `unpack` restores.
OWN_FILES = frozenset({
    manifest.NAME, "recipe.yaml", "report.json", "super_weights.safetensors",
    "model.onnx", "model.onnx.data", skeleton.FILE,
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    *(f"model{fmt.weights_suffix}.index.json" for fmt in FORMATS.values()),
})  # fmt: skip

__all__ = [
    "NAMES",
    "OWN_FILES",
    "choose",
    "get",
    "pack_super_weights",
    "refusal",
    "slack",
    "super_weight_layout",
]


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
    aliases: Mapping[str, str] | None = None,
) -> str | None:
    """Why a format cannot hold a result, or None; names the first tensor that forces it."""
    for info in infos:
        if info.name in changed and (reason := fmt.refuses(info, changed[info.name])):
            return f"tensor {show(info.name)}: {reason}"
    return fmt.refuses_model(changed, infos, config, aliases)


def choose(
    changed: Mapping[str, Terms],
    infos: Sequence[TensorInfo],
    config: Mapping[str, Any] | None,
    aliases: Mapping[str, str] | None = None,
    *,
    others: Sequence[Mapping[str, Terms]] = (),
    preferred: str = "compressed-tensors",
    otherwise: str = "native",
) -> tuple[Format, str]:
    """The format of `--format auto` and why, in plain words.

    dense where there are no codes, the preferred one where it holds the result, else the other.
    others  what may come out instead and has to be held as well
    """
    if not any(terms.codes is not None for terms in changed.values()):
        return FORMATS["dense"], "no tensor has integer codes: plain tensors hold the result"
    first = FORMATS[preferred]
    reasons = (refusal(first, one, infos, config, aliases) for one in (changed, *others))
    reason = next((r for r in reasons if r is not None), None)
    if reason is None:
        return first, _REASONS[preferred]
    return FORMATS[otherwise], f"{preferred} cannot hold it: {reason}"


def slack(
    fmt: Format,
    entries: Sequence[Entry],
    files: Sequence[Sequence[tuple[str, str, tuple[int, ...]]]],
    end: int,
) -> int:
    """Bytes to add to an output whose open counts were closed at one end, to make it a bound.

    entries  every tensor with its terms, counts still open
    files    the arrays (name, dtype, shape) of each weight file of the closed output, in order
    end      0: the result is at most 0 and makes a lower bound; 1: an upper bound
    0 where both ends have the same arrays. Data only grows with the counts; what does not is text:
    names of arrays (see `Format.slack`), digits of offsets, and the padding of a header to 8 bytes.
    """
    if all(_arrays(fmt, entry, 0) == _arrays(fmt, entry, 1) for entry in entries):
        return 0
    below, above = fmt.slack([entry for entry in entries if entry.terms.changed])
    below, above = below + _record_slack(entries), above + _record_slack(entries)
    digits = []  # of every offset
    total = 0
    for specs in files:
        offset = 0
        for _, dtype, shape in specs:
            begin, offset = offset, offset + nbytes_of(dtype, shape)
            digits += [len(str(begin)), len(str(offset))]
        total += offset
    padding = 7 * len(files)
    if end == 0:
        return -(below + sum(digits) - len(digits) + padding)
    # Where fewer shards come out, a tensor lies further from its file's start than here.
    return above + len(digits) * len(str(total)) - sum(digits) + padding


def _record_slack(entries: Sequence[Entry]) -> int:
    """Digits of groups in the records, and fields that are not in all of them."""
    open_codes = sum(e.terms.codes is not None and e.terms.codes.least is not None for e in entries)
    return 8 * open_codes + 48 * sum(e.terms.least_rank is not None for e in entries)


def _arrays(fmt: Format, entry: Entry, end: int) -> list[ArraySpec]:
    """The arrays of a tensor with its open counts closed at one end."""
    info, terms = entry.info, entry.terms.at(end)
    return fmt.layout(info, terms) if terms.changed else super_weight_layout(info, terms)
