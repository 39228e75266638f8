"""One base error, one exit code each: the command line prints `message` and, below it, `hint`."""

from __future__ import annotations

import errno


class CompressError(Exception):
    """An error the user can act on; printed as one line, never as a traceback.

    `hint` is the way out: a second line that names the flag or the edit that helps.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(CompressError):
    """Flags, recipe, a pattern that matches nothing, an existing OUT, an infeasible request."""

    exit_code = 2


class InputError(CompressError):
    """The input's content: a malformed file, a non-finite weight, an unsupported dtype."""

    exit_code = 3


class GateError(CompressError):
    """A quality gate failed; nothing was published."""

    exit_code = 4


class VerifyError(CompressError):
    """An output does not match its manifest."""

    exit_code = 5


class ResourceError(CompressError):
    """Memory, disk or any other I/O failure."""

    exit_code = 6


class BusyError(CompressError):
    """Another run holds the output."""

    exit_code = 75


class Interrupted(CompressError):
    """SIGINT or SIGTERM arrived; `exit_code` is 128 + the signal's number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted")
        self.exit_code = 128 + signal_number


_OS_HINTS = {
    errno.ENOSPC: "free some space or choose another output directory",
    errno.EDQUOT: "the disk quota is used up: choose another output directory",
    errno.EROFS: "the file system is read-only: choose another output directory",
    errno.EACCES: "check the permissions, or choose another output directory",
    errno.EPERM: "check the permissions, or choose another output directory",
}


def from_os_error(error: OSError, *, doing: str) -> ResourceError:
    """Turn an OSError into a ResourceError that names the file and the operation."""
    where = f" {show(str(error.filename))}" if error.filename else ""
    reason = error.strerror or type(error).__name__
    return ResourceError(f"{doing}{where}: {reason}", hint=_OS_HINTS.get(error.errno or 0))


def unreadable(error: OSError) -> CompressError:
    """What to raise for a file of the user's that cannot be read: a wrong path is a usage error."""
    failed = from_os_error(error, doing="cannot read")
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return UsageError(failed.message, hint="check the path")
    return failed


def show(text: str, limit: int = 80) -> str:
    """A name from a file made safe to print: printable ASCII, shortened in the middle.

    Control characters, escapes, bidirectional marks and non-ASCII letters are written as
    Python escapes, so that a tensor's name can neither move the cursor nor forge a line.
    """
    safe = text.encode("unicode_escape", "backslashreplace").decode("ascii")
    if len(safe) <= limit:
        return safe
    half = (limit - 3) // 2
    return f"{safe[:half]}...{safe[-half:]}"
