"""Mutations of protobuf messages that keep the lengths right: one field of one message a time.

Changed bytes would mostly break a length, and every reader stops at that. Here a message is taken
apart into fields, down to where bytes are no message; one field is dropped, doubled, moved,
changed or replaced by another one's content; then it is put together again.
"""

from __future__ import annotations

from random import Random
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_NUMBERS = (0, 1, 2, 3, 6, 7, 9, 10, 16, 17, 64, 127, 128, 255, 1 << 31, (1 << 63) - 1, 1 << 63,
            (1 << 64) - 1)  # fmt: skip
_NAMES = (
    b"", b"w", b"x", b"y", b"t", b"u", b"Identity", b"Transpose", b"MatMul", b"Gemm", b"w.bin",
    b"location", b"offset", b"length", b"0", b"16", b"compress", b"com.microsoft", b"\xff",
    b"\x1b[2J",
)  # fmt: skip
_DEEPEST = 8

Node = list[Any]  # [number, wire, int | bytes | list of nodes]


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Another message; one that is none, or grew too long, comes back as bytes cut off."""
    tree = parse(data)
    if tree is None:
        return data[:most]
    rng = Random(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change(tree, rng)
    return serialize(tree)[:most]


def parse(data: bytes, depth: int = 0) -> list[Node] | None:
    """The fields of a message; None where `data` is none."""
    found: list[Node] = []
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if at < 0 or not 0 < number < 64:
            return None
        if wire == VARINT:
            value: Any
            value, at = _varint(data, at)
            if at < 0:
                return None
        elif wire == BYTES:
            length, at = _varint(data, at)
            if at < 0 or at + length > end:
                return None
            value, at = data[at : at + length], at + length
            inner = parse(value, depth + 1) if length > 1 and depth < _DEEPEST else None
            value = value if inner is None else inner
        elif wire in (FIXED32, FIXED64):
            width = 4 if wire == FIXED32 else 8
            if at + width > end:
                return None
            value, at = data[at : at + width], at + width
        else:
            return None
        found.append([number, wire, value])
    return found


def serialize(tree: list[Node]) -> bytes:
    """The message of `tree`."""
    out = bytearray()
    for number, wire, value in tree:
        out += _spell(number << 3 | wire)
        if wire == VARINT:
            out += _spell(value)
            continue
        payload = value if isinstance(value, bytes) else serialize(value)
        if wire == BYTES:
            out += _spell(len(payload))
        out += payload
    return bytes(out)


def _change(tree: list[Node], rng: Random) -> None:
    places = list(_places(tree))
    if not places:
        tree.append([7, BYTES, b""])
        return
    holder, index = rng.choice(places)
    node = holder[index]
    kind = rng.randrange(8)
    if kind == 0:
        del holder[index]
    elif kind == 1:
        holder.insert(rng.randrange(len(holder) + 1), _copy(node))
    elif kind == 2:
        other, where = rng.choice(places)
        holder.insert(rng.randrange(len(holder) + 1), _copy(other[where]))
    elif kind == 3:
        other, where = rng.choice(places)
        source = _copy(other[where])
        node[1], node[2] = source[1], source[2]
    elif kind == 4:
        node[0] = rng.randrange(1, 30)
    else:
        _change_value(node, rng)


def _change_value(node: Node, rng: Random) -> None:
    _, wire, value = node
    if wire == VARINT:
        node[2] = rng.choice(
            (rng.choice(_NUMBERS), value + 1, max(0, value - 1), rng.randrange(256))
        )
    elif isinstance(value, list):
        _change(value, rng)
    elif wire == BYTES and rng.random() < 0.6:
        node[2] = rng.choice(_NAMES)
    elif value:
        changed = bytearray(value)
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        node[2] = bytes(changed)
    elif wire == BYTES:
        node[2] = bytes(rng.randrange(20))


def _places(tree: list[Node]) -> Any:
    for index, node in enumerate(tree):
        yield tree, index
        if isinstance(node[2], list):
            yield from _places(node[2])


def _copy(node: Node) -> Node:
    value = node[2]
    return [node[0], node[1], [_copy(one) for one in value] if isinstance(value, list) else value]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    return 0, -1


def _spell(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
