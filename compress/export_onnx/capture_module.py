"""The skeleton of a user's own torch module (`--module FILE.py:FACTORY`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.checkpoint import Checkpoint, skeleton
from compress.engines.module import UserModule, load_module, output_of
from compress.errors import InputError, UsageError, show
from compress.export_onnx.exporting_module import export, optimize
from compress.export_onnx.torch_exporter import require_exporter
from compress.tensor import Array

_INNER = "inner."
_BATCH = 2  # of the example: sizes 0 and 1 are special to torch.export


def capture_module(
    spec: str,
    checkpoint: Checkpoint,
    *,
    image_shape: Sequence[int] | None = None,
    example: Array | None = None,
    raw_images: bool = False,
    opset: int = 21,
) -> Any:
    """The graph of FACTORY() of the user's file as a skeleton (ModelProto).

    spec         FILE.py:FACTORY; the file's code is run
    checkpoint   whose tensors the weights are called after
    image_shape  height, width, channels of the images that go through the file's `preprocess`
    example      or what the module is called with, [n, ...]; n is free in the graph
    raw_images   the graph takes images uint8 [n, height, width, channels] and has `preprocess` in
                 it; else it takes what `preprocess` makes
    opset        of the ai.onnx operators, from 18
    The input is called `images` or `input`, the output `logits`, their first axis `batch`.
    BatchNormalization stays a node; a layer's matrix is read by compress::Linear as [out, in].
    Raises UsageError and InputError as `load_module` does; UsageError where onnxscript is missing
    or neither shape nor example is there, InputError where torch cannot trace the module.
    """
    require_exporter()
    owner = load_module(spec, checkpoint)
    given = _example(owner, image_shape, example, raw_images)
    captured = _Captured(owner, raw_images).eval()
    with torch.no_grad():
        owner.run(owner.preprocessed(given) if raw_images else given)  # refusals are explained
        ir_model = export(
            captured,
            [given],
            spec,
            dynamic_shapes=[{0: torch.export.Dim("batch")}],
            input_names=["images" if raw_images or example is None else "input"],
            output_names=["logits"],
            opset=opset,
        )
    _check_batch(ir_model, spec)
    weights = _weights(ir_model, owner, checkpoint)
    optimize(ir_model, weights)
    return _skeleton(ir_model, set(weights.values()), spec)


class _Captured(nn.Module):
    """What is exported: one tensor in, one tensor out."""

    def __init__(self, owner: UserModule, raw_images: bool) -> None:
        super().__init__()
        self.inner = owner.inner
        self._owner = [owner]  # in a list: no second name for its weights
        self._raw_images = raw_images

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        owner = self._owner[0]
        if self._raw_images:
            given = owner.preprocessed(given)
        return output_of(self.inner(given), owner.spec)


def _example(
    owner: UserModule, image_shape: Sequence[int] | None, example: Array | None, raw_images: bool
) -> torch.Tensor:
    """What the module is traced with."""
    if image_shape is not None:
        images = np.zeros((_BATCH, *image_shape), np.uint8)
        return torch.from_numpy(images) if raw_images else owner.prepare(images)
    if example is None or raw_images or example.ndim < 1 or not len(example):
        raise UsageError(
            f"--module {show(owner.spec)}: nothing says what goes into the module",
            hint="give images or their height, width and channels",
        )
    return torch.from_numpy(np.ascontiguousarray(np.resize(example, (_BATCH, *example.shape[1:]))))


def _check_batch(ir_model: Any, spec: str) -> None:
    """Refuse (InputError) a graph that is fixed to the samples that it was traced with."""
    for value in [*ir_model.graph.inputs, *ir_model.graph.outputs]:
        if value.shape is not None and len(value.shape) and isinstance(value.shape[0], int):
            raise InputError(
                f"{show(spec)}: its {show(value.name)} is traced as {value.shape[0]} samples",
                hint="forward and preprocess may use x.shape; len(x) and int() fix a size",
            )


def _weights(ir_model: Any, owner: UserModule, checkpoint: Checkpoint) -> dict[str, str]:
    """Initializer -> the checkpoint's tensor, for those that hold the very same values."""
    state = owner.inner.state_dict()
    found: dict[str, str] = {}
    for name, value in ir_model.graph.initializers.items():
        own = name.removeprefix(_INNER)
        stored = owner.stored.get(own) if name.startswith(_INNER) else None
        if stored is None or not value.uses():
            continue
        info, values = checkpoint.info(stored), value.const_value.numpy()
        same_type = info.is_float or skeleton.TYPES.get(info.dtype) == value.dtype.value
        if (
            same_type
            and values.shape == info.shape
            and values.tobytes() == state[own].numpy().tobytes()
        ):
            found[name] = stored
    return found


