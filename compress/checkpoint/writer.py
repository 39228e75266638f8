"""The only code that writes output: a locked stage beside OUT, fsynced files, one final rename.

OUT.partial is filled and then renamed to OUT (or exchanged with an old OUT), so that OUT is at
every moment either what it was or the complete new result.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import BusyError, UsageError, from_os_error, show
from compress.tensor import DTYPES

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_WRITE_CHUNK = 8 << 20
_WRITEBACK_BYTES = 64 << 20
_SYNC_FILE_RANGE_WRITE = 2


@dataclass(frozen=True)
class FileRecord:
    """What the manifest keeps of a file."""

    nbytes: int
    sha256: str


class Stage:
    """The directory OUT.partial, held under a lock that dies with the process.

    Raises BusyError where another run holds OUT, UsageError where OUT exists and
    `overwrite` is False, ResourceError where the file system refuses.
    """

    def __init__(self, out: Path, *, overwrite: bool, resume: bool, fsync: bool = True) -> None:
        self.out = Path(os.path.abspath(out))
        self.path = self.out.with_name(self.out.name + ".partial")
        self.fsync = fsync
        self._overwrite = overwrite
        self._lock_path = self.out.with_name(f".{self.out.name}.lock")
        check_out(self.out, overwrite=overwrite)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock_fd = self._lock()
        except OSError as error:
            raise from_os_error(error, doing="cannot lock the output") from error
        try:
            check_out(self.out, overwrite=overwrite)  # again, now that nobody else can publish
            if self.path.exists() and not resume:
                shutil.rmtree(self.path)
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            self.release()
            raise from_os_error(error, doing="cannot create") from error
        except UsageError:
            self.release()
            raise

    def _lock(self) -> int:
        """Take the lock file; a holder that removed it meanwhile makes us try again."""
        while True:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(fd)
                raise BusyError(
                    f"another run is writing {show(str(self.out))}", hint="wait for it to end"
                ) from error
            try:
                if os.path.samestat(os.fstat(fd), os.stat(self._lock_path)):
                    return fd
            except FileNotFoundError:
                pass
            os.close(fd)

    def write_file(self, name: str, content: bytes) -> FileRecord:
        """Write one small file (folders in `name` are created) and return its record."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            self.sync(file.fileno())
        os.replace(temporary, target)
        return FileRecord(len(content), hashlib.sha256(content).hexdigest())

    def copy_file(self, name: str, source: Path) -> FileRecord:
        """Copy one file byte by byte; only its content is taken, not its mode."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        digest, nbytes = hashlib.sha256(), 0
        with open(source, "rb") as reader, open(temporary, "wb") as writer:
            while chunk := reader.read(_WRITE_CHUNK):
                writer.write(chunk)
                digest.update(chunk)
                nbytes += len(chunk)
            writer.flush()
            self.sync(writer.fileno())
        os.replace(temporary, target)
        return FileRecord(nbytes, digest.hexdigest())

    def sync(self, fd: int) -> None:
        """fsync unless told not to."""
        if self.fsync:
            os.fsync(fd)

    def sync_tree(self) -> None:
        """fsync every directory of the stage, so that the names survive a power cut too."""
        if self.fsync:
            for folder, _, _ in os.walk(self.path):
                _sync_directory(folder)

    def publish(self) -> None:
        """Make the stage the output in one step. Raises ResourceError; OUT is then unchanged."""
        try:
            self.sync_tree()
            old = None
            if self.out.exists():
                old = self.path
                _exchange(self.path, self.out)
            else:
                os.rename(self.path, self.out)
            if self.fsync:
                _sync_directory(self.out.parent)
        except OSError as error:
            raise from_os_error(error, doing="cannot publish") from error
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        self.release()

    def abandon(self) -> None:
        """Remove the stage: nothing of this run is left behind."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Give the lock back (the stage, if any, stays for `--resume`)."""
        if self._lock_fd >= 0:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = -1


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse an OUT that exists (UsageError), or that is not ours to replace."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise UsageError(
            f"output {show(str(out))} exists and is not a directory", hint="choose another name"
        )
    if not overwrite:
        raise UsageError(
            f"output {show(str(out))} exists", hint="--overwrite replaces it; or choose another"
        )
    if any(out.iterdir()) and not (out / "manifest.json").is_file():
        raise UsageError(
            f"output {show(str(out))} was not written by this tool (no manifest.json)",
            hint="--overwrite only replaces its own outputs; remove it yourself or choose another",
        )


class SafetensorsWriter:
    """Streams one safetensors file whose header is known before the first byte of data.

    `specs` are (name, dtype tag, shape) in the order of the data. Every byte is hashed on its way.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        specs: Sequence[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        self._stage = stage
        self._target = stage.path / name
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._target.with_name(self._target.name + ".tmp")
        self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115  closed by finish
        self._digest = hashlib.sha256()
        self._written = self._sent = 0
        header = header_bytes(specs, metadata)
        self._expected = len(header) + sum(nbytes_of(dtype, shape) for _, dtype, shape in specs)
        self.write(header)

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


def _start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Let the disk begin while the processors go on, so that the final fsync is short (Linux)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "sync_file_range"):
        offset64, nbytes64 = ctypes.c_int64(offset), ctypes.c_int64(nbytes)
        libc.sync_file_range(fd, offset64, nbytes64, _SYNC_FILE_RANGE_WRITE)


def _exchange(a: Path, b: Path) -> None:
    """Swap two directories atomically (renameat2), else by two renames with a way back."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        done = libc.renameat2(
            _AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE
        )
        if done == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), str(b))
    aside = b.with_name(b.name + ".old")
    os.rename(b, aside)
    try:
        os.rename(a, b)
    except OSError:
        os.rename(aside, b)
        raise
    os.rename(aside, a)


def _sync_directory(folder: str | Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
