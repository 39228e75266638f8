"""An .onnx file as a checkpoint: its initializers as tensors, its graph as a skeleton.

The wire format is walked first (`onnx_wire.py`), so that weights are never loaded to open a file.
The package onnx parses what remains, which is checked (`onnx_checks.py`) before any of it is used.
Tensors lie in the file itself, in files beside it, or, where they were typed fields of the message,
in an unnamed temporary file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from compress.checkpoint import skeleton
from compress.checkpoint.files import InputFile, open_typed
from compress.checkpoint.onnx_checks import check_model, refuse_coded
from compress.checkpoint.onnx_direct import read_directly
from compress.checkpoint.onnx_tensors import (
    External,
    bad,
    check_inline,
    copy_typed,
    needed_bytes,
    typed_field,
    wrong_size,
)
from compress.checkpoint.onnx_uses import Weight, weights_of_graph
from compress.checkpoint.onnx_wire import DOUBLES, FLOATS, RAW, SMALL, Scan, Scanned, Span
from compress.checkpoint.skeleton_checks import check_lowerable
from compress.errors import InputError, ResourceError, UsageError, show
from compress.tensor import FLOAT_TAGS, Role, TensorInfo

_EXTERNAL = 1  # TensorProto.DataLocation
_INLINE = 1024  # integers up to this many bytes stay in the skeleton: shapes, axes, indices
_LEAST_IR = 4  # the first whose initializers need not be inputs


@dataclass(frozen=True)
class Placed:
    """A tensor and the file that its data is read from."""

    info: TensorInfo
    data: InputFile
    offset: int


@dataclass
class OnnxFile:
    """What an .onnx file holds.

    graph     the skeleton, serialized
    tensors   in the order of the initializers
    external  files beside it by relative path; `spill` is the temporary one
    """

    graph: bytes = b""
    tensors: list[Placed] = field(default_factory=list)
    external: dict[str, InputFile] = field(default_factory=dict)
    spill: InputFile | None = None
    warnings: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Close all files but the .onnx file itself."""
        for file in self.external.values():
            file.close()
        if self.spill is not None:
            self.spill.close()


def read_onnx(file: InputFile, directory: str, *, allow_quantized: bool = False) -> OnnxFile:
    """Read an open .onnx file; no large tensor is touched.

    directory        the real path of the folder that it lies in
    allow_quantized  take graphs whose weights are codes already
    Raises InputError for malformed content, ResourceError where no temporary file can be written,
    UsageError where the package onnx is missing.
    """
    return _read(file, directory, allow_quantized=allow_quantized, only_check=False)


def check_onnx(path: Path) -> None:
    """Check a file that onnxruntime will run, codes and all; its tensors may share bytes.

    onnxruntime itself takes a hard link to a file elsewhere, the .onnx file as its own data, and
    two initializers with one name. Raises as `read_onnx` does, UsageError where nothing is there.
    """
    file = open_typed(path)
    try:
        directory = os.path.realpath(path.parent)
        _read(file, directory, allow_quantized=True, only_check=True).close()
    finally:
        file.close()


def _read(file: InputFile, directory: str, *, allow_quantized: bool, only_check: bool) -> OnnxFile:
    where = show(file.name)
    scan = Scan(file, only_check=only_check)
    reader = _Reader(file, External(file, directory), only_check=only_check)
    try:
        model = parse(scan.model, where)
        check_model(model, where)
        if not only_check:
            check_lowerable(model, where)
        if not allow_quantized:
            refuse_coded(model, where)
        return reader.read(model, scan.initializers)
    except BaseException:
        reader.result.close()
        raise


def parse(raw: bytes, where: str) -> Any:
    """The ModelProto that `raw` holds. Raises InputError, UsageError without the package onnx."""
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageError(
            "reading .onnx files needs the packages onnx and onnxruntime",
            hint="install them: pip install onnx onnxruntime",
        ) from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(raw)
    except DecodeError:
        raise InputError(
            f"{where}: no ONNX model: damaged, something else, or nested too deep",
            hint="download or export the file again",
        ) from None
    return model


