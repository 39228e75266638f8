"""Sizes as people write them."""

from __future__ import annotations

import re

from compress.errors import UsageError, show

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_LARGEST = 1 << 60


def parse_size(where: str, text: str | int, *, least: int = 1) -> int:
    """`2GB`, `512MiB`, `1e9` or a number of bytes, as bytes.

    `where` names the option in the UsageError for what is no size, or not from `least` to 1 EiB.
    """
    match = re.fullmatch(
        r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]{1,2})?)\s*([a-z]*)", str(text).strip().lower()
    )
    if match is None or match[2] not in _UNITS:
        raise UsageError(f"{where} {show(str(text))}: not a size", hint="e.g. 2GB or 512MiB")
    value = float(match[1]) * _UNITS[match[2]]
    if not least <= value <= _LARGEST:
        lowest = "1 MiB" if least == 1 << 20 else f"{least} B"
        raise UsageError(f"{where} {show(str(text))}: not between {lowest} and 1 EiB")
    return int(value)
