"""Moving directories in one step: never over something, or in exchange for it."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # by the kernel or the file system


def rename_new(source: Path, target: Path) -> None:
    """Rename to a name that is free; raises FileExistsError where it is not."""
    if _renameat2(source, target, _RENAME_NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def replace(new: Path, out: Path, *, aside: Path) -> Path:
    """Put `new` in place of the directory `out`; returns where the old one is now.

    That is `new` after an exchange in one step, and `aside` on file systems that know no such
    thing. After an OSError all is where it was, unless even the way back failed: then the old
    directory is at `aside`, and nowhere else.
    """
    if _renameat2(new, out, _RENAME_EXCHANGE):
        return new
    os.rename(out, aside)
    try:
        os.rename(new, out)
    except OSError:
        os.rename(aside, out)
        raise
    return aside


def restore(old: Path, out: Path, *, new: Path) -> None:
    """Undo `replace`, which returned `old`. Raises OSError; `old` then stays where it is."""
    if old == new and _renameat2(new, out, _RENAME_EXCHANGE):
        return
    os.rename(out, new)
    os.rename(old, out)


def sync_directory(folder: str | Path) -> None:
    """fsync a directory: the names in it survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_directory_fd(fd)
    finally:
        os.close(fd)


def sync_directory_fd(fd: int) -> None:
    """fsync an open directory, where its file system knows that."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Whether it was done; False where it is not supported. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = os.fsencode(source), os.fsencode(target)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(target))
