"""What every reader promises of the way it refuses, whatever it was given."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from compress.errors import CompressError

T = TypeVar("T")
LONGEST_TEXT = 600  # of message and hint, as the tests of the corpus have it


class Broken(AssertionError):
    """A reader that did not keep a promise."""


def require(holds: object, what: str) -> None:
    """Raise Broken unless `holds`."""
    if not holds:
        raise Broken(what)


def outcome(
    read: Callable[[], T], *, names: str, errors: tuple[type[CompressError], ...]
) -> T | None:
    """What `read` returns, or None where it refused in one of `errors` with a text fit to print.

    names  the file or the argument that the text has to name
    """
    try:
        return read()
    except errors as error:
        text = f"{error.message} {error.hint or ''}"
        require(text.isascii() and text.isprintable(), "an error with characters unfit to print")
        require(len(text) <= LONGEST_TEXT, "an error longer than promised")
        require(names in error.message, "an error that does not say where")
        return None


class MemoryFile:
    """One unnamed file in memory that is filled anew for every input."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("fuzz") if hasattr(os, "memfd_create") else _unnamed()
        self._size = 0

    def fill(self, data: bytes, size: int = 0) -> int:
        """Hold `data`, zeros behind it up to `size`; returns a descriptor for the reader to own."""
        size = max(size, len(data))
        os.ftruncate(self.descriptor, len(data))
        os.pwrite(self.descriptor, data, 0)
        if size > len(data):
            os.ftruncate(self.descriptor, size)
        return os.dup(self.descriptor)


def _unnamed() -> int:
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Folder:
    """A folder in memory where there is one, with a file that is filled anew for every input."""

    def __init__(self, name: str) -> None:
        import tempfile

        place = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self._held = tempfile.TemporaryDirectory(prefix="fuzz-", dir=place)
        self.path = os.path.realpath(self._held.name)
        self.file = os.path.join(self.path, name)
        self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def fill(self, data: bytes) -> None:
        """Let the file hold `data`."""
        os.ftruncate(self._descriptor, len(data))
        os.pwrite(self._descriptor, data, 0)