class _Reader:
    def __init__(self, file: InputFile, external: External, *, only_check: bool) -> None:
        self._file, self._where = file, show(file.name)
        self._external, self._only_check = external, only_check
        self._spilled: IO[bytes] | None = None
        self._moved: list[tuple[int, TensorInfo, int]] = []
        self.result = OnnxFile(external=external.files)

    def read(self, model: Any, found: list[Scanned]) -> OnnxFile:
        """Place every tensor, then turn the model into the skeleton."""
        weights = weights_of_graph(model)
        result = self.result
        try:
            for number, (tensor, scanned) in enumerate(
                zip(model.graph.initializer, found, strict=True)
            ):
                self._tensor(number, tensor, scanned, weights[tensor.name])
            if self._spilled is not None:
                self._spilled.flush()
                result.spill = InputFile(os.dup(self._spilled.fileno()), self._file.name)
        except OSError as error:
            raise self._no_room(error) from None
        finally:
            if self._spilled is not None:
                self._spilled.close()
        if not self._only_check:
            self._external.check_overlaps()
        for place, info, offset in self._moved:
            if result.spill is not None:
                result.tensors.insert(place, Placed(info, result.spill, offset))
        self._skeleton(model, weights)
        return result

    def _tensor(self, number: int, tensor: Any, scanned: Scanned, weight: Weight) -> None:
        """Find one initializer's data and check that it is all there."""
        name, where = tensor.name, self._where
        needed = needed_bytes(where, name, tensor.data_type, list(tensor.dims))
        tag = skeleton.TAGS.get(tensor.data_type)
        if tag is None:
            self._other(tensor, scanned, needed)
            return
        if tensor.HasField("segment"):
            raise bad(where, name, "one segment of a tensor, which nothing writes any more")
        if len(scanned.data) + (tensor.data_location == _EXTERNAL) > 1:
            raise bad(where, name, "its data is given twice")
        is_float = tag in FLOAT_TAGS and len(tensor.dims) > 0
        role = weight.role if is_float else Role.STATE
        shape = tuple(int(n) for n in tensor.dims)

        def info(file: str, offset: int) -> TensorInfo:
            return TensorInfo(name, file, tag, shape, needed, offset, role)

        if tensor.data_location == _EXTERNAL:
            location, offset = self._external.place(tensor, needed)
            data = self._external.files[location]
            self.result.tensors.append(Placed(info(location, offset), data, offset))
            return
        if len(tensor.external_data):
            raise bad(where, name, "names another file, but its data is not external")
        span = self._span(tensor, scanned, needed)
        if span is not None:
            self.result.tensors.append(
                Placed(info(self._file.name, span.offset), self._file, span.offset)
            )
            return
        if self._spilled is None:
            # Unnamed: nothing is left behind, however this process ends.
            self._spilled = tempfile.TemporaryFile()  # noqa: SIM115
        start = self._spilled.tell()
        copy_typed(self._file, scanned, needed, self._spilled)
        self._moved.append(
            (len(self.result.tensors) + len(self._moved), info(self._file.name, -1), start)
        )

    def _other(self, tensor: Any, scanned: Scanned, needed: int) -> None:
        """Check an initializer of a type that a checkpoint cannot hold; it stays in the graph."""
        where, name = self._where, tensor.name
        if tensor.data_location == _EXTERNAL and self._only_check:
            self._external.place(tensor, needed)
        elif tensor.data_location:
            raise bad(
                where, name, f"ONNX data type {tensor.data_type} in another file, which a"
                " checkpoint cannot hold", "use the model before it was quantized",
            )  # fmt: skip
        elif self._only_check and scanned.data_bytes > SMALL:
            pieces = scanned.data.get(RAW, [])
            if len(scanned.data) == 1 and len(pieces) == 1 and scanned.data_bytes != needed:
                raise wrong_size(where, name, scanned.data_bytes, needed)
        else:
            check_inline(tensor, where)

    def _span(self, tensor: Any, scanned: Scanned, needed: int) -> Span | None:
        """Where the file itself holds the bytes as they are wanted; None for typed fields."""
        if not scanned.data:
            if needed:
                raise wrong_size(self._where, tensor.name, 0, needed)
            return Span(0, 0)
        ((number, pieces),) = scanned.data.items()
        direct = number == RAW or (
            number in (FLOATS, DOUBLES) and number == typed_field(tensor.data_type)
        )
        if not direct or len(pieces) != 1 or not isinstance(pieces[0], Span):
            return None
        if pieces[0].length != needed:
            raise wrong_size(self._where, tensor.name, pieces[0].length, needed)
        return pieces[0]

    def _skeleton(self, model: Any, weights: Mapping[str, Weight]) -> None:
        """Mark the weights, drop what only exporters need, and serialize."""
        placed = {one.info.name: one for one in self.result.tensors}
        for tensor in model.graph.initializer:
            one = placed.get(tensor.name)
            if one is None:
                continue
            is_matrix = one.info.dtype in FLOAT_TAGS and bool(one.info.shape)
            if is_matrix or one.info.nbytes > _INLINE:
                skeleton.mark(tensor)
            elif tensor.data_location:
                _inline(tensor, one.data.read(one.offset, one.info.nbytes))
        self._fix_inputs(model, set(placed))
        read_directly(model, {n: w for n, w in weights.items() if n in placed})
        skeleton.strip_metadata(model)
        self.result.graph = model.SerializeToString(deterministic=True)

    def _fix_inputs(self, model: Any, names: set[str]) -> None:
        """Initializers that are inputs as well (all of them before IR 4) are constants here."""
        inputs = list(model.graph.input)
        kept = [value for value in inputs if value.name not in names]
        if len(kept) == len(inputs):
            return
        if model.ir_version < _LEAST_IR:
            model.ir_version = _LEAST_IR
        else:
            defaults = [show(value.name) for value in inputs if value.name in names]
            self.result.warnings.append(
                f"{self._where}: inputs with a default are constants in the output:"
                f" {', '.join(defaults[:5])}{' and more' if defaults[5:] else ''}"
            )
        del model.graph.input[:]
        model.graph.input.extend(kept)

    def _no_room(self, error: OSError) -> ResourceError:
        return ResourceError(
            f"{self._where}: no temporary file for its tensors: {error.strerror}",
            hint="point TMPDIR at a disk with room for the whole model",
        )


def _inline(tensor: Any, data: bytes) -> None:
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = data
