"""Where the arrays of an output lie: what a graph's external data points at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from compress.checkpoint import Checkpoint
from compress.checkpoint.writer import header_bytes, nbytes_of
from compress.errors import InputError, show
from compress.formats.base import MODEL, Entry
from compress.layout import Layout
from compress.output import CompressedCheckpoint
from compress.tensor import Array, Tensor, TensorInfo


@dataclass(frozen=True)
class Stored:
    """An array of an output: a range of one of its files, offset and size in bytes."""

    part: str
    name: str
    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """The tensors that a skeleton names, as an output stores them.

    infos    the original tensors by name
    entries  those that are stored as other arrays
    array    (part, array name) -> where it lies
    tensor   name -> the tensor with its terms, read from the output
    read     the bytes of an array
    format   the name of the output's format
    """

    infos: Mapping[str, TensorInfo]
    entries: Mapping[str, Entry]
    array: Callable[[str, str], Stored]
    tensor: Callable[[str], Tensor]
    read: Callable[[Stored], Array]
    format: str

    def info(self, name: str) -> TensorInfo:
        """The original tensor. Raises InputError where a graph names one that is not there."""
        found = self.infos.get(name)
        if found is None:
            raise InputError(
                f"the graph reads a weight {show(name)}, which the weight files do not hold"
            )
        return found


def of_output(checkpoint: Checkpoint) -> Weights:
    """The weights of an open output, or of a plain checkpoint."""
    infos = {info.name: info for info in checkpoint.infos()}
    if isinstance(checkpoint, CompressedCheckpoint):
        output = checkpoint

        def array(part: str, name: str) -> Stored:
            return _stored(part, output.stored_array(part, name))

        def fetch(stored: Stored) -> Array:
            return output.fetch(stored.part, stored.name)

        return Weights(infos, output.entries, array, output.tensor, fetch, output.format.name)

    def plain(part: str, name: str) -> Stored:
        return _stored(part, checkpoint.info(name))

    def tensor(name: str) -> Tensor:
        info = checkpoint.info(name)
        return Tensor(info, info.to_matrix(checkpoint.read(info)))

    def read(stored: Stored) -> Array:
        return checkpoint.read(checkpoint.info(stored.name))

    return Weights(infos, {}, plain, tensor, read, "dense")


def of_layout(layout: Layout, format_name: str) -> Weights:
    """The weights of an output that will be written: places are known, values are not."""
    places: dict[tuple[str, str], Stored] = {}
    infos: dict[str, TensorInfo] = {}
    entries: dict[str, Entry] = {}
    for file in (*layout.shards, *layout.parts):
        offset = len(header_bytes(file.header_specs, file.metadata))
        for spec in file.specs:
            nbytes = nbytes_of(spec.dtype, spec.shape)
            stored = Stored(file.part, spec.name, file.name, offset, nbytes, spec.dtype, spec.shape)
            places[file.part, spec.name] = stored
            offset += nbytes
        if file.part != MODEL:
            continue
        for tensor in file.tensors:
            infos[tensor.info.name] = tensor.info
            if tensor.terms.changed and format_name != "dense":
                entries[tensor.info.name] = Entry(tensor.info, tensor.terms)

    def unwritten(what: object) -> NoReturn:
        raise ValueError(f"{what}: not written yet")

    return Weights(
        infos, entries, lambda part, name: places[part, name], unwritten, unwritten, format_name
    )


def _stored(part: str, info: TensorInfo) -> Stored:
    if info.offset < 0:
        raise InputError(
            f"tensor {show(info.name)}: its file {show(info.file)} is no safetensors file, which a"
            " graph can point into",
            hint="run the export on an output of this tool",
        )
    return Stored(part, info.name, info.file, info.offset, info.nbytes, info.dtype, info.shape)
