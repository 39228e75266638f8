"""Static 8-bit activations: QuantizeLinear and DequantizeLinear around Convs of int8 weights.

onnxruntime turns DequantizeLinear -> Conv -> QuantizeLinear into QLinearConv, which multiplies
integers, and an Add between three of them into QLinearAdd (Jacob et al. 2018, section 2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.errors import show
from compress.export_onnx.activation_ranges import Bounds, Ranges, collect_ranges
from compress.export_onnx.graph_index import (
    GraphIndex,
    Read,
    attributes,
    floats,
    is_op,
    without_unread,
)

__all__ = ["Bounds", "Ranges", "collect_ranges", "quantizable", "with_static_activations"]

# x86 processors without VNNI add products of uint8 and int8 codes two by two in 16 bits. 2 * 127 *
# 127 fits, 255 does not: there onnxruntime's sums would saturate. uint8 by uint8 is added in 32
# bits, which takes longer.
INPUT_CODES = 127
_Reasons = dict[str, list[str]]  # why Convs stay float -> their outputs
_INT8, _UINT8, _FLOAT = 3, 2, 1  # TensorProto.DataType
_MOST = 1 << 30  # of a bias: as much is left for the sum of products
_COARSE = 1 << 23  # a bias of this many steps keeps float32's precision
# Operators whose output has the values of their input, so that one range does for both.
_SAME_RANGE = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity")


@dataclass(frozen=True)
class _Layer:
    """A Conv whose kernel is a DequantizeLinear of int8 codes by output channel.

    value   its input
    result  what is rounded behind it: its output, or that of the Relu or Clip that follows
    bias    None where it has none
    """

    node: Any
    kernel: Any
    codes: Any
    scale: Any
    bias: Any | None
    value: str
    result: str

    @property
    def values(self) -> tuple[str, str, str]:
        """What may be rounded."""
        return self.value, self.node.output[0], self.result


def quantizable(model: Any, *, input_codes: int = INPUT_CODES) -> dict[str, int]:
    """The float values whose ranges `with_static_activations` asks for, in the graph's order.

    input_codes  the highest code of what a Conv of int8 codes reads; other values, and those that
                 Convs of uint8 codes read, have codes up to 255
    """
    index = GraphIndex(model)
    layers = list(_layers(index, {}))
    found = dict.fromkeys((v for one in layers for v in one.values), 255)
    for layer in (one for one in layers if one.codes.data_type == _INT8):
        value = layer.value
        found[value] = input_codes
        while (source := _same_range(index, value)) in found:
            value = source
            found[value] = input_codes
    return found


def with_static_activations(model: Any, ranges: Ranges, read: Read) -> tuple[Any, list[str]]:
    """A copy of a runnable model in which Convs of int8 weights take and give uint8 activations.

    model   fold its BatchNormalizations first (`fold_batch_norms`): a Conv before one gives float
    ranges  of the values that `quantizable` names
    read    the values of an initializer, for zero points, scales and biases
    A bias becomes int32 of scale (input's scale * kernel's scale), rounded to nearest. The codes of
    the kernels are left as they are. The second result names what stays float, and why. The copy
    is the same as the model where nothing can be done.
    """
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    floats_for: _Reasons = {}
    work = _Rewriting(made, ranges, read, floats_for)
    for layer in _layers(work.index, floats_for):
        work.take(layer)
    if work.write():
        without_unread(made)
    return made, [_note(why, names) for why, names in floats_for.items()]


def _note(why: str, names: list[str]) -> str:
    if len(names) == 1:
        return f"{show(names[0])} stays float: {why}"
    return f"{len(names)} convolutions stay float, {show(names[0])} the first: {why}"


def _layers(index: GraphIndex, floats_for: _Reasons) -> Iterator[_Layer]:
    """The Convs that can be treated; why the others with codes cannot."""
    for node in index.nodes:
        kernel = index.maker(node.input[1]) if is_op(node, "Conv") else None
        if not is_op(kernel, "DequantizeLinear", "Reshape", "Cast"):
            continue
        found = _layer(index, node, kernel)
        if isinstance(found, str):
            floats_for.setdefault(found, []).append(node.output[0])
        else:
            yield found


def _layer(index: GraphIndex, node: Any, kernel: Any) -> _Layer | str:
    """The layer, or why it is none."""
    if not is_op(kernel, "DequantizeLinear"):
        return f"its kernel comes from {show(kernel.op_type)}, not from int8 codes by channel"
    given_codes, scale = index.constant(kernel.input[0]), index.constant(kernel.input[1])
    if given_codes is None or scale is None or given_codes[0].data_type not in (_INT8, _UINT8):
        return "its kernel is not 8-bit codes"
    codes = given_codes[0]
    if not scale[1] and scale[0].data_type != _FLOAT:
        return "it is not float32"
    given = attributes(kernel)
    by_channel = list(scale[0].dims) == [codes.dims[0]] and given.get("axis", 1) == 0
    if given.get("block_size", 0) or not by_channel:
        return "its kernel has no scale by output channel"
    bias = None
    if len(node.input) > 2 and node.input[2]:
        found = index.constant(node.input[2])
        if found is None:
            return "its bias is computed"
        bias = found[0]
    if index.constant(node.input[0]) is not None:
        return "its input is constant"
    reader = index.only_reader(node.output[0])
    if is_op(reader, "BatchNormalization"):
        return "a BatchNormalization follows"
    result = reader.output[0] if _limits(index, reader) else node.output[0]
    return _Layer(node, kernel, codes, scale[0], bias, node.input[0], result)


def _limits(index: GraphIndex, node: Any) -> bool:
    """Whether a node is a Relu, or a Clip from 0."""
    if is_op(node, "Relu"):
        return True
    if not is_op(node, "Clip") or len(node.input) < 2:
        return False
    low = index.constant(node.input[1])
    return low is not None and low[0].data_location == 0 and not np.any(_inline(low[0]))


def _same_range(index: GraphIndex, value: str) -> str:
    """What a value was made of by an operator that makes no new numbers, or an empty string."""
    maker = index.maker(value)
    return str(maker.input[0]) if is_op(maker, *_SAME_RANGE) else ""


def _inline(tensor: Any) -> Any:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


class _Rewriting:
    """Collects what is quantized, then writes the nodes anew in their order."""

    def __init__(self, model: Any, ranges: Ranges, read: Read, floats_for: _Reasons) -> None:
        self.model, self.ranges, self.read, self.floats_for = model, ranges, read, floats_for
        self.index = GraphIndex(model)
        self._affine: dict[str, tuple[float, int]] = {}  # of the values that get codes
        self._before: dict[str, list[Any]] = {}  # first output of a Conv -> nodes before it

    def take(self, layer: _Layer) -> None:
        """Quantize a layer, or note why it stays as it is."""
        result = layer.result
        maker = self.index.makers[result]
        seen = self.ranges.bounds.get(result)
        if is_op(maker, "Clip") and seen is not None and seen.highest < 255:
            result = layer.node.output[0]  # codes above `highest` would pass the Clip
        known = [self._parameters(layer.value), self._parameters(result)]
        if problem := self._problem(layer, known):
            self.floats_for.setdefault(problem, []).append(layer.node.output[0])
            return
        for value, parameters in zip((layer.value, result), known, strict=True):
            if parameters is not None:
                self._affine[value] = parameters

    def _problem(self, layer: _Layer, known: list[tuple[float, int] | None]) -> str | None:
        """Why a layer stays float; else its kernel and bias are set."""
        if known[0] is None or known[1] is None:
            return "calibration saw nothing there but zeros"
        zero = 128 if layer.codes.data_type == _UINT8 else 0
        points = np.zeros(1)
        if len(layer.kernel.input) > 2 and layer.kernel.input[2]:
            constant = self.index.constant(layer.kernel.input[2])
            points = np.full(1, -1) if constant is None else np.asarray(self.read(constant[0]))
        if np.any(points != zero):
            return "its codes have zero points"
        if layer.bias is None:
            return None
        scales = floats(self.read, layer.scale)
        bias = floats(self.read, layer.bias).astype(np.float64)
        step = np.float32(known[0][0]) * scales
        with np.errstate(divide="ignore", invalid="ignore"):
            rounded = np.rint(bias / step.astype(np.float64))
        rounded[(bias == 0) & (step == 0)] = 0
        over = ~(np.abs(rounded) <= _MOST)
        if over.any():
            rows = np.asarray(self.read(layer.codes)).reshape(len(scales), -1)
            if np.any(rows[over] != zero):
                return f"the bias of {int(over.sum())} channels does not fit int32"
            step[over] = np.maximum(np.abs(bias[over]) / _COARSE, 2.0**-126).astype(np.float32)
            scales[over] = step[over] / np.float32(known[0][0])  # of zeros: any scale does
            rounded[over] = np.rint(bias[over] / step[over].astype(np.float64))
        self._set_bias(layer, rounded.astype(np.int32), step, scales if over.any() else None)
        return None

    def _set_bias(self, layer: _Layer, codes: Any, step: Any, scales: Any | None) -> None:
        """Put the bias behind a DequantizeLinear, and the kernel behind new scales if any."""
        from onnx import helper

        node, name = layer.node, layer.node.input[1]
        before = self._before.setdefault(node.output[0], [])
        inputs = [self._added(f"{name}/bias_codes", codes), self._added(f"{name}/bias_scale", step)]
        node.input[2] = self.index.free(f"{name}/int32_bias")
        before.append(helper.make_node("DequantizeLinear", inputs, [node.input[2]], axis=0))
        if scales is not None:
            kernel = type(layer.kernel)()
            kernel.CopyFrom(layer.kernel)
            kernel.input[1] = self._added(f"{name}/live_scale", scales)
            node.input[1] = kernel.output[0] = self.index.free(f"{name}/live")
            before.append(kernel)

    def _parameters(self, value: str) -> tuple[float, int] | None:
        """(scale, zero point) of a value, or None where calibration says nothing."""
        if value in self._affine:
            return self._affine[value]
        if (source := _same_range(self.index, value)) in self._affine:
            return self._affine[source]  # so that what is between can work on codes
        bounds = self.ranges.bounds.get(value)
        return bounds.affine() if bounds is not None and bounds.high > bounds.low else None

    def write(self) -> bool:
        """Write the nodes with codes around the values that were taken; whether there are any."""
        if not self._affine:
            return False
        renamed: dict[str, str] = {}
        written: list[Any] = []
        for value in self.index.inputs:
            if value in self._affine:
                renamed[value] = self.index.free(f"{value}/rounded")
                written += self._pair(value, value, renamed[value])
        for node in self.index.nodes:
            for place, name in enumerate(node.input):
                node.input[place] = renamed.get(name, name)
            written += self._before.get(node.output[0], []) if node.output else []
            taken = [name for name in node.output if name in self._affine]
            if taken and _limits(self.index, node) and self._is_rounding(node, taken[0]):
                written += self._pair(taken[0], node.input[0], taken[0])
                continue
            written.append(node)
            for place, name in enumerate(node.output):
                if name in self._affine:
                    node.output[place] = self.index.free(f"{name}/float")
                    written += self._pair(name, node.output[place], name)
        del self.model.graph.node[:]
        self.model.graph.node.extend(written)
        return True

    def _is_rounding(self, node: Any, value: str) -> bool:
        """Whether codes without a sign, which saturate, do what a Relu or Clip does."""
        scale, zero = self._affine[value]
        if zero != 0:
            return False
        if is_op(node, "Relu"):
            return True
        if len(node.input) < 3 or not node.input[2]:
            return True
        top = self.index.constant(node.input[2])
        if top is None or top[0].data_location != 0:
            return False
        return float(_inline(top[0])) >= 254.5 * scale

    def _pair(self, value: str, source: str, target: str) -> list[Any]:
        """QuantizeLinear of `source` and DequantizeLinear to `target` with what `value` has."""
        from onnx import helper

        scale, zero = self._affine[value]
        constants = [
            self._added(f"{value}/scale", np.float32(scale)),
            self._added(f"{value}/zero_point", np.uint8(zero)),
        ]
        codes = self.index.free(f"{value}/codes")
        return [
            helper.make_node("QuantizeLinear", [source, *constants], [codes]),
            helper.make_node("DequantizeLinear", [codes, *constants], [target]),
        ]

    def _added(self, name: str, values: Any) -> str:
        """The name of a new initializer."""
        from onnx import numpy_helper

        name = self.index.free(name)
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name
