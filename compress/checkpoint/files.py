"""Opening files that someone else wrote: regular files only, inside the checkpoint, never blocking.

Every file is opened once. Its descriptor is kept, so that the bytes that were checked are the
bytes that are used, and it is read with `pread`: a file that shrinks under us is an error that
can be reported, where a memory map would kill the process.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from compress.errors import InputError, ResourceError, UsageError, show

_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISLNK, "a symbolic link"),
)


class InputFile:
    """A regular file open for reading, and what it looked like when it was opened.

    Safe to use from many threads: reads carry their own position and release the GIL.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        """Takes ownership of `descriptor`; raises InputError unless it is a regular file."""
        self.name = name
        self.descriptor = descriptor
        try:
            self.status = os.fstat(descriptor)
            _require_regular(self.status, name)
        except (OSError, InputError):
            self.close()
            raise
        self.size = self.status.st_size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (contiguous bytes) from `offset`; raises InputError at an early end."""
        view = buffer if buffer.format == "B" and buffer.ndim == 1 else buffer.cast("B")
        done = 0
        while done < view.nbytes:
            try:
                count = os.preadv(self.descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise read_error(error, self.name) from None
            if count == 0:
                raise InputError(f"{show(self.name)}: the file became shorter while it was read")
            done += count

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`; the caller has bounded `count` by the file's size."""
        buffer = bytearray(count)
        if count:
            self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_all(self, limit: int) -> bytes:
        """The whole file, or InputError above `limit` bytes."""
        if self.size > limit:
            raise InputError(f"{show(self.name)}: {self.size} bytes, more than {limit} allowed")
        return self.read(0, self.size)

    def update(self, digest: Any) -> None:
        """Feed the whole content to a hashlib object, in slices."""
        buffer = memoryview(bytearray(min(8 << 20, max(self.size, 1))))
        for offset in range(0, self.size, buffer.nbytes):
            part = buffer[: min(buffer.nbytes, self.size - offset)]
            self.read_into(offset, part)
            digest.update(part)

    def check_unchanged(self) -> None:
        """Raises InputError if the file was written to since it was opened."""
        try:
            now = os.fstat(self.descriptor)
        except OSError as error:
            raise read_error(error, self.name) from None
        if _identity(now) != _identity(self.status):
            raise InputError(
                f"{show(self.name)}: the file changed while it was being read",
                hint="make sure that nothing writes to the checkpoint, then run again",
            )

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def read_error(error: OSError, name: str) -> ResourceError:
    """An OSError met while reading, as a ResourceError that names the file."""
    reason = error.strerror or type(error).__name__
    hint = "check the file's permissions" if isinstance(error, PermissionError) else None
    return ResourceError(f"{show(name)}: cannot be read: {reason}", hint=hint)


def open_typed(path: Path) -> InputFile:
    """Open a file whose path the user typed: links are followed, the end must be a regular file.

    Raises UsageError if nothing is there, InputError for anything but a regular file.
    """
    try:
        real = os.path.realpath(path, strict=True)
    except ValueError:
        raise UsageError(f"{show(str(path))}: not a valid path") from None
    except OSError as error:
        if os.path.islink(path):
            raise InputError(f"{show(str(path))}: a symbolic link that leads nowhere") from None
        if isinstance(error, FileNotFoundError):
            raise UsageError(f"{show(str(path))}: no such file or directory") from None
        raise read_error(error, str(path)) from None
    return _open(real, path.name)


def open_inside(directory: str, relative: str) -> InputFile:
    """Open a file of the checkpoint `directory` (a real path); see `resolve_inside`."""
    return _open(resolve_inside(directory, relative), relative)


def resolve_inside(directory: str, relative: str) -> str:
    """The real path of `directory/relative`, which must not lead out of the checkpoint.

    The model hub's cache is made of links, snapshots/REV/x -> ../../blobs/HASH: a link into the
    blobs of the same repository counts as inside. Raises InputError.
    """
    try:
        real = os.path.realpath(os.path.join(directory, relative), strict=True)
    except ValueError:
        raise InputError(f"{show(relative)}: not a valid file name") from None
    except FileNotFoundError:
        raise InputError(f"{show(relative)}: the file is missing") from None
    except OSError as error:
        raise InputError(f"{show(relative)}: cannot be opened: {error.strerror}") from None
    if not real.startswith(directory.rstrip(os.sep) + os.sep) and (
        os.path.dirname(real) != _hub_blobs(Path(directory))
    ):
        raise InputError(
            f"{show(relative)}: a link that leads out of the checkpoint's directory",
            hint="put the file itself into the directory, or name it on the command line",
        )
    return real


def is_own_file(directory: Path, relative: str) -> bool:
    """Whether `directory/relative` is a regular file, with no link on the way to it."""
    whole = os.path.join(os.path.realpath(directory), relative)
    return os.path.realpath(whole) == whole and os.path.isfile(whole)


def is_plain_name(name: str) -> bool:
    """Whether it names a file of the folder that it is joined to, and nothing else."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\\0")


def require_plain_name(name: object, suffix: str, where: str) -> str:
    """`name` if it is a bare file name with this suffix, InputError naming `where` otherwise."""
    if not isinstance(name, str):
        raise InputError(f"{show(where)}: a file name that is not a string")
    if not is_plain_name(name):
        raise InputError(
            f"{show(where)}: '{show(name)}' is not a plain file name",
            hint="shards must lie beside their index",
        )
    if not name.endswith(suffix):
        raise InputError(f"{show(where)}: '{show(name)}' does not end in {suffix}")
    return name


def _open(real: str, name: str) -> InputFile:
    try:
        # Looked at before it is opened: opening some devices has side effects.
        _require_regular(os.lstat(real), name)
        return InputFile(os.open(real, _OPEN_FLAGS), name)
    except OSError as error:
        raise read_error(error, name) from None


def _require_regular(status: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((word for test, word in _KINDS if test(status.st_mode)), "a special file")
        raise InputError(f"{show(name)}: {kind}, not a regular file")


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _hub_blobs(directory: Path) -> str | None:
    """The blobs folder of the hub cache that `directory` lies in, if it does."""
    for place in (directory, *directory.parents):
        repository = place.parent.parent
        if place.parent.name == "snapshots" and repository.name.startswith("models--"):
            return str(repository / "blobs")
    return None
