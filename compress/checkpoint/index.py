"""`*.index.json`: which shard holds which tensor, checked against the shards themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from compress.checkpoint import strict_json
from compress.checkpoint.files import InputFile, require_plain_name
from compress.errors import InputError, show

MAX_INDEX = 100_000_000


@dataclass(frozen=True)
class Index:
    """A validated index: tensor name -> shard file name, and the size it claims."""

    name: str
    weight_map: dict[str, str]
    total_size: float | None
    raw: bytes

    @property
    def shards(self) -> list[str]:
        """Shard file names in order."""
        return sorted(set(self.weight_map.values()))


def read_index(file: InputFile, suffix: str) -> Index:
    """Read an index whose shards end in `suffix` (".safetensors", ".bin"). Raises InputError."""
    where = show(file.name)
    raw = file.read_all(MAX_INDEX)
    # total_size is written as 1.4e10 by some tools, so fractions are allowed here.
    members = strict_json.parse(raw, file.name, floats=True)
    if not isinstance(members, dict):
        raise InputError(f"{where}: not a JSON object")
    weight_map = members.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{where}: weight_map is missing, empty or not an object")
    for value in weight_map.values():
        require_plain_name(value, suffix, file.name)
    metadata = members.get("metadata", {})
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        raise InputError(f"{where}: metadata is not an object")
    total = metadata.get("total_size")
    known = isinstance(total, int | float) and not isinstance(total, bool)
    return Index(file.name, weight_map, total if known else None, raw)


def check_against_shards(index: Index, shards: Mapping[str, Iterable[str]]) -> None:
    """Index and shards must name the same tensors, each exactly once. Raises InputError.

    shards  shard file name -> names of the tensors that the shard holds
    """
    where = show(index.name)
    found: dict[str, str] = {}
    for shard, names in shards.items():
        for name in names:
            if name in found:
                raise InputError(
                    f"tensor '{show(name)}' is in two shards, {show(found[name])} and {show(shard)}"
                )
            found[name] = shard
    for name, shard in found.items():
        listed = index.weight_map.get(name)
        if listed is None:
            raise InputError(
                f"{where}: tensor '{show(name)}' of {show(shard)} is not listed",
                hint="leaving it out would lose weights: write the index again",
            )
        if listed != shard:
            raise InputError(
                f"{where}: tensor '{show(name)}' is in {show(shard)}, not in {show(listed)}"
            )
    for name, shard in index.weight_map.items():
        if name not in found:
            raise InputError(f"{where}: tensor '{show(name)}' is missing from {show(shard)}")
