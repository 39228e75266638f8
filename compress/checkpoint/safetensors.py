"""A strict reader of safetensors headers.

Layout: 8 bytes little-endian header length, that many bytes of UTF-8 JSON, then the data. The
tensors must tile the data exactly: no hole, no overlap, nothing after the last one, so that a
file has one meaning and cannot be another format at the same time. Stricter than the reference
implementation where that one lets two readers see two files: duplicate names, unknown fields,
entries written as lists, dimensions or ranks without bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compress.checkpoint import strict_json
from compress.checkpoint.files import InputFile
from compress.errors import InputError, show

MAX_HEADER = 100_000_000
MAX_RANK = 64
_LENGTH_BYTES = 8
_SHORTEST_HEADER = 2  # {}
MAX_DIMENSION = 1 << 48

# Bits per element of every dtype tag of the format.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64,
    "U64": 64, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E4M3": 8,
    "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6,
}  # fmt: skip

_FIELDS = {"dtype", "shape", "data_offsets"}
_DISGUISES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive (a PyTorch file?) named as safetensors", None),
    (b"\x80\x02", "a pickle (a PyTorch file?) named as safetensors", None),
    (b"GGUF", "a GGUF file", "convert it to safetensors first"),
    (b"\x89HDF", "an HDF5 file", "convert it to safetensors first"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header; `offset` is absolute in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A validated header: entries by offset, the file's metadata, and the header's own bytes."""

    entries: list[Entry]
    metadata: dict[str, str]
    raw: bytes


def read_header(file: InputFile) -> Header:
    """Read and validate the header of `file`; no tensor data is touched. Raises InputError."""
    where = show(file.name)
    if file.size == 0:
        raise InputError(f"{where}: the file is empty")
    start = file.read(0, min(file.size, 64))
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    longest = min(MAX_HEADER, file.size - _LENGTH_BYTES)
    if len(start) < _LENGTH_BYTES or not _SHORTEST_HEADER <= length <= longest:
        raise _not_safetensors(where, start, length, file.size)
    raw = file.read(_LENGTH_BYTES, length)
    members = strict_json.parse(raw, file.name, floats=False)
    if not isinstance(members, dict):
        raise InputError(f"{where}: the header is not a JSON object")
    metadata = _check_metadata(members.pop("__metadata__", {}), where)
    base = _LENGTH_BYTES + length
    entries = [_check_entry(name, entry, where, base) for name, entry in members.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes, entry.name))
    _check_tiling(entries, base, file.size, where)
    return Header(entries, metadata, raw)


def _not_safetensors(where: str, start: bytes, length: int, size: int) -> InputError:
    for magic, what, hint in _DISGUISES:
        if start.startswith(magic):
            return InputError(f"{where}: {what}", hint=hint)
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return InputError(
            f"{where}: an HTML page, not a safetensors file", hint="download the file again"
        )
    if size < _LENGTH_BYTES:
        return InputError(f"{where}: {size} bytes, too short for a safetensors file")
    if length > MAX_HEADER:
        return InputError(
            f"{where}: not a safetensors file (it claims a header of {length} bytes,"
            f" the limit is {MAX_HEADER})"
        )
    if length < _SHORTEST_HEADER:
        return InputError(f"{where}: not a safetensors file (its header is {length} bytes long)")
    return InputError(
        f"{where}: cut short or not a safetensors file"
        f" (header of {length} bytes in a file of {size})"
    )


def _check_metadata(metadata: Any, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise InputError(f"{where}: __metadata__ is not an object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise InputError(f"{where}: __metadata__ entry '{show(key)}' is not a string")
    return metadata


def _check_entry(name: str, entry: Any, where: str, base: int) -> Entry:
    if not isinstance(entry, dict):
        raise _bad(where, name, "its entry is not an object")
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except KeyError as error:
        raise _bad(where, name, f"{error.args[0]} is missing") from None
    if len(entry) != len(_FIELDS):
        extra = min(entry.keys() - _FIELDS)
        raise _bad(where, name, f"unknown field '{show(extra)}', which could change its meaning")
    bits = BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        said = f"'{show(dtype)}'" if isinstance(dtype, str) else "that is not a string"
        raise _bad(where, name, f"unknown dtype {said}")
    if not isinstance(shape, list):
        raise _bad(where, name, "shape is not a list")
    if len(shape) > MAX_RANK:
        raise _bad(where, name, f"{len(shape)} dimensions, more than {MAX_RANK}")
    for dimension in shape:
        if type(dimension) is not int or not 0 <= dimension < MAX_DIMENSION:
            raise _bad(where, name, "a dimension that is not an integer from 0 to 2^48 - 1")
        bits *= dimension
    if bits % 8:
        raise _bad(where, name, f"{bits} bits do not end on a byte")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise _bad(where, name, "data_offsets is not a pair")
    begin, end = offsets
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise _bad(where, name, "data_offsets are not two integers with 0 <= begin <= end")
    if end - begin != bits // 8:
        raise _bad(
            where, name, f"{end - begin} bytes of data where dtype and shape need {bits // 8}"
        )
    return Entry(name, dtype, tuple(shape), base + begin, end - begin)


def _check_tiling(entries: list[Entry], base: int, size: int, where: str) -> None:
    """The sorted entries must cover the bytes from `base` to `size` exactly once."""
    position = base
    for entry in entries:
        if entry.offset < position:
            raise _bad(where, entry.name, "its data overlaps another tensor's")
        if entry.offset > position:
            raise _bad(where, entry.name, f"{entry.offset - position} unused bytes before its data")
        position += entry.nbytes
    if position > size:
        raise InputError(
            f"{where}: cut short: {size} bytes of {position}", hint="download the file again"
        )
    if position < size:
        raise InputError(f"{where}: {size - position} bytes after the last tensor's data")


def _bad(where: str, name: str, what: str) -> InputError:
    return InputError(f"{where}: tensor '{show(name)}': {what}")
