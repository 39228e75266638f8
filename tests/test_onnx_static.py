"""Static 8-bit activations: the integers onnxruntime multiplies, against the float graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lowered import with_int8_kernels

from compress.errors import InputError, UsageError
from compress.export_onnx.activation_ranges import Bounds
from compress.export_onnx.batch_norm import fold_batch_norms
from compress.export_onnx.graph_index import GraphIndex, reader_of
from compress.export_onnx.static_activations import (
    Ranges,
    collect_ranges,
    quantizable,
    with_static_activations,
)

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
pytestmark = pytest.mark.usefixtures("one_thread")

READ = reader_of("")
X = np.random.default_rng(0).standard_normal((24, 4, 10, 10)).astype(np.float32)
FEEDS = [{"x": X[:10]}, {"x": X[10:16]}]  # the other eight are not calibrated on
node = helper.make_node


def graph(nodes: list[Any], weights: dict[str, Any], *outputs: str, axes: int = 4) -> Any:
    """A model from `x` [n, 4, 10, 10] to the outputs, which have so many axes."""
    made = [helper.make_tensor_value_info(o, 1, [None] * axes) for o in outputs or ("y",)]
    inputs = [helper.make_tensor_value_info("x", 1, ["n", 4, 10, 10])]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    whole = helper.make_graph(nodes, "g", inputs, made, tensors)
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def norm(seed: int, channels: int) -> list[np.ndarray]:
    """weight (of both signs), bias, mean, variance."""
    return [*(drawn(seed + i, channels) for i in range(3)), drawn(seed + 3, channels) ** 2 + 0.2]


@pytest.fixture(scope="module")
def network() -> Any:
    """Conv, Relu, pool; depthwise and BatchNormalization, Clip; a residual; a head."""
    weights = {
        "w0": drawn(1, 8, 4, 3, 3) / 4, "b0": drawn(2, 8), "w1": drawn(3, 8, 1, 3, 3) / 2,
        "w2": drawn(4, 8, 8, 3, 3) / 6, "w3": drawn(5, 8, 4, 1, 1) / 2, "b3": drawn(6, 8),
        "w4": drawn(7, 8, 5) / 3, "zero": np.float32(0), "six": np.float32(6),
    }  # fmt: skip
    weights |= {f"n1.{i}": v for i, v in enumerate(norm(20, 8))}
    weights |= {f"n2.{i}": v for i, v in enumerate(norm(30, 8))}
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1] * 4),
        node("Relu", ["c0"], ["r0"]),
        node("MaxPool", ["r0"], ["p0"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p0", "w1"], ["c1"], pads=[1] * 4, group=8),
        node("BatchNormalization", ["c1", *(f"n1.{i}" for i in range(4))], ["a1"]),
        node("Clip", ["a1", "zero", "six"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"], pads=[1] * 4),
        node("BatchNormalization", ["c2", *(f"n2.{i}" for i in range(4))], ["a2"], epsilon=1e-3),
        node("Add", ["a2", "p0"], ["s2"]),
        node("Relu", ["s2"], ["r2"]),
        node("Conv", ["r2", "w3", "b3"], ["c3"], group=2),
        node("GlobalAveragePool", ["c3"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "w4"], ["y"]),
    ]
    return graph(nodes, weights, axes=2)


def ran(model: Any, folder: Path | None = None, *, plain: bool = False) -> tuple[Any, Counter[str]]:
    """(outputs for X, operators of the graph that ran); plain: nothing is fused."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder is not None:
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    made = session.run(None, {"x": X})[0]
    operators = Counter[str]()
    if folder is not None:
        operators.update(n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node)
    return made, operators


def static(model: Any, tmp_path: Path, **more: Any) -> tuple[Any, list[str]]:
    values = quantizable(model, **more)
    ranges = collect_ranges(model.SerializeToString(), FEEDS, values, tmp_path)
    return with_static_activations(model, ranges, READ)


def error(made: Any, wanted: Any) -> float:
    return float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("form", [{}, {"half": False}, {"offset": True}, {"aliased": True}])
def test_every_conv_multiplies_integers(
    network: Any, tmp_path: Path, form: dict[str, bool]
) -> None:
    lowered = fold_batch_norms(with_int8_kernels(network, **form), READ)
    made, notes = static(lowered, tmp_path)
    assert notes == []
    values, operators = ran(made, tmp_path)
    assert operators["QLinearConv"] == 4
    assert not operators["Conv"] and not operators["BatchNormalization"]
    assert operators["QLinearAdd"] == 1 and not operators["Relu"]
    assert error(values, ran(lowered)[0]) < 0.05
    unfused = ran(made, plain=True)[0]
    # the same integers, but for products that fall on the border of two codes
    assert error(values, unfused) < 0.01


