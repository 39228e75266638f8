"""`model.safetensors.index.json`: what is taken names plain files, and agrees with such shards.

The first byte chooses the suffix that shards have to have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from compress.checkpoint.files import InputFile
from compress.checkpoint.index import Index, check_against_shards, read_index
from compress.errors import InputError
from fuzz.checks import Broken, MemoryFile, outcome, require

NAME = "model.safetensors.index.json"
SUFFIXES = (".safetensors", ".bin")
WORDS = (
    b'"weight_map":{', b'"metadata":{', b'"total_size":', b".safetensors", b".bin", b"../", b"/",
    b"\\\\", b"\\u0000", b"\\u0000.safetensors", b"..", b"1.4e10", b"1e999", b"NaN", b"null", b"{}",
    b'"a":"model-00001-of-00002.safetensors"', b"\\ud800", b"true",
)  # fmt: skip
_file = MemoryFile()


def seeds(corpus: Path | None) -> Iterator[bytes]:
    """A good one, and those of the corpus."""
    yield b'\x00{"metadata":{"total_size":16},"weight_map":{"a":"m1.safetensors"}}'
    yield b'\x01{"metadata":null,"weight_map":{"a":"x.bin","b":"x.bin","c":"y.bin"}}'
    for path in sorted(corpus.glob("shard/*/*.index.json")) if corpus else ():
        if path.stat().st_size < 2000:
            yield b"\x00" + path.read_bytes()


def target(data: bytes) -> None:
    """Read one index, then compare it with shards that fit and with shards that do not."""
    suffix = SUFFIXES[data[0] & 1 if data else 0]
    file = InputFile(_file.fill(data[1:]), NAME)
    try:
        index = outcome(lambda: read_index(file, suffix), names=NAME, errors=(InputError,))
    finally:
        file.close()
    if index is not None:
        _check(index, suffix)


def _check(index: Index, suffix: str) -> None:
    shards: dict[str, list[str]] = {}
    for name, shard in index.weight_map.items():
        plain = os.path.basename(shard) == shard and shard not in ("", ".", "..")
        require(plain and "\\" not in shard and "\0" not in shard, "a shard outside of the folder")
        require(shard.endswith(suffix), "a shard of another kind")
        shards.setdefault(shard, []).append(name)
    require(index.shards == sorted(shards), "other shards than the index names")
    check_against_shards(index, shards)
    first = shards[index.shards[0]]
    for wrong in (first[1:], [*first, "one more"]):
        done = outcome(
            lambda one=wrong: check_against_shards(index, shards | {index.shards[0]: one}) or True,  # type: ignore[misc]
            names="", errors=(InputError,),
        )  # fmt: skip
        if done and "one more" not in index.weight_map:
            raise Broken("an index that does not fit its shards was taken")
