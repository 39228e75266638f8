"""What the output will hold: shards, side files and their exact bytes, from terms alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from compress import formats
from compress.checkpoint import Checkpoint
from compress.checkpoint.writer import header_bytes, nbytes_of
from compress.formats import metadata
from compress.formats.base import ADAPTER, MODEL, SUPER_WEIGHTS, ArraySpec, Entry, Format
from compress.tiles import TensorPlan

MAX_SHARD_BYTES = 5 * 10**9  # what the hub's own tools use
PART_FILES = {
    ADAPTER: "adapter/adapter_model.safetensors",
    SUPER_WEIGHTS: "super_weights.safetensors",
}


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file to write: the tensors that feed it and its arrays in order."""

    name: str
    part: str
    tensors: tuple[TensorPlan, ...]
    specs: tuple[ArraySpec, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def nbytes(self) -> int:
        """The size of the file, header included."""
        data = sum(nbytes_of(s.dtype, s.shape) for s in self.specs)
        return len(header_bytes(self.header_specs, self.metadata)) + data

    @property
    def header_specs(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype tag, shape) of every array, as the writer takes them."""
        return [(s.name, s.dtype, s.shape) for s in self.specs]


@dataclass(frozen=True)
class Layout:
    """All files of an output but the report and the manifest."""

    shards: tuple[WeightFile, ...]
    parts: tuple[WeightFile, ...]
    small: Mapping[str, bytes]  # written from memory
    copies: Mapping[str, int]  # sidecars copied from the source, with their sizes

    @property
    def weight_bytes(self) -> int:
        """Bytes of every weight file: shards, adapter, super weights."""
        return sum(f.nbytes for f in (*self.shards, *self.parts))

    @property
    def nbytes(self) -> int:
        """Bytes of every file here."""
        return self.weight_bytes + sum(map(len, self.small.values())) + sum(self.copies.values())

    def sizes(self) -> dict[str, int]:
        """File name -> bytes."""
        sizes = {f.name: f.nbytes for f in (*self.shards, *self.parts)}
        return sizes | {n: len(b) for n, b in self.small.items()} | dict(self.copies)


def specs_of(tensor: TensorPlan, fmt: Format) -> list[ArraySpec]:
    """The arrays one tensor becomes, over all parts."""
    info, terms = tensor.info, tensor.terms
    specs: list[ArraySpec] = []
    if terms.changed:
        specs += fmt.layout(info, terms)
    else:
        specs.append(ArraySpec(MODEL, info.name, tensor.cast or info.dtype, info.shape))
        if terms.outliers[1]:
            specs += formats.super_weight_layout(info, terms)
    # The largest array first: it streams while the others wait for its end (see run._Assembly).
    return sorted(specs, key=lambda s: nbytes_of(s.dtype, s.shape), reverse=True)


def bytes_range_of(tensor: TensorPlan, fmt: Format) -> tuple[int, int]:
    """Bytes of all arrays of one tensor, at least and at most."""
    low, high = (
        sum(
            nbytes_of(s.dtype, s.shape)
            for s in specs_of(replace(tensor, terms=tensor.terms.at(end)), fmt)
        )
        for end in (0, 1)
    )
    return low, high


def arrange(
    tensors: Sequence[TensorPlan],
    fmt: Format,
    checkpoint: Checkpoint,
    small: Mapping[str, bytes],
    *,
    end: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Layout:
    """Lay out the output. `end` closes open ranges at their low (0) or high (1) side."""
    if end is not None:
        tensors = [replace(t, terms=t.terms.at(end)) for t in tensors]
    by_part: dict[str, list[ArraySpec]] = {ADAPTER: [], SUPER_WEIGHTS: []}
    groups: list[list[tuple[TensorPlan, list[ArraySpec]]]] = [[]]
    filled = 0
    for tensor in tensors:
        own: list[ArraySpec] = []
        for spec in specs_of(tensor, fmt):
            (own if spec.part == MODEL else by_part[spec.part]).append(spec)
        nbytes = sum(nbytes_of(s.dtype, s.shape) for s in own)
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((tensor, own))
        filled += nbytes
    shards = _shards(groups, fmt, checkpoint)
    parts = [
        WeightFile(PART_FILES[part], part, tuple(tensors), tuple(specs), {"format": "pt"})
        for part, specs in by_part.items()
        if specs
    ]
    entries = [Entry(t.info, t.terms) for t in tensors if t.terms.changed]
    files = dict(small)
    files |= fmt.extra_files(entries, checkpoint.config, checkpoint.infos())
    if len(shards) > 1:
        files["model" + fmt.weights_suffix + ".index.json"] = _index(shards)
    copies = {
        name: ((checkpoint.directory or checkpoint.path) / name).stat().st_size
        for name in checkpoint.sidecars
        if name not in files and name not in formats.OWN_FILES
    }
    return Layout(tuple(shards), tuple(parts), files, copies)


def _shards(
    groups: Sequence[Sequence[tuple[TensorPlan, list[ArraySpec]]]],
    fmt: Format,
    checkpoint: Checkpoint,
) -> list[WeightFile]:
    total = len(groups)
    shards = []
    for number, group in enumerate(groups, 1):
        middle = "" if total == 1 else f"-{number:05d}-of-{total:05d}"
        members = tuple(t for t, _ in group)
        entries = [Entry(t.info, t.terms) for t in members if t.terms.changed]
        kept = {t.info.name for t in members}
        tied = {a: k for a, k in checkpoint.aliases.items() if k in kept}
        shards.append(
            WeightFile(
                name=f"model{middle}{fmt.weights_suffix}",
                part=MODEL,
                tensors=members,
                specs=tuple(s for _, own in group for s in own),
                metadata=tied
                | metadata.encode(
                    fmt.name,
                    entries,
                    source_metadata=checkpoint.foreign_metadata,
                    cast={t.info.name: t.info.dtype for t in members if t.cast is not None},
                ),
            )
        )
    return shards


def _index(shards: Sequence[WeightFile]) -> bytes:
    weight_map = {s.name: shard.name for shard in shards for s in shard.specs}
    total = sum(nbytes_of(s.dtype, s.shape) for shard in shards for s in shard.specs)
    body = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(body, indent=2) + "\n").encode()