def _skeleton(ir_model: Any, names: set[str], spec: str) -> Any:
    """The ModelProto, its weights marked and its matrices read by compress::Linear."""
    import onnx_ir

    model = onnx_ir.to_proto(ir_model)
    graph = model.graph
    inputs = [one for one in graph.input if one.name not in names]
    weights = {one.name: one for one in graph.input if one.name in names}
    if not weights:
        raise InputError(
            f"{show(spec)}: no tensor of the checkpoint is in the graph of the module",
            hint="its forward has to use its parameters as they are",
        )
    del graph.input[:], graph.value_info[:]
    graph.input.extend(inputs)
    for name, one in weights.items():
        kind = one.type.tensor_type
        shape = [d.dim_value for d in kind.shape.dim]
        graph.initializer.append(skeleton.weight(name, kind.elem_type, shape))
    _read_as_linear(model)
    skeleton.strip_metadata(model)
    return model


def _read_as_linear(model: Any) -> None:
    """Write products with a transposed weight as compress::Linear(x, W [out, in], bias [out]?)."""
    graph = model.graph
    sizes = {t.name: tuple(t.dims) for t in graph.initializer}
    matrices = {n for n in skeleton.weights_of(model) if len(sizes[n]) == 2}
    transposed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose"
        and node.input[0] in matrices
        and [list(a.ints) for a in node.attribute] in ([[1, 0]], [])
    }
    changed = False
    for node in graph.node:
        bias: list[str] = []
        if node.domain or node.op_type not in ("Gemm", "MatMul"):
            continue
        flags = {a.name: a.i if a.type == a.INT else a.f for a in node.attribute}
        matrix = transposed.get(node.input[1])
        if node.op_type == "Gemm":
            if flags.get("transB", 0) == 1:
                matrix = node.input[1] if node.input[1] in matrices else None
            bias = list(node.input[2:])
            plain = not flags.get("transA", 0)
            plain = plain and flags.get("alpha", 1.0) == flags.get("beta", 1.0) == 1.0
            fits = matrix and all(sizes.get(b) == (sizes[matrix][0],) for b in bias if b)
            matrix = matrix if plain and fits else None
        if matrix is not None:
            _become_linear(node, [node.input[0], matrix, *bias])
            changed = True
    if changed:
        _take_biases(graph, sizes)
        read = _readers(graph)
        kept = [n for n in graph.node if n.output[0] in read or n.output[0] not in transposed]
        del graph.node[:]
        graph.node.extend(kept)
        domain = model.opset_import.add()
        domain.domain, domain.version = skeleton.DOMAIN, 1


def _become_linear(node: Any, inputs: list[str]) -> None:
    node.op_type, node.domain = skeleton.LINEAR, skeleton.DOMAIN
    node.ClearField("overload")
    del node.input[:], node.attribute[:]
    node.input.extend(inputs)


def _take_biases(graph: Any, sizes: dict[str, tuple[int, ...]]) -> None:
    """Let a Linear without bias take the vector that is added behind it."""
    read = _readers(graph)
    makers = {node.output[0]: node for node in graph.node if node.op_type == skeleton.LINEAR}
    dropped = []
    for node in graph.node:
        if node.op_type != "Add" or node.domain:
            continue
        for value, other in (tuple(node.input), tuple(node.input)[::-1]):
            maker = makers.get(value)
            if (
                maker is not None
                and len(maker.input) == 2
                and read[value] == 1
                and sizes.get(other) == (sizes[maker.input[1]][0],)
            ):
                maker.input.append(other)
                maker.output[0] = node.output[0]
                dropped.append(node)
                break
    for node in dropped:
        graph.node.remove(node)


def _readers(graph: Any) -> dict[str, int]:
    """How often each value is read; outputs of the graph count."""
    read: dict[str, int] = {}
    names = [name for node in graph.node for name in node.input]
    for attribute in (a for node in graph.node for a in node.attribute):
        for inner in [attribute.g, *attribute.graphs]:
            names += [name for node in inner.node for name in node.input]
    for name in [*names, *(one.name for one in graph.output)]:
        read[name] = read.get(name, 0) + 1
    return read
