"""An .onnx file: which of its weights read which inputs, and the graph that shows those inputs.

Weights are initializers that a MatMul or Gemm has on its right, or a Conv as its kernel. The file
is not to be trusted: data outside of it must lie in its folder, and only operators that onnxruntime
brings are run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint import Checkpoint
from compress.checkpoint.config import parse_config
from compress.checkpoint.files import open_inside, resolve_inside
from compress.errors import InputError, ResourceError, UsageError, show
from compress.tensor import DTYPES, Array, Role, TensorInfo

# TensorProto.DataType -> safetensors tag
_TAGS = {
    1: "F32", 2: "U8", 3: "I8", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64",
    12: "U32", 13: "U64", 16: "BF16",
}  # fmt: skip
_MAX_BYTES = (1 << 31) - 1  # of a protobuf message


@dataclass(frozen=True)
class Geometry:
    """How a Conv takes patches: sizes by axis; `pads` are (before, behind) by axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    groups: int
    auto: str = "NOTSET"  # else SAME_UPPER or SAME_LOWER, which depend on the input's size

    def padding(self, size: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """(before, behind) by axis for an input of this size."""
        if self.auto == "NOTSET":
            return self.pads
        found = []
        for length, kernel, stride, gap in zip(
            size, self.kernel, self.strides, self.dilations, strict=True
        ):
            reach = gap * (kernel - 1) + 1
            whole = max(0, (math.ceil(length / stride) - 1) * stride + reach - length)
            less, more = whole // 2, whole - whole // 2
            found.append((less, more) if self.auto == "SAME_UPPER" else (more, less))
        return tuple(found)


@dataclass(frozen=True)
class Use:
    """An input of a weight: the value's name, and the patches that are taken of it.

    transposed  a Gemm that reads its input [columns, n]
    """

    value: str
    geometry: Geometry | None = None
    transposed: bool = False


class OnnxGraph:
    """A parsed .onnx file.

    uses     inputs by weight, in the order of the nodes
    infos    its initializers as tensors, with roles
    Raises InputError for what is no ONNX, and for data that lies elsewhere.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = os.path.realpath(path.parent)
        self.raw = _read(self.folder, path.name)
        self.model = _parse(self.raw, path)
        self._check_data()
        graph = self.model.graph
        self._initializers = {i.name: i for i in graph.initializer}
        self.uses: dict[str, list[Use]] = {}
        self._transposed: set[str] = set()
        for node in graph.node:
            self._note(node)
        self.infos = [self._info(i) for i in graph.initializer if i.data_type in _TAGS]

    def exposed(self, values: list[str]) -> bytes:
        """The graph with these values as further outputs. Raises ResourceError."""
        from onnx import ModelProto, ValueInfoProto

        model = ModelProto()
        model.CopyFrom(self.model)
        present = {output.name for output in model.graph.output}
        model.graph.output.extend(ValueInfoProto(name=v) for v in values if v not in present)
        if model.ByteSize() > _MAX_BYTES:
            raise ResourceError(f"{show(str(self.path))}: the graph does not fit 2 GB")
        return bytes(model.SerializeToString())

    def _note(self, node: Any) -> None:
        """Note a node's weight and where its input comes from."""
        if node.domain not in ("", "ai.onnx") or len(node.input) < 2:
            return
        value, weight = node.input[0], node.input[1]
        tensor = self._initializers.get(weight)
        if tensor is None or value in self._initializers:
            return
        attributes = {a.name: a for a in node.attribute}
        if node.op_type == "MatMul" and len(tensor.dims) == 2:
            use, is_transposed = Use(value), True
        elif node.op_type == "Gemm":
            use = Use(value, transposed=_integer(attributes, "transA", 0) == 1)
            is_transposed = _integer(attributes, "transB", 0) == 0
        elif node.op_type == "Conv" and len(tensor.dims) >= 3:
            use, is_transposed = Use(value, _geometry(attributes, tuple(tensor.dims))), False
        else:
            return
        self.uses.setdefault(weight, []).append(use)
        if is_transposed:
            self._transposed.add(weight)

    def _info(self, tensor: Any) -> TensorInfo:
        role = Role.UNCLEAR
        if tensor.name in self.uses:
            role = Role.CONV if len(tensor.dims) >= 3 else Role.LINEAR
            role = Role.CONV1D if tensor.name in self._transposed else role
        elif len(tensor.dims) == 1:
            role = Role.STATE
        tag = _TAGS[tensor.data_type]
        shape = tuple(int(n) for n in tensor.dims)
        nbytes = math.prod(shape) * DTYPES[tag].itemsize
        return TensorInfo(tensor.name, self.path.name, tag, shape, nbytes, -1, role)

    def _check_data(self) -> None:
        """Refuse (InputError) tensors whose data lies outside of the file's folder."""
        for tensor in _tensors(self.model.graph):
            if tensor.data_location != 1:  # EXTERNAL
                continue
            entries = {e.key: e.value for e in tensor.external_data}
            location = entries.get("location", "")
            if not location or os.path.isabs(location):
                raise InputError(
                    f"{show(str(self.path))}: tensor {show(tensor.name)}: its data is said to be in"
                    f" {show(location) or 'no file'}",
                    hint="data of an .onnx file lies beside it",
                )
            resolve_inside(self.folder, location)


class OnnxWeights(Checkpoint):
    """The weights of an .onnx file as far as calibration needs them: names, shapes and roles.

    Fingerprint and `sample_hash` are the SHA-256 of the file; values are not read.
    """

    def __init__(self, path: Path) -> None:
        from hashlib import sha256

        folder = Path(os.path.realpath(path.parent))
        super().__init__(path, folder, {})
        self.graph = OnnxGraph(path)
        self._infos = list(self.graph.infos)
        self._digest = sha256(self.graph.raw).hexdigest()
        if os.path.lexists(folder / "config.json"):
            file = open_inside(str(folder), "config.json")
            try:
                self.config, self.config_bytes = parse_config(file, allow_quantized=True)
            finally:
                file.close()

    def info(self, name: str) -> TensorInfo:
        """The initializer called `name`. Raises UsageError if there is none."""
        found = next((info for info in self._infos if info.name == name), None)
        if found is None:
            raise UsageError(f"{show(str(self.path))}: no initializer {show(name)}")
        return found

    def read(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Array:
        """Not of an .onnx file. Raises UsageError."""
        raise UsageError(
            f"{show(str(self.path))}: an .onnx file is calibrated and evaluated, not compressed",
            hint="compress the checkpoint that it was exported from",
        )

    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return self._digest

    def sample_hash(self) -> str:
        """The same."""
        return self._digest


def _read(folder: str, name: str) -> bytes:
    file = open_inside(folder, name)
    try:
        return file.read_all(_MAX_BYTES)
    finally:
        file.close()


def _parse(raw: bytes, path: Path) -> Any:
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
    except DecodeError as error:
        raise InputError(
            f"{show(str(path))}: no ONNX model", hint="the file is damaged, or something else"
        ) from error
    if not model.graph.node:
        raise InputError(f"{show(str(path))}: a graph without nodes")
    return model


def _tensors(graph: Any) -> Iterator[Any]:
    """Every tensor of a graph and of the graphs inside its nodes."""
    pending = [graph]
    while pending:
        one = pending.pop()
        yield from one.initializer
        for node in one.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                pending.extend(attribute.graphs)


def _integer(attributes: dict[str, Any], name: str, default: int) -> int:
    return int(attributes[name].i) if name in attributes else default


def _geometry(attributes: dict[str, Any], shape: tuple[int, ...]) -> Geometry:
    axes = len(shape) - 2

    def numbers(name: str, default: int, count: int) -> tuple[int, ...]:
        found = tuple(int(n) for n in attributes[name].ints) if name in attributes else ()
        return found if len(found) == count else (default,) * count

    pads = numbers("pads", 0, 2 * axes)
    auto = attributes["auto_pad"].s.decode() if "auto_pad" in attributes else "NOTSET"
    if auto not in ("NOTSET", "SAME_UPPER", "SAME_LOWER"):  # VALID
        auto, pads = "NOTSET", (0,) * (2 * axes)
    return Geometry(
        kernel=shape[2:],
        strides=numbers("strides", 1, axes),
        dilations=numbers("dilations", 1, axes),
        pads=tuple((pads[a], pads[a + axes]) for a in range(axes)),
        groups=_integer(attributes, "group", 1),
        auto=auto,
    )