def test_a_batch_norm_goes_into_the_scales_and_the_codes_stay(network: Any) -> None:
    lowered = with_int8_kernels(network)
    made = fold_batch_norms(lowered, READ)
    assert [n.op_type for n in made.graph.node].count("BatchNormalization") == 0
    before, after = ran(lowered, plain=True)[0], ran(made, plain=True)[0]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    codes = {t.name: t.raw_data for t in lowered.graph.initializer if t.data_type == 3}
    assert codes == {t.name: t.raw_data for t in made.graph.initializer if t.data_type == 3}
    scale = GraphIndex(made).constants["w1.kernel/scale"]
    assert np.any(numpy_helper.to_array(scale) < 0)  # where the gain is negative


def test_batch_norms_of_other_convs_stay(network: Any) -> None:
    assert fold_batch_norms(network, READ) == network  # float kernels: onnxruntime folds those
    lowered = with_int8_kernels(network)
    lowered.graph.output.append(helper.make_tensor_value_info("c1", 1, None))
    made = fold_batch_norms(lowered, READ)
    assert [n.input[0] for n in made.graph.node if n.op_type == "BatchNormalization"] == ["c1"]
    _, notes = with_static_activations(lowered, Ranges({}), READ)
    assert notes == [
        "3 convolutions stay float, c0 the first: calibration saw nothing there but zeros",
        "c2 stays float: a BatchNormalization follows",
    ]


def test_biases_are_rounded_to_the_nearest_step(network: Any, tmp_path: Path) -> None:
    lowered = fold_batch_norms(with_int8_kernels(network, half=False), READ)
    made, _ = static(lowered, tmp_path)
    before, after = GraphIndex(lowered), GraphIndex(made)
    seen = 0
    for conv in (n for n in after.nodes if n.op_type == "Conv"):
        step = numpy_helper.to_array(after.constants[f"{conv.input[1]}/bias_scale"])
        codes = numpy_helper.to_array(after.constants[f"{conv.input[1]}/bias_codes"])
        old = next(n for n in before.nodes if n.op_type == "Conv" and n.input[1] == conv.input[1])
        bias = numpy_helper.to_array(before.constants[old.input[2]])
        x = after.makers[conv.input[0]]
        scale = numpy_helper.to_array(after.constants[after.makers[conv.input[1]].input[1]])
        np.testing.assert_array_equal(
            step, numpy_helper.to_array(after.constants[x.input[1]]) * scale
        )
        assert codes.dtype == np.int32
        assert np.all(np.abs(codes * step.astype("f8") - bias) <= np.abs(step) * 0.5000001)
        seen += 1
    assert seen == 4


def one_conv(scale: np.ndarray, codes: np.ndarray, bias: np.ndarray, *zero: Any) -> Any:
    weights = {"q": codes, "s": scale, "b": bias} | ({"z": zero[0]} if zero else {})
    nodes = [
        node("DequantizeLinear", ["q", "s", *(["z"] if zero else [])], ["w"], axis=0),
        node("Conv", ["x", "w", "b"], ["y"]),
    ]
    return graph(nodes, weights)


def test_a_bias_that_does_not_fit_int32(tmp_path: Path) -> None:
    codes = np.random.default_rng(1).integers(-127, 128, (3, 4, 3, 3)).astype(np.int8)
    scale, bias = np.float32([0.01, 1e-13, 0.02]), np.float32([1, -5, 0])
    model = one_conv(scale, codes, bias)
    made, notes = static(model, tmp_path)
    assert notes == ["y stays float: the bias of 1 channels does not fit int32"]
    assert made == model
    codes[1] = 0  # a channel that is nothing but its bias can have another scale
    model = one_conv(scale, codes, bias)
    made, notes = static(model, tmp_path)
    assert notes == []
    values, operators = ran(made, tmp_path)
    assert operators["QLinearConv"] == 1
    bound = Bounds(float(ran(model)[0].min()), float(ran(model)[0].max()))
    np.testing.assert_allclose(values[:, 1], -5, atol=bound.affine()[0])
    assert error(values, ran(model)[0]) < 0.05


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        ("reshape", "its kernel comes from Reshape"),
        ("axis", "no scale by output channel"),
        ("zero", "its codes have zero points"),
        ("bias", "its bias is computed"),
        ("unseen", "nothing there but zeros"),
    ],
)
def test_what_stays_float_is_named(tmp_path: Path, edit: str, why: str) -> None:
    codes = np.random.default_rng(1).integers(-127, 128, (4, 4, 3, 3)).astype(np.int8)
    zero = [np.int8([0, 3, 0, 0])] if edit == "zero" else []
    model = one_conv(np.full(4, 0.01, "f4"), codes, drawn(2, 4), *zero)
    dequantize, conv = model.graph.node
    if edit == "reshape":
        shape = numpy_helper.from_array(np.int64([4, 4, 3, 3]), "shape")
        model.graph.initializer.append(shape)
        dequantize.output[0] = "flat"
        model.graph.node.insert(1, node("Reshape", ["flat", "shape"], ["w"]))
    elif edit == "axis":
        dequantize.attribute[0].i = 1
    elif edit == "bias":
        conv.input[2] = "double"
        model.graph.node.insert(0, node("Add", ["b", "b"], ["double"]))
    ranges = Ranges({}) if edit == "unseen" else Ranges({"x": Bounds(-4, 4), "y": Bounds(-9, 9)})
    made, notes = with_static_activations(model, ranges, READ)
    assert made == model
    assert len(notes) == 1 and notes[0].startswith("y stays float") and why in notes[0]


