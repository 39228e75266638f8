"""How much memory this process may use: the machine's, or the least limit of its control groups.

A container or a batch job has a limit of its own, and a process that passes it is killed without a
word. Both versions of control groups are read (Linux, Documentation/admin-guide/cgroup-v2.rst and
cgroup-v1/memory.rst); limits of every level hold, from the process's own group up to the root.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def usable_memory() -> int:
    """Bytes; of the machine where no limit can be read."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *group_limits(_MEMBERSHIP, _GROUPS)])


def group_limits(membership: Path, groups: Path) -> Iterator[int]:
    """Every limit in bytes that can be read.

    membership  the file that names the process's groups, `number:controllers:path` a line
    groups      where they are mounted
    """
    try:
        lines = membership.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            root, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        # A path may lead out of what is mounted here ("/../other"): then the root alone is ours.
        parts = PurePosixPath(path).parts[1:]
        for level in range(len(parts) if ".." not in parts else 0, -1, -1):
            limit = _limit(root.joinpath(*parts[:level], name))
            if limit is not None:
                yield limit


def _limit(file: Path) -> int | None:
    """The number in it; None for "max", and for a file that is not there."""
    try:
        word = file.read_text(errors="replace").strip()
    except OSError:
        return None
    # The first version says "none" by a number near 2^63, which no machine has: it changes nothing.
    return int(word) if word.isascii() and word.isdigit() else None
