"""PyTorch files, only when asked for: checked as a container, then unpickled in a child process.

Nothing here unpickles. The container is validated first (a zip archive as torch writes it, or
the older bare pickles), the globals that its pickle names are read as data, and a child with
limits (`torch_child.py`) writes the tensors into an unnamed temporary safetensors file, which
goes through the same strict reader as any other input.
"""

from __future__ import annotations

import os
import pickletools
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from compress.checkpoint import strict_json
from compress.checkpoint.files import InputFile, read_error
from compress.errors import InputError, ResourceError, show

MAX_PICKLE = 64 << 20
MAX_MEMBERS = 400_000
MAX_REPORT = 256 << 20
_LOCAL_HEADER = 30
_END_RECORD = 22
# The first pickle of the older format: the number 0x1950a86a20f9469cfc6c, protocol 2.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Packages that a state dict refers to; the weights-only unpickler has the exact list.
_PACKAGES = frozenset({"torch", "collections", "numpy", "_codecs", "builtins", "__builtin__"})
_REBUILDERS = {
    "_rebuild_qtensor": "already quantized",
    "_rebuild_meta_tensor_no_storage": "a shape without data",
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_nested_tensor": "nested",
}
REASONS = {
    "no_torch": "reading PyTorch files needs torch, which is not installed",
    "unpickling": "not a plain state dict: it holds objects that are not weights, or is damaged",
    "memory": "needs more memory than its size justifies",
    "disk": "its tensors could not be written to a temporary file",
    "no_state_dict": "no state dict in it (a dict from names to tensors)",
    "too_many": "more objects than a checkpoint has",
    "keys": "tensor names that are not strings",
    "reserved": "a reserved name",
    "nested": "not a tensor but a structure that holds tensors",
    "kind": "not a plain CPU tensor",
    "quantized": "already quantized",
    "meta": "a shape without data",
    "layout": "not a dense tensor",
    "dtype": "a dtype that safetensors cannot hold",
    "rank": "more than 64 dimensions",
    "bounds": "reaches outside its storage",
    "expanded": "claims more elements than its storage holds",
}


@dataclass
class Converted:
    """The safetensors copy of a PyTorch file: no name on disk, gone when it is closed."""

    file: InputFile
    aliases: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Answer:
    """What the child reports: ties, entries that were no tensors, where the state dict was."""

    aliases: dict[str, str]
    dropped: list[str]
    root: str


def convert(file: InputFile, *, allow_pickle: bool) -> Converted:
    """Validate `file` and have a child turn it into safetensors. Raises InputError."""
    where = show(file.name)
    start = file.read(0, min(file.size, 64))
    if file.size == 0:
        raise InputError(f"{where}: the file is empty")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= file.size - 8:
        raise InputError(
            f"{where}: a safetensors file under the name of a PyTorch file",
            hint="rename it to .safetensors",
        )
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{where}: a Git LFS pointer, not the weights", hint="run `git lfs pull`")
    if not allow_pickle:
        raise InputError(
            f"{where}: a PyTorch file is a pickle, a program that runs when it is loaded",
            hint="--allow-pickle reads it in a limited process, weights only;"
            " a safetensors copy is safer",
        )
    if start.startswith(b"PK\x03\x04"):
        _check_pickle(_check_archive(file), where)
    elif not start.startswith(_LEGACY_MAGIC):
        raise InputError(f"{where}: not a PyTorch checkpoint: neither of its two formats")
    return _run_child(file)


