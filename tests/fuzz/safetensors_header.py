"""The header of a safetensors file. What our reader takes, the library takes with the same meaning.

The first byte of an input says how the rest becomes a file: as it is, behind its length, or behind
its length and with as many bytes of data as its own offsets ask for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import safetensors

from compress.checkpoint.files import InputFile
from compress.checkpoint.safetensors import BITS, Header, read_header
from compress.errors import InputError
from fuzz.checks import MemoryFile, outcome, require

NAME = "model.safetensors"
MOST_DATA = 1 << 16
WORDS = (
    b'"dtype":"', b'"shape":[', b'"data_offsets":[', b'"__metadata__":{', b'"F32"', b'"BF16"',
    b'"F4"', b'"F6_E2M3"', b'"I64"', b'"BOOL"', b"[0,16]", b"[]", b"{}", b"null", b"true", b"-0",
    b"1e1", b"NaN", b"18446744073709551616", b"281474976710656", b"\\ud800", b"\\u0000",
    b'"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}', b"PK\x03\x04", b"GGUF", b"\xff",
)  # fmt: skip
_OFFSETS = re.compile(rb"\[\s*\d{1,6}\s*,\s*(\d{1,6})\s*\]")
_file = MemoryFile()


def seeds(corpus: Path | None) -> Iterator[bytes]:
    """Files of the corpus, as they are and by their headers; a file of every dtype."""
    yield b"\x02{}"
    offset, parts = 0, []
    for tag, bits in BITS.items():
        end = offset + bits
        parts.append(f'"{tag}":{{"dtype":"{tag}","shape":[8],"data_offsets":[{offset},{end}]}}')
        yield b"\x02" + f"{{{parts[-1].replace(f'[{offset},{end}]', f'[0,{bits}]')}}}".encode()
        offset = end
    yield b"\x03{" + ",".join(parts[:8]).encode() + b"}"
    for path in sorted(corpus.glob("st/*.safetensors")) if corpus else ():
        if path.stat().st_size < 2000:
            raw = path.read_bytes()
            yield b"\x00" + raw
            length = int.from_bytes(raw[:8], "little")
            yield b"\x02" + raw[8 : 8 + length]


def target(data: bytes) -> None:
    """Read one header."""
    how, raw, size = data[:1], data[1:], 0
    kind = how[0] & 3 if how else 0
    if kind:
        text, raw = raw, len(raw).to_bytes(8, "little") + raw
        if kind > 1:
            size = len(raw) + max((int(end) for end in _OFFSETS.findall(text)), default=0)
    if size > MOST_DATA:
        size = 0
    file = InputFile(_file.fill(raw, size), NAME)
    try:
        header = outcome(lambda: read_header(file), names=NAME, errors=(InputError,))
    finally:
        file.close()
    if header is not None:
        _compare(header, raw + bytes(max(0, size - len(raw))))


def _compare(header: Header, whole: bytes) -> None:
    position = len(whole) - sum(entry.nbytes for entry in header.entries)
    require(position == 8 + len(header.raw), "tensors that do not tile the data")
    try:
        theirs = dict(safetensors.deserialize(whole))  # type: ignore[no-untyped-call]
    except Exception as error:
        raise AssertionError("the library refuses what our reader takes") from error
    require(len(theirs) == len(header.entries), "the library finds other tensors")
    for entry in header.entries:
        require(entry.offset == position, "a hole before a tensor")
        position += entry.nbytes
        other = theirs.get(entry.name)
        require(other is not None, "the library finds other names")
        require(tuple(other["shape"]) == entry.shape, "the library finds another shape")
        require(other["dtype"] == entry.dtype, "the library finds another dtype")
        require(len(other["data"]) == entry.nbytes, "the library finds another size")
