"""The lock of an output: one run at a time, whatever became of the run before.

The lock is the kernel's, on a file beside OUT: it dies with its holder, however that ends, so that
a file that was left behind stops nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path

from compress.checkpoint.destination import lock_file
from compress.errors import BusyError, UsageError, show
from compress.interrupts import deferred


class OutLock:
    """Held from `take` to `give_back`, which may always be called."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = lock_file(out)
        self.descriptor = -1

    def take(self) -> None:
        """Raises BusyError where another run holds it, UsageError where something else has the
        file's name, OSError where the file cannot be made.
        """
        with deferred():
            self.descriptor = self._locked()

    def give_back(self) -> None:
        """Remove the file and with it the lock."""
        with deferred():
            if self.descriptor >= 0:
                with contextlib.suppress(OSError):
                    self.path.unlink()
                with contextlib.suppress(OSError):
                    os.close(self.descriptor)
                self.descriptor = -1

    def _locked(self) -> int:
        """A holder that removed the file between two of our steps makes us try again."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            self._refuse_foreign()
            fd = os.open(self.path, flags, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.lstat(self.path)):
                    return fd
                os.close(fd)
            except FileNotFoundError:
                os.close(fd)
            except BlockingIOError as error:
                os.close(fd)
                raise BusyError(
                    f"another run is writing {show(str(self.out))}", hint="wait for it to end"
                ) from error
            except OSError:
                os.close(fd)
                raise

    def _refuse_foreign(self) -> None:
        """A lock is an empty file: anything else of its name is not ours to open or to remove."""
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(status.st_mode) or status.st_size:
            raise UsageError(
                f"{show(str(self.path))} is in the way, and no run made it",
                hint="rename or remove it, or choose another output",
            )
