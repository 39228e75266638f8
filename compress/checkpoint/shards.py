"""The open weight files of a checkpoint, and how each kind is opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from compress.checkpoint.directory import TORCH_SUFFIXES
from compress.checkpoint.files import InputFile
from compress.checkpoint.safetensors import Entry, Header, read_header
from compress.tensor import Role


@dataclass
class Shard:
    """One weight file: the file that was named, and the safetensors file its data is read from.

    They differ for PyTorch files, whose tensors were moved into an unnamed temporary file. The
    tensors in `moved` are those of an .onnx file that lie in one: name -> offset in `spill`.
    `roles` are known where a graph says them.
    """

    file: InputFile
    data: InputFile
    header: Header
    aliases: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    moved: dict[str, int] = field(default_factory=dict)
    spill: InputFile | None = None
    roles: dict[str, Role] = field(default_factory=dict)

    def place(self, entry: Entry) -> tuple[InputFile, int]:
        """The file that a tensor is read from, and where in it."""
        if self.spill is not None and entry.name in self.moved:
            return self.spill, self.moved[entry.name]
        return self.data, entry.offset

    def close(self) -> None:
        """Close every file; a second call does nothing."""
        self.file.close()
        self.data.close()
        if self.spill is not None:
            self.spill.close()


@dataclass(frozen=True)
class OnnxGraphFile:
    """The skeleton of an .onnx file, and where that file is."""

    graph: bytes
    path: Path


def open_shard(file: InputFile, allow_pickle: bool) -> Shard:
    """A safetensors or PyTorch file, its header checked; closes `file` where it raises."""
    try:
        named_torch = file.name.endswith(TORCH_SUFFIXES)
        if not named_torch and not _looks_like_torch(file):
            return Shard(file, file, read_header(file))
        from compress.checkpoint.torch_file import convert

        converted = convert(file, allow_pickle=allow_pickle)
    except BaseException:
        file.close()
        raise
    try:
        header = read_header(converted.file)
    except BaseException:
        file.close()
        converted.file.close()
        raise
    return Shard(file, converted.file, header, converted.aliases, converted.warnings)


def _looks_like_torch(file: InputFile) -> bool:
    """A PyTorch file under a name that says nothing; a .safetensors name is believed."""
    if file.name.endswith(".safetensors"):
        return False
    start = file.read(0, min(file.size, 4))
    return start.startswith((b"PK\x03\x04", b"\x80\x02"))


def open_onnx(
    shards: dict[str, Shard], directory: str, name: str, file: InputFile, allow_quantized: bool
) -> OnnxGraphFile:
    """One shard for the .onnx file itself, and one for every file beside it that it names.

    `file` is called `name` in the real path `directory`; it is closed where this raises.
    """
    from compress.checkpoint.onnx_file import read_onnx

    try:
        found = read_onnx(file, directory, allow_quantized=allow_quantized)
    except BaseException:
        file.close()
        raise
    files = {name: file, **found.external}
    entries: dict[str, list[Entry]] = {one: [] for one in files}
    for tensor in found.tensors:
        info = tensor.info
        held = entries[name if tensor.data is found.spill else info.file]
        held.append(Entry(info.name, info.dtype, info.shape, tensor.offset, info.nbytes))
    for one, opened in files.items():
        raw = found.graph if one == name else b""
        shards[one] = Shard(opened, opened, Header(entries[one], {}, raw))
    own = shards[name]
    own.spill = found.spill
    own.moved = {t.info.name: t.offset for t in found.tensors if t.data is found.spill}
    own.roles = {t.info.name: t.info.role for t in found.tensors}
    own.warnings = found.warnings
    return OnnxGraphFile(found.graph, Path(directory) / name)