def _check_archive(file: InputFile) -> bytes:
    """Validate the zip container; returns the bytes of its `data.pkl`. Raises InputError."""
    where = show(file.name)
    try:
        with open(os.dup(file.descriptor), "rb") as stream, zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
            comment = archive.comment
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, ValueError) as error:
        raise InputError(f"{where}: a damaged zip archive ({type(error).__name__})") from None
    except OSError as error:
        raise read_error(error, file.name) from None
    if len(members) > MAX_MEMBERS:
        raise InputError(f"{where}: {len(members)} members in the archive")
    if comment or file.read(file.size - _END_RECORD, 4) != b"PK\x05\x06":
        raise InputError(f"{where}: bytes after the end of the archive")
    names: set[str] = set()
    position = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        name = member.orig_filename
        if name in names:
            raise InputError(f"{where}: two members called '{show(name)}'")
        names.add(name)
        position = _check_member(file, member, position)
    tops = {name.split("/", 1)[0] for name in names}
    pickles = [member for member in members if member.filename.endswith("/data.pkl")]
    if len(tops) != 1 or len(pickles) != 1 or pickles[0].filename.count("/") != 1:
        raise InputError(f"{where}: not laid out as a PyTorch checkpoint")
    if any(name.endswith("/constants.pkl") for name in names):
        raise InputError(
            f"{where}: a TorchScript program, not a checkpoint",
            hint="save the model's state_dict() and use that",
        )
    return _read_pickle(file, pickles[0])


def _check_member(file: InputFile, member: zipfile.ZipInfo, position: int) -> int:
    """One member, seen by the directory and by its own header alike; returns where it ends."""
    where, name = show(file.name), member.orig_filename
    parts = name.split("/")
    if "\\" in name or "\0" in name or ".." in parts or "" in parts or "." in parts:
        raise InputError(f"{where}: the member name '{show(name)}' is not a plain path")
    if member.flag_bits & 0x2041:
        raise InputError(f"{where}: member '{show(name)}' is marked as encrypted")
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise InputError(f"{where}: member '{show(name)}' is compressed, as torch never writes it")
    begin = member.header_offset
    if begin < position or (position == 0 and begin != 0):
        raise InputError(f"{where}: member '{show(name)}' overlaps another, or is not at the start")
    if begin + _LOCAL_HEADER > file.size:
        raise InputError(f"{where}: member '{show(name)}' lies outside the file")
    local = file.read(begin, _LOCAL_HEADER)
    flags, method = int.from_bytes(local[6:8], "little"), int.from_bytes(local[8:10], "little")
    name_size, extra = (
        int.from_bytes(local[26:28], "little"),
        int.from_bytes(local[28:30], "little"),
    )
    end = begin + _LOCAL_HEADER + name_size + extra + member.file_size
    if local[:4] != b"PK\x03\x04" or end > file.size:
        raise InputError(f"{where}: member '{show(name)}' lies outside the file")
    local_name = file.read(begin + _LOCAL_HEADER, name_size)
    checksum = int.from_bytes(local[14:18], "little")
    size = int.from_bytes(local[22:26], "little")
    deferred = bool(flags & 0x8)  # sizes and checksum follow the data, as torch writes them
    if (
        local_name != name.encode("utf-8" if member.flag_bits & 0x800 else "cp437", "replace")
        or flags != member.flag_bits
        or method != member.compress_type
        or (not deferred and checksum != member.CRC)
        or (not deferred and size not in (member.file_size, 0xFFFFFFFF))
    ):
        raise InputError(f"{where}: member '{show(name)}' contradicts the archive's directory")
    return end


def _read_pickle(file: InputFile, member: zipfile.ZipInfo) -> bytes:
    where = show(file.name)
    if member.file_size > MAX_PICKLE:
        raise InputError(f"{where}: its pickle has {member.file_size} bytes")
    local = file.read(member.header_offset + 26, 4)
    skip = int.from_bytes(local[:2], "little") + int.from_bytes(local[2:], "little")
    data = file.read(member.header_offset + _LOCAL_HEADER + skip, member.file_size)
    if zlib.crc32(data) != member.CRC:
        raise InputError(f"{where}: the checksum of its pickle is wrong")
    return data


