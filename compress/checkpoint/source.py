"""`Checkpoint`: named tensors of a directory or a file, read lazily through one strict reader."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint.config import code_keys, parse_config
from compress.checkpoint.directory import (
    INDEX_SUFFIX,
    ONNX_SUFFIX,
    TORCH_SUFFIXES,
    Layout,
    check_strays,
    find_sidecars,
    find_weights,
)
from compress.checkpoint.files import InputFile, open_inside, open_typed, read_error
from compress.checkpoint.index import Index, check_against_shards, read_index
from compress.checkpoint.shards import OnnxGraphFile, Shard, open_onnx, open_shard
from compress.errors import InputError, UsageError, show
from compress.roles import assign_roles, refuse_quantized
from compress.tensor import DTYPES, Array, Role, TensorInfo

# The entry of `__metadata__` under which this tool records the tensors that it changed. It stands
# here, below the formats that write it, because whoever opens a checkpoint has to know it.
RECORD_KEY = "compress"
_METADATA_WORDS = frozenset({"format", RECORD_KEY})  # keys of __metadata__ that are never an alias


_SAMPLES, _SAMPLE_BYTES = 16, 64  # of a tensor, that tell it from another


class AlreadyCompressed(InputError):
    """The weights are an output of this tool, which holds codes and no plain tensors."""


class Checkpoint:
    """An open checkpoint. Use as a context manager; every method may be called from any thread.

    path          the directory or file that was named
    directory     the real directory, None for a lone file
    graph         of an .onnx file: its skeleton (compress/checkpoint/skeleton.py), serialized
    graph_path    that .onnx file
    config        config.json, parsed strictly; config_bytes are the bytes it was read from
    metadata      merged `__metadata__` of the weight files
    aliases       tied tensors: name that is not stored -> name that is
    rounded       tensors that `--untouched` stored in another dtype: name -> the stored dtype
    sidecars      relative paths of other files that belong to the model
    code_files    those among them that hold code, and `config.json:KEY` for keys that name code
    warnings      what the user should know, safe to print
    """

    def __init__(self, path: Path, directory: Path | None, shards: dict[str, Shard]) -> None:
        self.path = path
        self.directory = directory
        self.graph: bytes | None = None
        self.graph_path: Path | None = None
        self.config: dict[str, Any] | None = None
        self.config_bytes: bytes | None = None
        self.metadata: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.rounded: dict[str, str] = {}
        self.sidecars: list[str] = []
        self.code_files: list[str] = []
        self.warnings: list[str] = []
        self._shards = shards
        self._infos: list[TensorInfo] = []
        self._by_name: dict[str, tuple[TensorInfo, InputFile, int]] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def foreign_metadata(self) -> dict[str, str]:
        """What others wrote into `__metadata__`, to be carried along: no record and no alias."""
        return {
            key: value
            for key, value in self.metadata.items()
            if key != RECORD_KEY and key not in self.aliases
        }

    @property
    def weight_files(self) -> dict[str, int]:
        """Bytes of every weight file by its name, those without a tensor of their own included."""
        return {name: shard.file.size for name, shard in self._shards.items()}

    def infos(self) -> list[TensorInfo]:
        """Every tensor, by (file, offset), from headers alone, with its role."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """The tensor called `name`. Raises UsageError if there is none."""
        return self._find(name)[0]

    def read(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Array:
        """Rows [start, stop) of the first axis, the whole tensor by default; fresh and writable.

        Dtypes that numpy cannot hold (F4, F6, C64 and so on: those without an entry in
        `compress.tensor.DTYPES`) come out as uint8 [nbytes], whole only.
        Raises UsageError for rows outside the tensor, InputError if the file became shorter.
        """
        known, file, offset = self._find(info.name)
        dtype = DTYPES.get(known.dtype)
        shape: tuple[int, ...]
        if dtype is None:
            if start != 0 or stop is not None:
                raise UsageError(f"tensor '{show(known.name)}': {known.dtype} has no rows")
            dtype, shape = np.dtype(np.uint8), (known.nbytes,)
        elif not known.shape:
            _check_range(known, start, stop, 1)
            shape = ()
            if stop == start:
                raise UsageError(f"tensor '{show(known.name)}': a scalar has no empty range")
        else:
            stop = _check_range(known, start, stop, known.shape[0])
            shape = (stop - start, *known.shape[1:])
            offset += start * (known.nbytes // known.shape[0] if known.shape[0] else 0)
        values = np.empty(shape, dtype)
        if values.nbytes:
            file.read_into(offset, values.reshape(-1).view(np.uint8).data)
        return values

    def read_bytes(self, info: TensorInfo, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of the tensor's data, to be copied as they are."""
        known, file, offset = self._find(info.name)
        stop = _check_range(known, start, stop, known.nbytes)
        buffer: NDArray[np.uint8] = np.empty(stop - start, np.uint8)
        if stop > start:
            file.read_into(offset + start, buffer.data)
        return buffer.data

    def read_into(self, info: TensorInfo, start: int, buffer: memoryview) -> None:
        """Fill a contiguous, writable buffer from byte `start` of the tensor's data."""
        known, file, offset = self._find(info.name)
        _check_range(known, start, start + buffer.nbytes, known.nbytes)
        if buffer.nbytes:
            file.read_into(offset + start, buffer)

    def open_sidecar(self, relative: str) -> InputFile:
        """Open one of `sidecars` for copying, links checked again; the caller closes it."""
        if self.directory is None or relative not in self.sidecars:
            raise UsageError(
                f"{show(str(self.path))}: no file '{show(relative)}' beside the weights"
            )
        return open_inside(str(self.directory), relative)

    def fingerprint(self) -> str:
        """SHA-256 over headers, config, file names, sizes and times: cheap, no data is read."""
        digest = hashlib.sha256()
        for name, shard in self._shards.items():
            status = shard.file.status
            _feed(digest, name.encode("utf-8", "surrogateescape"), shard.header.raw)
            _feed(digest, f"{status.st_size} {status.st_mtime_ns}".encode())
        _feed(digest, self.config_bytes or b"")
        return digest.hexdigest()

    def sample_hash(self) -> str:
        """SHA-256 over names, dtypes, shapes and some bytes of every tensor.

        It says which model this is, whatever its files are called, how they are sharded and when
        they were written; `content_hash` reads everything instead.
        """
        digest = hashlib.sha256()
        for info in sorted(self.infos(), key=lambda i: i.name):
            _feed(digest, info.name.encode(), f"{info.dtype} {info.shape}".encode())
            last = max(0, info.nbytes - _SAMPLE_BYTES)
            for place in range(_SAMPLES):
                start = last * place // (_SAMPLES - 1)
                stop = min(start + _SAMPLE_BYTES, info.nbytes)
                _feed(digest, bytes(self.read_bytes(info, start, stop)))
        return digest.hexdigest()

    def content_hash(self) -> str:
        """SHA-256 over the content of all weight files and the config: reads everything."""
        digest = hashlib.sha256()
        for name, shard in self._shards.items():
            _feed(digest, name.encode("utf-8", "surrogateescape"), str(shard.file.size).encode())
            shard.file.update(digest)
        _feed(digest, self.config_bytes or b"")
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raises InputError if a weight file was written to since it was opened."""
        for shard in self._shards.values():
            shard.file.check_unchanged()

    def close(self) -> None:
        """Close every file; a second call does nothing."""
        for shard in self._shards.values():
            shard.close()

    def _find(self, name: str) -> tuple[TensorInfo, InputFile, int]:
        found = self._by_name.get(name)
        if found is None:
            raise UsageError(f"{show(str(self.path))}: no tensor named '{show(name)}'")
        return found

    def _load_headers(self, allow_quantized: bool) -> None:
        infos: list[TensorInfo] = []
        for name, shard in self._shards.items():
            for entry in shard.header.entries:
                data, offset = shard.place(entry)
                offset = offset if data is shard.file else -1
                infos.append(
                    TensorInfo(entry.name, name, entry.dtype, entry.shape, entry.nbytes, offset)
                )
            self.metadata.update(shard.header.metadata)
            self.warnings.extend(shard.warnings)
        known: dict[str, Role] = {}
        for shard in self._shards.values():
            known.update(shard.roles)
        if self.graph is not None:
            self._infos = [replace(info, role=known[info.name]) for info in infos]
        else:
            if not allow_quantized:
                refuse_quantized(infos)
            self._infos = assign_roles(infos, self.config)
        positions = (
            shard.place(entry) for shard in self._shards.values() for entry in shard.header.entries
        )
        for info, (file, offset) in zip(self._infos, positions, strict=True):
            self._by_name[info.name] = (info, file, offset)
        for shard in self._shards.values():
            self._add_aliases(shard)

    def _add_aliases(self, shard: Shard) -> None:
        # Some writers note in __metadata__ which name of a tied pair they left out.
        noted = {
            key: value
            for key, value in shard.header.metadata.items()
            if value in self._by_name and key not in _METADATA_WORDS
        }
        for alias, kept in {**noted, **shard.aliases}.items():
            if alias not in self._by_name:
                self.aliases[alias] = kept


def open_checkpoint(
    path: str | Path, *, allow_pickle: bool = False, allow_quantized: bool = False
) -> Checkpoint:
    """Open a directory, a weight file or an index, and check every header.

    allow_pickle     read PyTorch files too, in a child process with limits
    allow_quantized  take weights that are already quantized (our own output)
    Raises UsageError if nothing is there, InputError for malformed content, and of that kind
    AlreadyCompressed for an output of this tool.
    """
    with _collector_paused():
        return _open(Path(path), allow_pickle, allow_quantized)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No cyclic garbage collection: it takes 40 % of the time that a large header needs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _open(path: Path, allow_pickle: bool, allow_quantized: bool) -> Checkpoint:
    shards: dict[str, Shard] = {}
    onnx: OnnxGraphFile | None = None
    try:
        if path.suffix.lower() == ONNX_SUFFIX and not path.is_dir():
            directory = os.path.realpath(path.parent)
            onnx = open_onnx(shards, directory, path.name, open_typed(path), allow_quantized)
            warnings = []
        elif path.name.endswith(INDEX_SUFFIX) and path.is_file():
            directory = os.path.realpath(path.parent)
            warnings = _open_index(shards, directory, path.name, allow_pickle)
        elif path.is_dir():
            directory = os.path.realpath(path)
            layout = find_weights(directory, str(path))
            warnings = layout.warnings
            if layout.is_onnx:
                name = layout.file or ""
                file = open_inside(directory, name)
                onnx = open_onnx(shards, directory, name, file, allow_quantized)
            else:
                warnings = warnings + _open_directory(shards, directory, layout, allow_pickle)
        else:
            directory = ""
            warnings = []
            shards[path.name] = open_shard(open_typed(path), allow_pickle)
        if not allow_quantized:
            _refuse_own_output(shards, str(path))
        checkpoint = Checkpoint(path, Path(directory) if directory else None, shards)
        checkpoint.warnings.extend(warnings)
        if onnx is not None:
            checkpoint.graph, checkpoint.graph_path = onnx.graph, onnx.path
        if onnx is not None and not path.is_dir():
            # Named alone, it has no sidecars; a config beside it says which tokenizer is meant.
            _add_config(checkpoint, directory, allow_quantized=True)
        elif directory:
            _add_config(checkpoint, directory, allow_quantized)
            _add_sidecars(checkpoint, directory)
        checkpoint._load_headers(allow_quantized)
    except BaseException as error:
        for shard in shards.values():
            shard.close()
        if isinstance(error, OSError):
            raise read_error(error, str(path)) from None
        raise
    return checkpoint


def _refuse_own_output(shards: dict[str, Shard], shown: str) -> None:
    """Raises AlreadyCompressed: read as plain weights, an output would lose its record."""
    if any(RECORD_KEY in shard.header.metadata for shard in shards.values()):
        raise AlreadyCompressed(
            f"{show(shown)}: is already compressed by this tool",
            hint="unpack it first: compress unpack OUT -o DENSE",
        )


def _open_directory(
    shards: dict[str, Shard], directory: str, layout: Layout, allow_pickle: bool
) -> list[str]:
    if layout.index is not None:
        return _open_index(shards, directory, layout.index, allow_pickle)
    name = layout.file or ""
    shards[name] = open_shard(open_inside(directory, name), allow_pickle)
    return []


def _open_index(
    shards: dict[str, Shard], directory: str, name: str, allow_pickle: bool
) -> list[str]:
    suffix = os.path.splitext(name.removesuffix(INDEX_SUFFIX))[1]
    if suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise InputError(f"{show(name)}: not an index of safetensors or PyTorch files")
    file = open_inside(directory, name)
    try:
        index = read_index(file, suffix)
    finally:
        file.close()
    warnings = check_strays(directory, index, suffix)
    for shard in index.shards:  # every name is resolved before the first, slow, torch file
        open_inside(directory, shard).close()
    for shard in index.shards:
        shards[shard] = open_shard(open_inside(directory, shard), allow_pickle)
    held = {
        shard: [entry.name for entry in opened.header.entries] + list(opened.aliases)
        for shard, opened in shards.items()
    }
    check_against_shards(index, held)
    return warnings + _size_warnings(index, shards)


def _size_warnings(index: Index, shards: dict[str, Shard]) -> list[str]:
    total = sum(entry.nbytes for shard in shards.values() for entry in shard.header.entries)
    tied = any(shard.aliases for shard in shards.values())
    if index.total_size is None or index.total_size == total or tied:
        return []
    return [f"{show(index.name)}: total_size is {index.total_size}, the tensors hold {total} bytes"]


def _add_config(checkpoint: Checkpoint, directory: str, allow_quantized: bool) -> None:
    """Read config.json where there is one."""
    if os.path.lexists(os.path.join(directory, "config.json")):
        file = open_inside(directory, "config.json")
        try:
            checkpoint.config, checkpoint.config_bytes = parse_config(
                file, allow_quantized=allow_quantized
            )
        finally:
            file.close()


def _add_sidecars(checkpoint: Checkpoint, directory: str) -> None:
    """List the files that travel with the weights, and what of them names code."""
    used = {*checkpoint._shards, "config.json"}
    found = find_sidecars(directory, used)
    checkpoint.sidecars = found.files
    checkpoint.warnings.extend(found.warnings)
    keys = code_keys(checkpoint.config) if checkpoint.config else []
    checkpoint.code_files = found.code + [f"config.json:{show(key)}" for key in keys]


def _check_range(info: TensorInfo, start: int, stop: int | None, size: int) -> int:
    stop = size if stop is None else stop
    if not 0 <= start <= stop <= size:
        raise UsageError(f"tensor '{show(info.name)}': range {start}:{stop} is outside 0:{size}")
    return stop


def _feed(digest: Any, *parts: bytes) -> None:
    """Hash parts with their lengths, so that no two lists of parts look alike."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
