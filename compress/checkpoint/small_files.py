"""Small files of a command: the whole new content, or what was there before."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, content: bytes, *, is_named: bool = True) -> None:
    """Replace a file in one step. Raises OSError; the old content is then untouched.

    is_named  the user typed this very path: links, pipes and devices are written through, and so
              is a file in a folder that takes no other. Otherwise they are replaced, or in the way
    """
    in_place = path.is_symlink() or (path.exists() and not path.is_file())
    if is_named and (in_place or not os.access(path.parent, os.W_OK | os.X_OK)):
        path.write_bytes(content)
        return
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.unlink(missing_ok=True)  # of a run that was killed
        with open(fresh, "xb") as file:  # no link that someone else put there is followed
            file.write(content)
        os.replace(fresh, path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