def test_outputs_of_the_graph_and_other_readers_keep_their_names(tmp_path: Path) -> None:
    weights = {"w0": drawn(1, 8, 4, 3, 3) / 4, "w1": drawn(2, 8, 8, 1, 1) / 4}
    nodes = [
        node("Conv", ["x", "w0"], ["c0"]),
        node("Relu", ["c0"], ["r0"]),
        node("Conv", ["r0", "w1"], ["y"]),
        node("Exp", ["c0"], ["e"]),
        node("Neg", ["x"], ["n"]),
    ]
    lowered = with_int8_kernels(graph(nodes, weights, "y", "r0", "e", "n"))
    made, notes = static(lowered, tmp_path)
    values, operators = ran(made, tmp_path)
    assert notes == [] and operators["QLinearConv"] == 2
    assert [o.name for o in made.graph.output] == ["y", "r0", "e", "n"]
    assert error(values, ran(lowered)[0]) < 0.05


def test_what_a_conv_reads_has_codes_that_no_sum_of_two_saturates(network: Any) -> None:
    lowered = fold_batch_norms(with_int8_kernels(network), READ)
    codes = quantizable(lowered)
    assert {v for v, highest in codes.items() if highest == 127} == {"x", "r0", "p0", "r1", "r2"}
    assert codes["a2"] == codes["c3"] == 255
    assert set(quantizable(lowered, input_codes=255).values()) == {255}
    offset = fold_batch_norms(with_int8_kernels(network, offset=True), READ)
    assert quantizable(offset).keys() == codes.keys()
    assert set(quantizable(offset).values()) == {255}  # uint8 by uint8 cannot saturate


def test_ranges_are_those_that_were_seen_and_clip_what_is_rare(tmp_path: Path) -> None:
    values = np.concatenate([drawn(0, 40000), np.float32([60])])
    model = graph([node("Mul", ["x", "two"], ["y"])], {"two": np.float32(2)}).SerializeToString()
    # a small batch first: the bins have to grow
    feeds = [{"x": p.reshape(-1, 4, 10, 10)} for p in (values[:400] / 64, values[-40000:])]
    wanted = {"x": 255, "y": 255}
    seen = collect_ranges(model, feeds, wanted, tmp_path, search=False).bounds
    assert seen["x"] == Bounds(float(values.min()), 60.0)
    assert seen["y"] == Bounds(2 * float(values.min()), 120.0)
    found = collect_ranges(model, feeds, wanted, tmp_path).bounds
    assert found == collect_ranges(model, feeds, wanted, tmp_path).bounds
    assert found["x"].high < 60 and found["y"] == Bounds(2 * found["x"].low, 2 * found["x"].high)

    def loss(bounds: Bounds) -> float:
        scale, zero = bounds.affine()
        codes = np.clip(np.rint(values / scale) + zero, 0, 255)
        return float(np.square((codes - zero) * scale - values).sum())

    assert loss(found["x"]) < loss(seen["x"])


def test_ranges_of_what_is_not_finite_or_not_there(tmp_path: Path) -> None:
    model = graph([node("Log", ["x"], ["y"])], {}).SerializeToString()
    with pytest.raises(InputError, match="value y of the graph is not finite"):
        collect_ranges(model, FEEDS, {"y": 255}, tmp_path)
    with pytest.raises(UsageError, match="no calibration inputs"):
        collect_ranges(model, [], {"y": 255}, tmp_path)
    with pytest.raises(InputError, match="onnxruntime"):
        collect_ranges(model, [{"x": X[:, :3]}], {"y": 255}, tmp_path)


def test_a_graph_without_int8_kernels_is_left_as_it_is(network: Any) -> None:
    assert quantizable(network) == {}
    assert with_static_activations(network, Ranges({}), READ) == (network, [])
