"""A user's module as an ONNX graph of the checkpoint's tensors, and on to integers."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lowered import filled, values_of, with_int8_kernels
from toolbox import write_safetensors

from compress.checkpoint import open_checkpoint, skeleton
from compress.engines.module import load_module, run_images
from compress.errors import InputError, UsageError
from compress.export_onnx import exporting_module, torch_exporter
from compress.export_onnx.batch_norm import fold_batch_norms
from compress.export_onnx.capture_module import capture_module
from compress.export_onnx.graph_index import reader_of
from compress.export_onnx.static_activations import (
    collect_ranges,
    quantizable,
    with_static_activations,
)

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("one_thread")

HERE = Path(__file__).parent
FILE = f"{HERE / 'captured_cnn.py'}"


@dataclass(frozen=True)
class Captured:
    """A skeleton, and the same with its weights inside."""

    skeleton: Any
    filled: Any
    checkpoint: Path


def stored(model: torch.nn.Module, path: Path, prefix: str = "module.") -> Path:
    """The module's weights in a file, tied ones once, under names with a prefix."""
    tensors, seen = {}, set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            tensors[prefix + name] = value.detach().numpy()
        seen.add(id(value))
    write_safetensors(path, tensors)
    return path


def session(model: Any, optimized: Path | None = None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    torch.manual_seed(0)
    import captured_cnn

    path = stored(captured_cnn.small(), tmp_path_factory.mktemp("small") / "m.safetensors")
    with open_checkpoint(path) as checkpoint:
        made = capture_module(
            f"{FILE}:small", checkpoint, example=np.zeros((1, 3, 10, 10), np.float32)
        )
        return Captured(made, filled(made, values_of(made, checkpoint)), path)


def test_weights_are_names_of_the_checkpoint(small: Captured) -> None:
    with open_checkpoint(small.checkpoint) as checkpoint:
        shapes = {i.name: i.shape for i in checkpoint.infos()}
    weights = skeleton.weights_of(small.skeleton)
    del shapes["module.norm.num_batches_tracked"]
    assert {n: tuple(t.dims) for n, t in weights.items()} == shapes
    assert all(t.data_type == 1 and not t.raw_data for t in weights.values())
    inline = [t for t in small.skeleton.graph.initializer if t.name not in weights]
    assert max(np.prod(t.dims) for t in inline) <= 4  # shapes and axes, no copy of a weight
    assert b"captured_cnn" not in small.skeleton.SerializeToString()
    assert str(HERE).encode() not in small.skeleton.SerializeToString()


def test_layers_read_their_matrix_as_it_is_stored(small: Captured) -> None:
    nodes = small.skeleton.graph.node
    linear = [tuple(n.input[1:]) for n in nodes if n.op_type == skeleton.LINEAR]
    assert all(n.domain == skeleton.DOMAIN for n in nodes if n.op_type == skeleton.LINEAR)
    again = next(n for n in linear if len(n) == 1)
    assert linear == [
        ("module.mix.weight", "module.mix.bias"),
        ("module.hidden.weight", "module.hidden.bias"),
        again,
        again,
        ("module.relu.weight", "module.relu.bias"),
    ]
    kinds = Counter(n.op_type for n in nodes)
    assert kinds["Conv"] == 2 and kinds["BatchNormalization"] == 1
    assert not kinds["Gemm"] and not kinds["MatMul"] and not kinds["Identity"]
    weights = skeleton.weights_of(small.skeleton)
    assert {n.input[1] for n in nodes if n.op_type == "Conv"} <= set(weights)


def test_the_graph_gives_what_the_module_gives_for_any_batch(small: Captured) -> None:
    onnx.checker.check_model(small.filled, full_check=True)
    with open_checkpoint(small.checkpoint) as checkpoint:
        module = load_module(f"{FILE}:small", checkpoint)
    run = session(small.filled)
    assert [(i.name, i.shape) for i in run.get_inputs()] == [("input", ["batch", 3, 10, 10])]
    assert [(o.name, o.shape) for o in run.get_outputs()] == [("logits", ["batch", 5])]
    for count in (1, 2, 7):
        x = np.random.default_rng(count).standard_normal((count, 3, 10, 10)).astype(np.float32)
        with torch.no_grad():
            wanted = module.run(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(run.run(None, {"input": x})[0], wanted, rtol=1e-4, atol=1e-4)


def test_values_called_as_a_weight_is_called_get_out_of_its_way(tmp_path: Path) -> None:
    onnx_ir = pytest.importorskip("onnx_ir")
    helper = onnx.helper
    tensors = [onnx.numpy_helper.from_array(np.ones(3, np.float32), n) for n in ("inner.w", "k")]
    nodes = [
        helper.make_node("Add", ["x", "inner.w"], ["w"]),
        helper.make_node("Mul", ["w", "k"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, 1, ["batch", 3]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    opset = [helper.make_opsetid("", 21)]
    model = onnx_ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=10))
    exporting_module.optimize(model, {"inner.w": "w"})
    made = onnx_ir.to_proto(model).graph
    assert [list(n.input) for n in made.node] == [["x", "w"], ["w_1", "k"]]
    assert [one.name for one in made.input] == ["x", "w"]


@pytest.mark.parametrize(
    ("factory", "words"),
    [("branching", "torch.onnx.export cannot make a graph"), ("counting", "2 samples")],
)
def test_modules_that_cannot_be_traced(
    factory: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import captured_cnn

    path = stored(getattr(captured_cnn, factory)(), tmp_path / "m.safetensors")
    with open_checkpoint(path) as checkpoint, warnings.catch_warnings(record=True) as heard:
        with pytest.raises(InputError, match=words) as raised:
            capture_module(f"{FILE}:{factory}", checkpoint, image_shape=(8, 8, 3))
        assert "\n" not in raised.value.message and len(raised.value.message) < 500
    assert capfd.readouterr() == ("", "") and not heard


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    import captured_cnn

    path = stored(captured_cnn.branching(), tmp_path / "m.safetensors")
    with open_checkpoint(path) as checkpoint:
        with pytest.raises(UsageError, match="nothing says what goes into the module"):
            capture_module(f"{FILE}:branching", checkpoint)
        with pytest.raises(UsageError, match=r"fails on an input \[2, 1, 8, 8\]"):
            capture_module(f"{FILE}:branching", checkpoint, image_shape=(8, 8, 1))
        with pytest.raises(InputError, match=r"wants \[4, 3, 5, 5\]"):
            capture_module(f"{FILE}:unlike", checkpoint, image_shape=(8, 8, 3))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> object:
        return None if name == "onnxscript" else object()

    monkeypatch.setattr("importlib.util.find_spec", find)
    with pytest.raises(UsageError, match="needs the package onnxscript") as raised:
        torch_exporter.require_exporter()
    assert "pip install 'compress-checkpoints[onnx]'" in str(raised.value.hint)


# ---------------------------------------------------------------- ResNet-20

RESNET = f"{HERE / 'resnet_cifar.py'}:resnet20"


@pytest.fixture(scope="module")
def resnet(shared_dir: Path) -> tuple[Captured, torch.nn.Module]:
    """It takes raw images: what `preprocess` does is in the graph. And the module."""
    path = shared_dir / "models" / "resnet20-12fca82f.th"
    with open_checkpoint(path, allow_pickle=True) as checkpoint:
        made = capture_module(RESNET, checkpoint, image_shape=(32, 32, 3), raw_images=True)
        whole = Captured(made, filled(made, values_of(made, checkpoint)), path)
        return whole, load_module(RESNET, checkpoint)


def logits(model: Any, images: np.ndarray, optimized: Path | None = None) -> np.ndarray:
    run = session(model, optimized)
    parts = [images[i : i + 100] for i in range(0, len(images), 100)]
    return np.concatenate([run.run(None, {"images": p})[0] for p in parts])


@pytest.mark.model
def test_resnet20_in_float_and_in_integers(
    resnet: tuple[Captured, torch.nn.Module], shared_dir: Path, tmp_path: Path
) -> None:
    captured, module = resnet
    test = np.load(shared_dir / "data" / "cifar10_test_2000.npz")
    images, labels = test["images"], test["labels"]
    float_logits = logits(captured.filled, images)
    wanted = run_images(module, images[::4]).numpy()  # they are sorted by class
    np.testing.assert_allclose(float_logits[::4], wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(float_logits[::4].argmax(1), wanted.argmax(1))

    # the codes lie outside of the graph, as an output's do
    path = tmp_path / "lowered.onnx"
    onnx.save(with_int8_kernels(captured.filled), path, save_as_external_data=True,
              location="codes.bin", size_threshold=400)  # fmt: skip
    lowered, read = onnx.load(path, load_external_data=False), reader_of(str(tmp_path))
    folded = fold_batch_norms(lowered, read)
    calibration = np.load(shared_dir / "data" / "cifar10_calib_600.npz")["images"][::6]
    feeds = [{"images": calibration[:50]}, {"images": calibration[50:]}]
    ranges = collect_ranges(folded.SerializeToString(), feeds, quantizable(folded), tmp_path)
    made, notes = with_static_activations(folded, ranges, read)
    assert notes == []
    outside = {t.name for t in made.graph.initializer if t.data_location == 1}
    assert len([name for name in outside if name.endswith(".codes")]) == 19
    onnx.save(made, tmp_path / "static.onnx")
    onnx.checker.check_model(str(tmp_path / "static.onnx"), full_check=True)
    whole = onnx.load(tmp_path / "static.onnx")
    integers = logits(whole, images, tmp_path / "optimized.onnx")
    accuracy = [100 * float((y.argmax(1) == labels).mean()) for y in (float_logits, integers)]
    assert abs(accuracy[0] - accuracy[1]) <= 0.5, accuracy
    fused = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert Counter(n.op_type for n in fused)["QLinearConv"] == 19
