"""Streams files into a stage: sizes known before the first byte, every byte hashed on its way."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compress.checkpoint.manifest import FileRecord
from compress.checkpoint.stage import Stage
from compress.tensor import DTYPES

_WRITE_CHUNK = 1 << 20  # still in the cache when it is copied, right after it was hashed
_WRITEBACK_BYTES = 64 << 20
_SYNC_FILE_RANGE_WRITE = 2


class StageWriter:
    """Streams one file of `expected` bytes."""

    def __init__(self, stage: Stage, name: str, expected: int) -> None:
        self._stage = stage
        self._target = stage.path / name
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._target.with_name(self._target.name + ".tmp")
        self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115  closed by finish
        self._digest = hashlib.sha256()
        self._written = self._sent = 0
        self._expected = expected
        _reserve(self._file.fileno(), self._expected)

    def write(self, data: Any) -> None:
        """Append bytes (any C-contiguous buffer)."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _WRITE_CHUNK):
            chunk = view[start : start + _WRITE_CHUNK]
            self._digest.update(chunk)
            done = 0
            while done < len(chunk):
                done += self._file.write(chunk[done:])
        self._written += len(view)
        if self._stage.fsync and self._written - self._sent >= _WRITEBACK_BYTES:
            _start_writeback(self._file.fileno(), self._sent, self._written - self._sent)
            self._sent = self._written

    def finish(self) -> FileRecord:
        """Check the length, fsync, and give the file its name in the stage."""
        if self._written != self._expected:
            raise RuntimeError(f"{self._target.name}: {self._written} bytes, not {self._expected}")
        self._stage.sync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._target)
        return FileRecord(self._written, self._digest.hexdigest())

    def close(self) -> None:
        """Close without finishing (after an error)."""
        self._file.close()


class SafetensorsWriter(StageWriter):
    """Streams one safetensors file whose header is known before the first byte of data.

    `specs` are (name, dtype tag, shape) in the order of the data.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        specs: Sequence[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        header = header_bytes(specs, metadata)
        data = sum(nbytes_of(dtype, shape) for _, dtype, shape in specs)
        super().__init__(stage, name, len(header) + data)
        self.write(header)


def nbytes_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of an array by safetensors tag and shape."""
    size = 1
    for dimension in shape:
        size *= dimension
    if dtype in DTYPES:
        return size * DTYPES[dtype].itemsize
    bits = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}.get(dtype, 8)
    return size * bits // 8


def header_bytes(
    specs: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The length field and the header of a safetensors file, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name, dtype, shape in specs:
        end = offset + nbytes_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _reserve(fd: int, nbytes: int) -> None:
    """Take the room on the disk at once: a full disk shows early, and writes are faster."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Let the disk begin while the processors go on, so that the final fsync is short (Linux)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "sync_file_range"):
        offset64, nbytes64 = ctypes.c_int64(offset), ctypes.c_int64(nbytes)
        libc.sync_file_range(fd, offset64, nbytes64, _SYNC_FILE_RANGE_WRITE)
