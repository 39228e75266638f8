"""Opening an output directory: the original tensors again, decoded from what was stored.

The arrays that the record in `__metadata__` promises are checked against the files' headers when
the output is opened, so that decoding meets no surprise but damaged values.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from compress import formats
from compress.checkpoint import Checkpoint, manifest, open_checkpoint, skeleton
from compress.checkpoint.config import parse_config
from compress.checkpoint.directory import find_sidecars
from compress.checkpoint.files import InputFile, open_inside, resolve_inside
from compress.checkpoint.safetensors import read_header
from compress.checkpoint.skeleton_file import read_skeleton, roles_in_graph
from compress.checkpoint.source import AlreadyCompressed
from compress.errors import InputError, UsageError, show
from compress.formats import metadata
from compress.formats.arrays import cast_like, plain
from compress.formats.base import MODEL, ArraySpec, Entry, Format
from compress.roles import assign_roles
from compress.row_decoding import decode_rows, has_rows
from compress.tensor import DTYPES, Array, Role, Tensor, TensorInfo

# What may be the weights of an output, in order of preference.
_ENTRANCES = (
    "model.compress.safetensors.index.json",
    "model.compress.safetensors",
    "model.safetensors.index.json",
    "model.safetensors",
)
_NOT_ALIASES = frozenset({metadata.FORMAT, metadata.KEY})


class CompressedCheckpoint(Checkpoint):
    """An output of this tool, read as the checkpoint it was made from.

    `infos`, `read` and the other methods speak of the original tensors: names, dtypes, shapes,
    decoded values. `tensor` gives a tensor with its terms, `stored` the files as they are.
    """

    def __init__(
        self, path: Path, stored: Checkpoint, parts: dict[str, Checkpoint], fmt: Format
    ) -> None:
        super().__init__(path, Path(os.path.realpath(path)), {})
        self.stored = stored
        self.format = fmt
        self.entries: dict[str, Entry] = {}
        self._parts = {MODEL: stored, **parts}
        self._originals: dict[str, TensorInfo] = {}
        self._last: tuple[str, Array] | None = None
        self._lock = threading.Lock()

    def read(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Array:
        """Rows [start, stop) of the first axis, decoded, in the source's dtype.

        Raises UsageError for rows outside the tensor, InputError for damaged arrays.
        """
        known = self.info(info.name)
        if known.name in self.rounded:
            return _as(known.dtype, self.stored.read(known, start, stop))
        if known.name not in self.entries:
            return self.stored.read(known, start, stop)
        rows = known.shape[0]
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise UsageError(
                f"tensor '{show(known.name)}': range {start}:{stop} is outside 0:{rows}"
            )
        if has_rows(self.format, self.entries[known.name]):
            return decode_rows(self.format, self.entries[known.name], self._parts, start, stop)
        return np.array(self._decoded(known)[start:stop])

    def read_bytes(self, info: TensorInfo, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of the tensor's decoded data."""
        known = self.info(info.name)
        if known.name not in self.entries and known.name not in self.rounded:
            return self.stored.read_bytes(known, start, stop)
        if not 0 <= start <= stop <= known.nbytes:
            raise UsageError(
                f"tensor '{show(known.name)}': range {start}:{stop} is outside 0:{known.nbytes}"
            )
        if known.name in self.rounded:
            return self._rounded_bytes(known, start, stop)
        entry = self.entries[known.name]
        if start == stop or not has_rows(self.format, entry):
            flat = self._decoded(known).reshape(-1).view(np.uint8)
            return np.array(flat[start:stop]).data
        width = known.nbytes // known.shape[0]
        first, last = start // width, -(-stop // width)
        rows = decode_rows(self.format, entry, self._parts, first, last)
        return rows.reshape(-1).view(np.uint8)[start - first * width : stop - first * width].data

    def read_into(self, info: TensorInfo, start: int, buffer: memoryview) -> None:
        """Fill a contiguous, writable buffer from byte `start` of the tensor's decoded data."""
        known = self.info(info.name)
        if known.name not in self.entries and known.name not in self.rounded:
            self.stored.read_into(known, start, buffer)
        elif buffer.nbytes:
            buffer.cast("B")[:] = self.read_bytes(known, start, start + buffer.nbytes)

    def tensor(self, name: str) -> Tensor:
        """A tensor with its terms; one that was left alone has only its values."""
        info = self.info(name)
        entry = self.entries.get(name)
        if entry is None:
            return Tensor(info, info.to_matrix(self.read(info)))
        return self.format.unpack(entry, self.fetch)

    def stored_array(self, part: str, name: str) -> TensorInfo:
        """Where one of the arrays that `format.layout` names lies; `file` is relative to OUT.

        Raises UsageError if there is none.
        """
        from compress.layout import PART_FILES

        found = self._parts[part].info(name)
        return found if part == MODEL else replace(found, file=PART_FILES[part])

    def info(self, name: str) -> TensorInfo:
        """The original tensor called `name`. Raises UsageError if there is none."""
        found = self._originals.get(name)
        if found is None:
            raise UsageError(f"{show(str(self.path))}: no tensor named '{show(name)}'")
        return found

    def fingerprint(self) -> str:
        """SHA-256 over the fingerprints of all weight files."""
        return self._digest(Checkpoint.fingerprint)

    def content_hash(self) -> str:
        """SHA-256 over the content of all weight files and the config: reads everything."""
        return self._digest(Checkpoint.content_hash)

    def check_unchanged(self) -> None:
        """Raises InputError if a weight file was written to since it was opened."""
        for part in self._parts.values():
            part.check_unchanged()

    def close(self) -> None:
        """Close every file; a second call does nothing."""
        for part in self._parts.values():
            part.close()

    def _digest(self, of: Callable[[Checkpoint], str]) -> str:
        digest = hashlib.sha256()
        for name, part in sorted(self._parts.items()):
            digest.update(f"{name} {of(part)}\n".encode())
        return digest.hexdigest()

    def fetch(self, part: str, name: str) -> Array:
        """A stored array, whole. Raises UsageError if there is none."""
        checkpoint = self._parts[part]
        return checkpoint.read(checkpoint.info(name))

    def _decoded(self, info: TensorInfo) -> Array:
        """The whole tensor in the source's dtype; the last one is kept for readers of slices."""
        with self._lock:
            last = self._last
            if last is not None and last[0] != info.name:
                self._last = None  # or it would lie beside the next while that is decoded
        if last is not None and last[0] == info.name:
            return last[1]
        del last
        values = np.ascontiguousarray(info.from_matrix(plain(self.tensor(info.name))))
        with self._lock:
            self._last = (info.name, values)
        return values

    def _rounded_bytes(self, info: TensorInfo, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of a tensor that is stored in another dtype than it had."""
        dtype, stored = DTYPES[info.dtype], DTYPES[self.rounded[info.name]]
        first, last = start // dtype.itemsize, -(-stop // dtype.itemsize)
        raw = self.stored.read_bytes(info, first * stored.itemsize, last * stored.itemsize)
        flat = _as(info.dtype, np.frombuffer(raw, stored)).view(np.uint8)
        begin = first * dtype.itemsize
        return flat[start - begin : stop - begin].data

    def _load(self, entries: dict[str, Entry], cast: dict[str, str]) -> None:
        """Check that the files hold what the record says, and list the original tensors."""
        taken: dict[str, str] = {}
        for entry in entries.values():
            if reason := self.format.refuses(entry.info, entry.terms):
                raise self._damaged(f"tensor {show(entry.info.name)}: {reason}")
            for spec in self.format.layout(entry.info, entry.terms):
                self._check(spec)
                if spec.part == MODEL:
                    taken[spec.name] = entry.info.name
        self.entries = entries
        infos: dict[str, TensorInfo] = {}
        for stored in self.stored.infos():
            owner = taken.get(stored.name)
            if owner is not None:
                infos[owner] = replace(entries[owner].info, file=stored.file)
            elif stored.name in entries:
                raise self._damaged(f"two tensors are called {show(stored.name)}")
            elif stored.name in cast:
                infos[stored.name] = self._before_rounding(stored, cast.pop(stored.name))
            else:
                infos[stored.name] = stored
        if cast:
            raise self._damaged(f"the tensor {show(min(cast))} is missing")
        # Roles of tensors that were left alone follow from the config and the original names, or
        # from the nodes of the graph that they come from.
        found = assign_roles(list(infos.values()), self.config)
        if self.graph is not None:
            found = roles_in_graph(found, self.graph)
        self._infos = [infos[i.name] if i.name in entries else i for i in found]
        self._originals = {i.name: i for i in self._infos}
        for alias, kept in self.stored.metadata.items():
            if kept in infos and alias not in infos and alias not in _NOT_ALIASES:
                self.aliases[alias] = kept

    def _before_rounding(self, stored: TensorInfo, dtype: str) -> TensorInfo:
        """The header that a tensor had before `--untouched` rounded it."""
        if not stored.is_float:
            raise self._damaged(f"the tensor {show(stored.name)} is {stored.dtype}, not rounded")
        self.rounded[stored.name] = stored.dtype
        nbytes = stored.size * DTYPES[dtype].itemsize
        return replace(stored, dtype=dtype, nbytes=nbytes, offset=-1)

    def _check(self, spec: ArraySpec) -> None:
        if spec.part not in self._parts:
            raise self._damaged(f"the file of {show(spec.name)} is missing")
        try:
            stored = self._parts[spec.part].info(spec.name)
        except UsageError:
            raise self._damaged(f"the array {show(spec.name)} is missing") from None
        if stored.dtype != spec.dtype or stored.shape != spec.shape:
            raise self._damaged(
                f"the array {show(spec.name)} is {stored.dtype} {list(stored.shape)},"
                f" not {spec.dtype} {list(spec.shape)}"
            )

    def _damaged(self, what: str) -> InputError:
        return InputError(
            f"{show(str(self.path))}: {what}", hint="compress verify says which file was changed"
        )


class Float32Output(Checkpoint):
    """An output whose changed tensors are read as the formula gives them: in float32.

    `CompressedCheckpoint.read` rounds to the source's dtype, which is what `unpack` writes; a model
    that is run on decoded weights, and a graph that decodes them itself, have no such rounding.
    Closing it leaves the output open.
    """

    def __init__(self, output: CompressedCheckpoint) -> None:
        super().__init__(output.path, output.directory, {})
        self.config, self.config_bytes = output.config, output.config_bytes
        self.metadata, self.aliases = dict(output.metadata), dict(output.aliases)
        self.rounded, self.sidecars = dict(output.rounded), list(output.sidecars)
        self.graph = output.graph
        self._output = output
        self._last_read: tuple[str, Callable[[int, int | None], Array]] | None = None
        self._infos = [
            replace(i, dtype="F32", nbytes=4 * i.size) if self._is_coded(i) else i
            for i in output.infos()
        ]
        self._named = {info.name: info for info in self._infos}

    def info(self, name: str) -> TensorInfo:
        """The tensor called `name`. Raises UsageError if there is none."""
        self._output.info(name)
        return self._named[name]

    def read(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Array:
        """Rows [start, stop) of the first axis."""
        if not self._is_coded(info):
            return self._output.read(info, start, stop)
        last = self._last_read
        if last is None or last[0] != info.name:
            tensor = self._output.tensor(info.name)
            if start == 0 and stop in (None, info.shape[0]):
                return _decode(tensor)  # it is large and not read again
            last = self._last_read = info.name, _rows_of(tensor)
        return last[1](start, stop)

    def _is_coded(self, info: TensorInfo) -> bool:
        """Whether float32 is more than the source's dtype holds; float64 is left as it is."""
        entry = self._output.entries.get(info.name)
        coded = entry is not None and (entry.terms.codes is not None or entry.terms.rank > 0)
        return coded and self._output.info(info.name).dtype != "F64"


def _decode(tensor: Tensor) -> Array:
    """float32 in the tensor's own shape."""
    return np.ascontiguousarray(tensor.info.from_matrix(tensor.decode())).reshape(tensor.info.shape)


def _rows_of(tensor: Tensor) -> Callable[[int, int | None], Array]:
    """Reads rows [start, stop) in float32; a table of codes stays one, as large as it was."""
    codes, info = tensor.codes, tensor.info
    bare = tensor.factors is None and tensor.outliers is None and info.role is not Role.CONV1D
    if codes is None or not bare or len(info.shape) != 2:
        values = _decode(tensor)
        return lambda start, stop: np.array(values[start:stop])
    one_scale = codes.scale.shape[0] != info.shape[0]

    def rows(start: int, stop: int | None) -> Array:
        scale, points = codes.scale, codes.zero_point
        if not one_scale:
            scale = scale[start:stop]
            points = None if points is None else np.ascontiguousarray(points[start:stop])
        values = np.ascontiguousarray(codes.values[start:stop])
        return replace(codes, values=values, scale=scale, zero_point=points).dequantize()

    return rows


def in_float32(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with changed tensors in float32 where it is an output of this tool."""
    return Float32Output(checkpoint) if isinstance(checkpoint, CompressedCheckpoint) else checkpoint


def is_compressed(path: str | Path) -> bool:
    """Whether `path` is an output directory whose weight files carry this tool's record."""
    directory = os.path.realpath(path)
    if not os.path.isdir(directory):
        return False
    entrance = _entrance(directory)
    if entrance is None:
        return False
    try:
        names = _weight_files(directory, entrance)
        return metadata.is_present(_metadata_of(directory, names[0]))
    except InputError:
        return False  # whoever opens it says what is wrong with it


def open_output(path: str | Path) -> CompressedCheckpoint:
    """Open an output directory. Raises UsageError if it is none, InputError if it is damaged."""
    directory = os.path.realpath(path)
    entrance = _entrance(directory) if os.path.isdir(directory) else None
    if entrance is None:
        raise UsageError(
            f"{show(str(path))}: not an output directory of this tool",
            hint="name the directory that was given as -o",
        )
    opened: list[Checkpoint] = []
    try:
        opened.append(open_checkpoint(Path(directory) / entrance, allow_quantized=True))
        record = _record(directory, entrance)
        parts: dict[str, Checkpoint] = {}
        for part, relative in _part_files(directory):
            parts[part] = open_checkpoint(resolve_inside(directory, relative))
            opened.append(parts[part])
        checkpoint = CompressedCheckpoint(
            Path(path), opened[0], parts, _format_of(record.format, str(path))
        )
        _add_surroundings(checkpoint, directory)
        checkpoint.metadata |= record.source_metadata
        checkpoint._load({e.info.name: e for e in record.entries}, dict(record.cast))
    except BaseException:
        for one in opened:
            one.close()
        raise
    return checkpoint


def open_any(path: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a plain checkpoint or an output of this tool, whichever `path` is.

    Raises UsageError if nothing is there, InputError for malformed content.
    """
    if is_compressed(path):
        return open_output(path)
    try:
        checkpoint = open_checkpoint(path, allow_pickle=allow_pickle)
        _add_skeleton(checkpoint)
        return checkpoint
    except AlreadyCompressed:
        raise UsageError(
            f"{show(str(path))}: one file of a compressed checkpoint",
            hint="name the directory that it lies in",
        ) from None


def _add_skeleton(checkpoint: Checkpoint) -> None:
    """Give a plain output that was made from an .onnx file the graph that lies beside it."""
    folder = checkpoint.directory
    if folder is None or checkpoint.graph is not None:
        return
    if all(os.path.lexists(folder / name) for name in (skeleton.FILE, manifest.NAME)):
        try:
            checkpoint.graph = read_skeleton(str(folder))
        except BaseException:
            checkpoint.close()
            raise


def _entrance(directory: str) -> str | None:
    """The index or lone weight file of an output, by its fixed names."""
    return next((n for n in _ENTRANCES if os.path.lexists(os.path.join(directory, n))), None)


def _weight_files(directory: str, entrance: str) -> list[str]:
    if not entrance.endswith(".json"):
        return [entrance]
    from compress.checkpoint.index import read_index

    with _opened(directory, entrance) as file:
        return read_index(file, ".safetensors").shards


def _record(directory: str, entrance: str) -> metadata.Record:
    """The records of all weight files as one."""
    names: set[str] = set()
    entries: dict[str, Entry] = {}
    source_metadata: dict[str, str] = {}
    cast: dict[str, str] = {}
    for file in _weight_files(directory, entrance):
        mapping = _metadata_of(directory, file)
        try:
            found = metadata.decode(mapping)
        except InputError as error:
            raise InputError(f"{show(file)}: {error.message}", hint=error.hint) from None
        names.add(found.format)
        own = {entry.info.name: entry for entry in found.entries}
        if twice := (own.keys() | found.cast.keys()) & (entries.keys() | cast.keys()):
            raise InputError(f"{show(file)}: tensor {show(min(twice))} is recorded twice")
        entries |= own
        cast |= found.cast
        source_metadata |= found.source_metadata
    if len(names) != 1:
        raise InputError("the weight files were written in different formats")
    return metadata.Record(names.pop(), tuple(entries.values()), source_metadata, cast)


def _metadata_of(directory: str, name: str) -> dict[str, str]:
    with _opened(directory, name) as file:
        return read_header(file).metadata


class _opened:
    """An InputFile as a context manager."""

    def __init__(self, directory: str, name: str) -> None:
        self._file = open_inside(directory, name)

    def __enter__(self) -> InputFile:
        return self._file

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _part_files(directory: str) -> Iterator[tuple[str, str]]:
    """(part, relative path) of the files beside the weights that exist."""
    from compress.layout import PART_FILES

    for part, relative in PART_FILES.items():
        if os.path.lexists(os.path.join(directory, relative)):
            yield part, relative


def _as(dtype: str, values: Array) -> Array:
    """Floats in another dtype, in their own shape; finite values stay finite."""
    flat = np.ascontiguousarray(values).reshape(-1).astype(np.float32)
    widened: Array = cast_like(flat, DTYPES[dtype]).reshape(values.shape)
    return widened


def _format_of(name: str, where: str) -> Format:
    if name not in formats.NAMES:
        raise InputError(
            f"{show(where)}: written in the unknown format {show(name)}",
            hint="a newer version of this program wrote it",
        )
    return formats.get(name)


def _add_surroundings(checkpoint: CompressedCheckpoint, directory: str) -> None:
    """The config as it was before quantization, and the files that came from the source."""
    stored = checkpoint.stored
    checkpoint.metadata = {k: v for k, v in stored.metadata.items() if k != metadata.KEY}
    if os.path.lexists(os.path.join(directory, "config.json")):
        with _opened(directory, "config.json") as file:
            config, raw = parse_config(file, allow_quantized=True)
        if config.pop("quantization_config", None) is not None:
            raw = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        checkpoint.config, checkpoint.config_bytes = config, raw
    if os.path.lexists(os.path.join(directory, skeleton.FILE)):
        checkpoint.graph = read_skeleton(directory)
    found = find_sidecars(directory, {"config.json"})
    checkpoint.sidecars = [name for name in found.files if name not in formats.OWN_FILES]
    checkpoint.code_files = [n for n in found.code if n in checkpoint.sidecars]
