"""JSON from an untrusted file, read strictly: one meaning, bounded work, no surprises.

The standard parser takes duplicate keys, NaN, numbers that overflow to infinity and halves of
surrogate pairs, and it recurses as deep as the text asks. All of that is refused here, so that
no other reader can see another file than we do.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import numpy as np

from compress.errors import InputError, show

MAX_DEPTH = 64
MAX_DIGITS = 40
_CHUNK = 1 << 20
# Numbers that need a closer look; where none is in sight, the parser's own fast path is exact.
_ODD_INTEGER = re.compile(rb"-0|[0-9]{%d}" % (MAX_DIGITS + 1))
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(data: bytes, name: str, *, floats: bool) -> Any:
    """The value that `data` (UTF-8) holds; `name` is the file named in errors.

    floats  whether numbers with a fraction or an exponent are allowed (they must be finite)
    Raises InputError.
    """
    where = show(name)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}") from None
    # Few brackets cannot nest deep: small files need no closer look.
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth(data) > MAX_DEPTH:
        raise InputError(f"{where}: JSON nested deeper than {MAX_DEPTH} levels")

    def refuse_constant(word: str) -> NoReturn:
        raise InputError(f"{where}: {word} is not a JSON number")

    def to_int(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise InputError(f"{where}: an integer of {len(digits)} digits")
        if digits == "-0":
            raise InputError(f"{where}: the integer -0")
        return int(digits)

    def to_float(digits: str) -> float:
        if not floats:
            raise InputError(f"{where}: {show(digits)} where only integers are allowed")
        value = float(digits)
        if not math.isfinite(value):
            raise InputError(f"{where}: the number {show(digits)} overflows")
        return value

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise InputError(f"{where}: the key '{show(_first_repeated(pairs))}' appears twice")
        return members

    try:
        value = json.loads(
            text,
            object_pairs_hook=to_dict,
            parse_int=to_int if _ODD_INTEGER.search(data) else None,
            parse_float=to_float,
            parse_constant=refuse_constant,
        )
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error.msg} at character {error.pos}") from None
    # Raw surrogates cannot come through UTF-8, escaped ones can: the walk is rarely needed.
    if _SURROGATE_ESCAPE.search(data):
        _refuse_lone_surrogates(value, where)
    return value


def loads(data: bytes, name: str) -> Any:
    """`parse` with fractions allowed: config files, indexes, manifests."""
    return parse(data, name, floats=True)


def _depth(data: bytes) -> int:
    """Deepest nesting of brackets outside strings, without recursion, in bounded memory.

    Exact up to the first syntax error, which is as far as the parser itself gets.
    """
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in data else data
    level = deepest = 0
    in_string = 0
    for start in range(0, len(plain), _CHUNK):
        chunk = np.frombuffer(plain, np.uint8, min(_CHUNK, len(plain) - start), start)
        quotes = np.cumsum(chunk == ord('"'), dtype=np.int64) + in_string
        outside = quotes % 2 == 0
        step = (((chunk == ord("[")) | (chunk == ord("{"))) & outside).astype(np.int64)
        step -= ((chunk == ord("]")) | (chunk == ord("}"))) & outside
        levels = np.cumsum(step) + level
        deepest = max(deepest, int(levels.max()))
        level, in_string = int(levels[-1]), int(quotes[-1]) % 2
    return deepest


def _first_repeated(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return ""


def _refuse_lone_surrogates(value: Any, where: str) -> None:
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            todo.extend(item)
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)
        elif isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                raise InputError(f"{where}: half of a surrogate pair in a string") from None