def _check_pickle(data: bytes, where: str) -> None:
    """Look at the globals a pickle names, without running it: an early, precise refusal.

    Not the protection itself, which is the weights-only unpickler in the child: names that are
    put together at run time do not show here.
    """
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in ("GLOBAL", "INST"):
                continue
            module, _, name = str(argument).partition(" ")
            if module.split(".", 1)[0] not in _PACKAGES:
                raise InputError(
                    f"{where}: asks for {show(f'{module}.{name}')} to be loaded,"
                    " which is not part of any weights",
                    hint="do not load this file with a plain torch.load either",
                )
            if module == "torch._utils" and name in _REBUILDERS:
                raise InputError(f"{where}: holds a tensor that is {_REBUILDERS[name]}")
    except (ValueError, UnicodeError, IndexError, KeyError) as error:
        raise InputError(f"{where}: a damaged pickle ({type(error).__name__})") from None


def _run_child(file: InputFile) -> Converted:
    """The conversion in a child process; every way it can end is an error that names the file."""
    where = show(file.name)
    try:
        # Unnamed from the start: nothing is left behind, however this process ends.
        with tempfile.TemporaryFile() as target, tempfile.TemporaryFile() as report:
            _spawn(file, target, report, where)
            answer = _read_report(report, where)
            data = InputFile(os.dup(target.fileno()), file.name)
    except OSError as error:
        raise ResourceError(
            f"{where}: no temporary file for its tensors: {error.strerror}",
            hint="point TMPDIR at a disk with room for the whole checkpoint",
        ) from None
    return Converted(data, answer.aliases, _warnings(answer, where))


def _spawn(file: InputFile, target: IO[bytes], report: IO[bytes], where: str) -> None:
    descriptors = (file.descriptor, target.fileno(), report.fileno())
    environment = {
        key: value
        for key, value in os.environ.items()
        if key in ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "HOME", "LANG")
    }
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("torch_child.py")
    seconds = 120 + file.size // 10_000_000
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(script), *map(str, descriptors), str(file.size)],
            pass_fds=descriptors,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"{where}: not read within {seconds} seconds") from None
    if done.returncode < 0:
        raise InputError(
            f"{where}: the process that read it was stopped by signal {-done.returncode}",
            hint="the file is damaged or hostile, or this machine is short of memory",
        )
    if done.returncode != 0:
        raise InputError(f"{where}: the process that read it failed")


def _read_report(report: IO[bytes], where: str) -> _Answer:
    """The child's answer, checked as strictly as a file: the child may have been taken over."""
    unclear = InputError(f"{where}: the process that read it gave no answer")
    size = os.fstat(report.fileno()).st_size
    if not 0 < size <= MAX_REPORT:
        raise unclear
    report.seek(0)
    answer = strict_json.parse(report.read(size), "answer of the reading process", floats=False)
    if not isinstance(answer, dict):
        raise unclear
    if "refused" in answer:
        raise _refusal(str(answer["refused"]), str(answer.get("tensor", "")), where)
    aliases, dropped, root = (answer.get(key) for key in ("aliases", "dropped", "root"))
    if not isinstance(aliases, dict) or not isinstance(dropped, list) or not isinstance(root, str):
        raise unclear
    if not all(isinstance(name, str) for name in (*aliases.values(), *dropped)):
        raise unclear
    return _Answer(aliases, dropped, root)


def _refusal(code: str, tensor: str, where: str) -> InputError | ResourceError:
    reason = REASONS.get(code, "refused")
    if code == "disk":
        return ResourceError(
            f"{where}: {reason}: {show(tensor)}",
            hint="point TMPDIR at a disk with room for the whole checkpoint",
        )
    if code == "no_torch":
        return ResourceError(f"{where}: {reason}", hint="pip install torch")
    named = f"tensor '{show(tensor)}': " if tensor else ""
    return InputError(f"{where}: {named}{reason}")


def _warnings(answer: _Answer, where: str) -> list[str]:
    warnings = []
    if answer.dropped:
        some = ", ".join(show(name) for name in answer.dropped[:5])
        more = f" and {len(answer.dropped) - 5} more" if answer.dropped[5:] else ""
        warnings.append(f"{where}: entries that are not tensors were dropped: {some}{more}")
    if answer.root:
        warnings.append(f"{where}: the tensors are those of its entry '{show(answer.root)}'")
    return warnings
