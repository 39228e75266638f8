"""PyTorch files, with the parser of the child process in this one: no process a run.

What the child writes has to be a file that our strict reader takes. The first byte of an input says
how the rest becomes a file: as it is; as the pickle of a zip archive with right checksums, two
storages of sixteen bytes beside it; or behind the magic number of the older format.
"""

from __future__ import annotations

import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch

from compress.checkpoint import torch_child, torch_file
from compress.checkpoint.files import InputFile
from compress.checkpoint.safetensors import read_header
from compress.errors import InputError
from fuzz.checks import Broken, MemoryFile, outcome, require

NAME = "pytorch_model.bin"
LONGEST = 1024
WORDS = (
    b"\x80\x02", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
    b"ctorch\nHalfStorage\n", b"ctorch\nBoolStorage\n", b"ctorch.storage\nUntypedStorage\n",
    b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._utils\n_rebuild_tensor_v3\n",
    b"ctorch\nbfloat16\n", b"ctorch\ndevice\n", b"c_codecs\nencode\n",
    b"ctorch.nn.parameter\nParameter\n", b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000",
    b"X\x01\x00\x00\x001", b"X\x03\x00\x00\x00cpu", b"X\x01\x00\x00\x00w",
    b"X\x0a\x00\x00\x00state_dict", b"X\x0c\x00\x00\x00__metadata__", b"Q", b"R", b"b", b"u", b"s",
    b"}(", b"](", b"e", b")", b"\x85", b"\x86", b"\x87", b"(", b"t", b"\x88", b"\x89", b"K\x04",
    b"J\xff\xff\xff\x7f", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"q\x00", b"h\x00", b"N",
    b".", b"G\x7f\xf0\x00\x00\x00\x00\x00\x00", b"\x93", b"\x8c\x01w", b"\x94",
)  # fmt: skip
_DATA = struct.pack("<4f", 1, 2, 3, 4)
_source, _target = MemoryFile(), MemoryFile()


def seeds(corpus: Path | None) -> Iterator[bytes]:
    """Files as torch writes them in both formats, and those of the corpus."""
    states: list[Any] = [
        {"w": torch.zeros(2, 2), "b": torch.zeros(4, dtype=torch.float16)},
        {"state_dict": {"w": torch.zeros(4).reshape(2, 2).t(), "n": 3}, "epoch": 1},
        {"w": torch.nn.Parameter(torch.zeros(2)), "i": torch.zeros(1, dtype=torch.int64)},
    ]
    shared = torch.zeros(4)
    states.append({"a": shared, "b": shared, "c": shared[1:3]})
    for state in states:
        for is_zip in (True, False):
            file = BytesIO()
            torch.save(state, file, _use_new_zipfile_serialization=is_zip)
            yield from _both(file.getvalue())
    for path in sorted(corpus.glob("pickle/*")) if corpus else ():
        if path.stat().st_size < 4000:
            yield from _both(path.read_bytes())


def _both(raw: bytes) -> Iterator[bytes]:
    """A file as it is (where it is short), and by its pickle."""
    if len(raw) < LONGEST:
        yield b"\x00" + raw
    if raw.startswith(torch_file._LEGACY_MAGIC):
        yield b"\x01" + raw[len(torch_file._LEGACY_MAGIC) :]
        return
    try:
        with zipfile.ZipFile(BytesIO(raw)) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            yield b"\x02" + archive.read(name)
    except (zipfile.BadZipFile, StopIteration, ValueError, RuntimeError):
        yield b"\x02" + raw


def target(data: bytes) -> None:
    """Convert one file."""
    kind = data[0] & 3 if data else 0
    raw = data[1:]
    if kind == 1:
        raw = torch_file._LEGACY_MAGIC + raw
    elif kind:
        raw = _archive(raw)
    file = InputFile(_source.fill(raw), NAME)
    spawn, limit = torch_file._spawn, torch_child.limit_resources
    torch_file._spawn, torch_child.limit_resources = _in_process, _no_limits
    try:
        # What the child switches on for good is switched back here.
        with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants():
            found = outcome(
                lambda: torch_file.convert(file, allow_pickle=True),
                names=NAME, errors=(InputError,),
            )  # fmt: skip
    finally:
        torch_file._spawn, torch_child.limit_resources = spawn, limit
        file.close()
    if found is not None:
        try:
            _check(found)
        finally:
            found.file.close()


def _check(found: torch_file.Converted) -> None:
    try:
        header = read_header(found.file)
    except InputError as error:
        raise Broken("the child wrote what our reader refuses") from error
    names = {entry.name for entry in header.entries}
    require(names, "no tensors, and no refusal")
    require(set(found.aliases.values()) <= names, "a tie to a tensor that is not there")
    require(not names & set(found.aliases), "a tie that is a tensor as well")
    for text in found.warnings:
        require(text.isascii() and text.isprintable() and NAME in text, "a warning unfit to print")


def _in_process(file: InputFile, target: IO[bytes], report: IO[bytes], where: str) -> None:
    descriptors = (file.descriptor, target.fileno(), report.fileno())
    status = torch_child.main([*map(str, descriptors), str(file.size)])
    require(status == 0, "the child ended without a report")


def _no_limits(size: int) -> None:
    """The driver limits the process."""


def _archive(pickle: bytes) -> bytes:
    """A zip archive as torch writes it."""
    members = [
        (b"archive/data.pkl", pickle), (b"archive/byteorder", b"little"),
        (b"archive/data/0", _DATA), (b"archive/data/1", _DATA), (b"archive/version", b"3\n"),
    ]  # fmt: skip
    body, directory = bytearray(), bytearray()
    for name, data in members:
        shared = struct.pack(
            "<HHHHHIIIHH", 20, 0, 0, 0, 33, zlib.crc32(data), len(data), len(data), len(name), 0
        )
        directory += b"PK\x01\x02" + b"\x14\x00" + shared
        directory += struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + name
        body += b"PK\x03\x04" + shared + name + data
    count, end = len(members), struct.pack("<IIH", len(directory), len(body), 0)
    return bytes(body + directory) + b"PK\x05\x06\0\0\0\0" + struct.pack("<HH", count, count) + end
