"""Headers of strangers: our reader beside the safetensors library's, on thousands of files.

Strictness goes one way. What we take, the library takes with the same bytes; what the library takes
and we refuse has one of the reasons in STRICTER. COMPRESS_HEADERS=100000 (make soak) tries more.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from typing import Any

import pytest
import safetensors

from compress.checkpoint.files import InputFile
from compress.checkpoint.safetensors import BITS, Header, read_header
from compress.errors import InputError

FILES = int(os.environ.get("COMPRESS_HEADERS", "3000"))
TAGS = sorted(tag for tag, bits in BITS.items() if bits % 8 == 0)
# Where two readers could see two files, or where none can use what the header says.
STRICTER = {
    "a name twice": "appears twice",
    "an unknown field": "unknown field",
    "an entry that is a list": "its entry is not an object",
    "metadata that is null": "__metadata__ is not an object",
    "a dimension beyond 2^48 - 1": "a dimension that is not an integer",
    "more than 64 dimensions": "dimensions, more than 64",
    "half of a surrogate pair": "half of a surrogate pair",
}
TOKENS = ['"', "null", "{}", ",", "[", "]", "1e0", "-", "0", "\\u0077", "\\ud800", " ", ":", "\0"]


def hostile(rng: random.Random) -> bytes:
    """A file with up to four tensors: valid, or with entries, text or length changed."""
    entries: list[tuple[str, Any]] = []
    offset = 0
    for number in range(rng.randrange(5)):
        tag, shape = rng.choice(TAGS), [rng.randrange(4) for _ in range(rng.randrange(4))]
        nbytes = BITS[tag] // 8
        for side in shape:
            nbytes *= side
        span = [offset, offset + nbytes]
        offset += nbytes
        name = rng.choice(["w", "é", "a.b", "x" * 30, ""]) + str(number)
        entries.append((name, {"dtype": tag, "shape": shape, "data_offsets": span}))
    if rng.random() < 0.3:
        entries.insert(0, ("__metadata__", {"format": "pt"}))
    if rng.random() < 0.2:
        rng.shuffle(entries)
    if rng.random() < 0.4:
        change_entries(rng, entries)
    text = written(entries)
    if rng.random() < 0.4:
        text = change_text(rng, text)
    data = rng.randbytes(offset + rng.choice([0, 0, 0, 0, 0, 0, 0, 0, 1, -1]) if offset else 0)
    length = len(text) + (rng.choice([-1, 1, 8, 1 << 40]) if rng.random() < 0.05 else 0)
    length = max(0, length)  # a change may have left no text
    return length.to_bytes(8, "little") + text + data


def written(entries: list[tuple[str, Any]]) -> bytes:
    """JSON of pairs, which may repeat a key."""
    pairs = (f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries)
    return ("{" + ",".join(pairs) + "}").encode()


def change_entries(rng: random.Random, entries: list[tuple[str, Any]]) -> None:
    """Another structure than a writer's."""
    tensors = [i for i, (name, _) in enumerate(entries) if name != "__metadata__"]
    what = rng.randrange(9)
    if what == 0:
        entries.append(("__metadata__", rng.choice([None, {"a": 1}, {}, [], {"a": "b"}])))
    if not tensors:
        return
    at = rng.choice(tensors)
    name, entry = entries[at][0], dict(entries[at][1])
    if what == 1:
        entries.insert(rng.randrange(len(entries) + 1), (name, dict(entry)))
    elif what == 2:
        entries[at] = name, [entry["dtype"], entry["shape"], entry["data_offsets"]]
        return
    elif what == 3:
        entry[rng.choice(["strides", "Dtype", "offset"])] = [1]
    elif what == 4:
        entry["data_offsets"] = [n + rng.choice([-1, 0, 1]) for n in entry["data_offsets"]]
    elif what == 5:
        entry["shape"] = [*entry["shape"], rng.choice([0, 1, 2, 1 << 48, 1 << 63, -1, 1.0, True])]
    elif what == 6:
        entry["shape"] = [1] * rng.choice([64, 65, 200]) + entry["shape"]
    elif what == 7:
        entry["dtype"] = rng.choice(["f32", "F4", "F8", "", 1, "BF16"])
    elif what == 8:
        entry.pop(rng.choice(list(entry)))
    entries[at] = name, entry


def change_text(rng: random.Random, text: bytes) -> bytes:
    """A few bytes flipped, cut, doubled, or put in."""
    data = bytearray(text)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(5)
        if what == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del data[at : at + rng.randint(1, 4)]
        elif what == 2:
            data[at:at] = data[at : at + rng.randint(1, 40)]
        elif what == 3:
            data[at:at] = rng.choice(TOKENS).encode()
        else:
            digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
            if digits:
                data[rng.choice(digits)] = rng.randrange(48, 58)
    return bytes(data)


def compare(data: bytes, header: Header) -> None:
    """The library sees the same tensors with the same bytes."""
    theirs = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    assert theirs.keys() == {entry.name for entry in header.entries}
    for entry in header.entries:
        other = theirs[entry.name]
        assert (tuple(other["shape"]), other["dtype"]) == (entry.shape, entry.dtype)
        assert bytes(other["data"]) == data[entry.offset : entry.offset + entry.nbytes]


def reason_of(data: bytes, message: str) -> str:
    """Why we refuse, where the library does not."""
    try:
        safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return "refused by both"
    for reason, words in STRICTER.items():
        if words in message:
            return reason
    pytest.fail(f"the library takes {data!r}, we say: {message}")


def test_what_we_take_the_library_takes(capsys: pytest.CaptureFixture[str]) -> None:
    found: Counter[str] = Counter()
    for number in range(FILES):
        data = hostile(random.Random(number))
        descriptor = os.memfd_create("header")
        os.write(descriptor, data)
        file = InputFile(descriptor, "x.safetensors")
        try:
            header = read_header(file)
        except InputError as error:
            found[reason_of(data, error.message)] += 1
        else:
            compare(data, header)
            found["taken by both"] += 1
        finally:
            file.close()
    with capsys.disabled():
        if "COMPRESS_HEADERS" in os.environ:
            print(f"\n{FILES} headers: {dict(found.most_common())}")
    assert found["taken by both"] > FILES // 5
    assert found["refused by both"] > FILES // 5
    assert found.keys() >= STRICTER.keys() - {"half of a surrogate pair"}
