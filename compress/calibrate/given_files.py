"""Files of inputs that the user names: texts, and arrays of numbers in .npy and .npz files.

A header is believed only where the file is as large as it says, so that nothing is allocated for
arrays that are not there. The format is numpy's (NEP 1); only plain numbers are read.
"""

from __future__ import annotations

import ast
import math
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from compress.errors import InputError, show, unreadable
from compress.tensor import Array

_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 10_000  # bytes, as numpy itself allows
_MAX_DIMENSIONS = 32
_NUMBERS = re.compile(r"[<>|=]?[biufc][0-9]{1,2}")
_LARGEST = (1 << 63) - 1
_MOST_DEFLATED = 1032  # bytes that a byte of deflate can stand for


class _NoArray(Exception):
    """The content is no array of numbers."""


def open_given(path: Path, *, pipes: bool = False) -> BinaryIO:
    """Open a file that the user named, for reading, without waiting for anybody.

    pipes  take those of the shell's <(...) as well, which it names /dev/fd/N
    Raises InputError for what is no regular file, UsageError or ResourceError where it is not
    there or cannot be read.
    """
    try:
        _require_regular(path, os.stat(path).st_mode, pipes=pipes)  # some devices act when opened
        if pipes and _is_shells(path):
            return os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC), "rb")
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    except OSError as error:
        raise cannot_read(error, path) from error
    try:
        _require_regular(path, os.fstat(file.fileno()).st_mode, pipes=False)
    except (InputError, OSError):
        file.close()
        raise
    return file


def cannot_read(error: OSError, path: Path) -> Exception:
    """What to raise; some errors do not know the file that they are about."""
    named = type(error)(error.errno or 0, error.strerror or "an error of the file", str(path))
    return unreadable(error if error.filename else named)


def _is_shells(path: Path) -> bool:
    return path.parent == Path("/dev/fd")


def _require_regular(path: Path, mode: int, *, pipes: bool) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(21, "Is a directory", str(path))
    if stat.S_ISREG(mode) or (pipes and stat.S_ISFIFO(mode) and _is_shells(path)):
        return
    raise InputError(
        f"{show(str(path))}: not a regular file", hint="put what it gives into a file first"
    )


def read_npy(path: Path) -> Array:
    """The array of an .npy file. Raises InputError, UsageError, ResourceError."""
    with open_given(path) as file:
        try:
            return _read_array(file, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise cannot_read(error, path) from error
        except _NoArray as error:
            raise InputError(
                f"{show(str(path))}: not an .npy file of numbers", hint="numpy.save writes one"
            ) from error


def read_npz(path: Path, names: Sequence[str]) -> tuple[dict[str, Array], list[str]]:
    """Those of the arrays `names` that an .npz file holds, and the names of all of its arrays.

    Raises InputError, UsageError, ResourceError.
    """
    with open_given(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                there = [name.removesuffix(".npy") for name in archive.namelist()]
                found = [name for name in names if f"{name}.npy" in archive.namelist()]
                return {name: _member(archive, f"{name}.npy") for name in found}, there
        except (
            _NoArray, zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, KeyError, EOFError,
            OverflowError,
        ) as error:  # fmt: skip
            raise InputError(
                f"{show(str(path))}: not an .npz file of numbers", hint="numpy.savez writes one"
            ) from error
        except OSError as error:
            raise cannot_read(error, path) from error


def _member(archive: zipfile.ZipFile, name: str) -> Array:
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
        raise _NoArray("packed as numpy does not")
    whole = archive.fp.seek(0, os.SEEK_END) if archive.fp is not None else 0
    if info.file_size > min(info.compress_size, whole) * _MOST_DEFLATED:
        raise _NoArray("larger than its bytes can stand for")
    with archive.open(info) as file:
        return _read_array(file, info.file_size)


def _read_array(file: IO[bytes], size: int) -> Array:
    """The array of an open .npy file of `size` bytes. Raises _NoArray."""
    dtype, shape, fortran, start = _header(file)
    count = math.prod(shape)
    if count * dtype.itemsize > size - start:
        raise _NoArray("its header speaks of more than the file holds")
    content = bytearray(count * dtype.itemsize)
    view, done = memoryview(content), 0
    while done < len(content):
        chunk = file.read(min(1 << 20, len(content) - done))
        if not chunk:
            raise _NoArray("cut off")
        view[done : done + len(chunk)] = chunk
        done += len(chunk)
    values: Array = np.frombuffer(content, dtype)
    try:
        return values.reshape(shape, order="F" if fortran else "C")
    except ValueError as error:  # nothing in it, and one size beyond what numpy takes
        raise _NoArray("its shape") from error


def _header(file: IO[bytes]) -> tuple[np.dtype[np.generic], tuple[int, ...], bool, int]:
    """Type, shape, whether columns come first, and where the numbers begin. Raises _NoArray."""
    head = file.read(8)
    if len(head) < 8 or not head.startswith(_MAGIC) or head[6] not in (1, 2, 3):
        raise _NoArray("its magic bytes")
    width = 2 if head[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    raw = file.read(length) if length <= _MAX_HEADER else b""
    if not raw or len(raw) < length:
        raise _NoArray("the length of its header")
    try:  # a number of Python 2 ends in L; what nests too deep is a MemoryError of the parser
        text = re.sub(r"(?<=[0-9])L\b", "", raw.decode("latin-1"))
        body = ast.literal_eval(text.strip())
        descr, fortran, shape = body["descr"], body["fortran_order"], body["shape"]
        if not isinstance(descr, str) or not _NUMBERS.fullmatch(descr):
            raise _NoArray("its type")
        dtype = np.dtype(descr)
    except (
        ValueError, SyntaxError, TypeError, KeyError, IndexError, MemoryError, RecursionError
    ) as error:  # fmt: skip
        raise _NoArray("its header") from error
    sizes = isinstance(shape, tuple) and len(shape) <= _MAX_DIMENSIONS
    if not sizes or not all(type(n) is int and 0 <= n <= _LARGEST for n in shape):
        raise _NoArray("its shape")
    return dtype, shape, fortran is True, 8 + width + length
