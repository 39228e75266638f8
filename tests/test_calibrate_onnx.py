"""Calibration of .onnx files: against numpy, and against files that nobody should trust."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from compress import cli
from compress.calibrate.calibrate import Settings, calibrate
from compress.calibrate.inputs import Inputs
from compress.calibrate.statistics import HELD_OUT, SECOND_MOMENT, Statistics, open_statistics
from compress.checkpoint import open_checkpoint
from compress.errors import InputError, UsageError
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto
pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = np.random.default_rng(0).integers(0, 255, (10, 7, 6, 4), dtype=np.uint8)
X = (IMAGES.transpose(0, 3, 1, 2) / np.float32(255)).astype(np.float32)
APART = np.isin(np.arange(10), (4, 9))  # every fifth sample is held out
Node = tuple[Any, dict[str, np.ndarray]]


def write(path: Path, nodes: list[Any], weights: dict[str, np.ndarray], batch: Any = "n") -> Path:
    """A graph from `x` [batch, 4, 7, 6] to `y`."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4, 7, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, n) for n, v in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def collected(path: Path, *words: str, images: np.ndarray = IMAGES) -> Statistics:
    out = path.with_suffix(".statistics")
    with open_checkpoint(path) as checkpoint:
        recipe = Recipe(tuple(map(parse_pass, words or ("prune:score=obs,sparsity=0.5",))))
        plan = make_plan(checkpoint, recipe, Options(), calibrated=True)
        inputs = Inputs("images", {"images": images}, "", "")
        calibrate(plan, inputs, out, Settings(overwrite=True, fsync=False))
    return open_statistics(out)


def moments(path: Path, name: str, known: Statistics) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        found = known.of(checkpoint.info(name))
        kinds = {SECOND_MOMENT: found.second_moment}
        kinds |= {HELD_OUT: found.held_out} if found.has(HELD_OUT) else {}
        return {kind: read() for kind, read in kinds.items()}


def mean_product(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows.T @ rows / len(rows)


# ---------------------------------------------------------------- numbers


def patches(x: np.ndarray, kernel: tuple[int, int], strides: tuple[int, int],
            dilations: tuple[int, int], pads: tuple[int, int, int, int]) -> np.ndarray:  # fmt: skip
    """[n, places, channels, *kernel], by loops."""
    top, left, bottom, right = pads
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    (kh, kw), (sh, sw), (dh, dw) = kernel, strides, dilations
    high = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    wide = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    found = [
        x[:, :, i * sh : i * sh + dh * kh : dh, j * sw : j * sw + dw * kw : dw][:, :, :kh, :kw]
        for i, j in itertools.product(range(high), range(wide))
    ]
    return np.stack(found, 1)


@pytest.mark.parametrize(
    ("attributes", "kernel", "groups", "pads"),
    [
        ({}, (3, 3), 1, (0, 0, 0, 0)),
        ({"strides": [2, 1], "pads": [1, 0, 2, 1]}, (3, 2), 1, (1, 0, 2, 1)),
        ({"dilations": [2, 1], "group": 2, "pads": [0, 2, 0, 0]}, (3, 3), 2, (0, 2, 0, 0)),
        ({"group": 4, "strides": [2, 2]}, (3, 3), 4, (0, 0, 0, 0)),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (3, 3), 1, (1, 0, 1, 1)),
        ({"auto_pad": "SAME_LOWER", "strides": [2, 2]}, (3, 3), 1, (1, 1, 1, 0)),
        ({"auto_pad": "VALID"}, (2, 3), 1, (0, 0, 0, 0)),
    ],
)
def test_a_convolutions_statistics_are_those_of_its_patches(
    tmp_path: Path, attributes: dict[str, Any], kernel: tuple[int, int], groups: int,
    pads: tuple[int, int, int, int],
) -> None:  # fmt: skip
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    made = weights(w=(8, 4 // groups, *kernel))
    path = write(tmp_path / "m.onnx", [node], made)
    with collected(path) as known:
        found = moments(path, "w", known)[SECOND_MOMENT]
        count = known.record.sites[0].count
    strides = tuple(attributes.get("strides", (1, 1)))
    dilations = tuple(attributes.get("dilations", (1, 1)))
    rows = patches(X, kernel, strides, dilations, pads)  # [n, places, channels, *kernel]
    assert found.shape[0] == groups
    for group, block in enumerate(np.split(rows, groups, axis=2)):
        flat = block.reshape(-1, found.shape[1])
        np.testing.assert_allclose(found[group], mean_product(flat), rtol=1e-4)
    # Our patches times the kernel are what onnxruntime gives.
    outputs = sum_of_products(rows, made["w"], groups)
    np.testing.assert_allclose(outputs, run(path), rtol=1e-3, atol=1e-4)
    assert count == rows.shape[0] * rows.shape[1]


def sum_of_products(rows: np.ndarray, weight: np.ndarray, groups: int) -> np.ndarray:
    """[n, places, out channels] of patches [n, places, channels, *kernel]."""
    made = [
        np.einsum("nlc,oc->nlo", block.reshape(*block.shape[:2], -1), w.reshape(len(w), -1))
        for block, w in zip(np.split(rows, groups, axis=2), np.split(weight, groups), strict=True)
    ]
    return np.concatenate(made, -1)


def run(path: Path) -> np.ndarray:
    import onnxruntime

    (y,) = onnxruntime.InferenceSession(str(path)).run(["y"], {"x": X})
    return y.reshape(*y.shape[:2], -1).transpose(0, 2, 1)


def test_matmul_and_gemm_in_any_orientation(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["s"]),  # [n, 4, 7, 6] @ [6, 5]
        helper.make_node("Relu", ["s"], ["t"]),
        helper.make_node("Flatten", ["t"], ["u"]),  # [n, 140]
        helper.make_node("Gemm", ["u", "b", "c"], ["v"], transB=1),
        helper.make_node("Gemm", ["u", "d", "c"], ["w"]),
        helper.make_node("Add", ["v", "w"], ["q"]),
        helper.make_node("Transpose", ["q"], ["r"]),
        helper.make_node("Gemm", ["r", "e"], ["y"], transA=1),
    ]
    made = weights(a=(6, 5), b=(3, 140), c=(3,), d=(140, 3), e=(3, 2))
    path = write(tmp_path / "m.onnx", nodes, made)
    u = np.maximum(X @ made["a"], 0).reshape(10, -1)
    q = u @ (made["b"].T + made["d"]) + 2 * made["c"]
    with collected(path) as known:
        for name, rows in {"a": X.reshape(-1, 6), "b": u, "d": u, "e": q}.items():
            found = moments(path, name, known)[SECOND_MOMENT][0]
            np.testing.assert_allclose(found, mean_product(rows), rtol=1e-3, atol=1e-6)
        sites = [set(site.tensors) for site in known.record.sites]
    assert {"b", "d"} in sites and {"a"} in sites, "two layers that read one value are one site"


def test_inputs_are_kept_apart_where_a_pass_asks_for_it(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "a"], ["y"])
    path = write(tmp_path / "m.onnx", [node], weights(a=(6, 5)))
    words = ("quantize:bits=4,group_size=-1", "low-rank:rank=2,metric=auto")
    with collected(path, *words) as known:
        found = moments(path, "a", known)
    np.testing.assert_allclose(
        found[SECOND_MOMENT][0], mean_product(X[~APART].reshape(-1, 6)), 1e-4
    )
    np.testing.assert_allclose(found[HELD_OUT][0], mean_product(X[APART].reshape(-1, 6)), 1e-4)


def test_a_weight_that_is_used_twice_has_the_inputs_of_both(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["s"]),
        helper.make_node("MatMul", ["s", "a"], ["y"]),
    ]
    made = weights(a=(6, 6))
    path = write(tmp_path / "m.onnx", nodes, made)
    with collected(path) as known:
        found = moments(path, "a", known)[SECOND_MOMENT][0]
    both = np.concatenate([X, X @ made["a"]]).reshape(-1, 6)
    np.testing.assert_allclose(found, mean_product(both), rtol=1e-4)


def test_a_graph_of_one_sample_at_a_time_is_run_so(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "a"], ["y"])
    free = write(tmp_path / "free.onnx", [node], weights(a=(6, 5)))
    one = write(tmp_path / "one.onnx", [node], weights(a=(6, 5)), batch=1)
    with collected(free) as known, collected(one) as single:
        np.testing.assert_allclose(
            moments(one, "a", single)[SECOND_MOMENT], moments(free, "a", known)[SECOND_MOMENT], 1e-5
        )
    three = write(tmp_path / "three.onnx", [node], weights(a=(6, 5)), batch=3)
    with pytest.raises(InputError, match="fixed to 3 samples"):
        collected(three)


# ---------------------------------------------------------------- the command, and refusals


def test_the_command_calibrates_an_onnx_file_and_statistics_know_their_model(
    tmp_path: Path,
) -> None:
    node = helper.make_node("MatMul", ["x", "a"], ["y"])
    path = write(tmp_path / "m.onnx", [node], weights(a=(6, 5)))
    np.savez(tmp_path / "images.npz", images=IMAGES)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("passes:\n  - prune: {sparsity: 0.5, score: obs}\n")
    out = tmp_path / "s.safetensors"
    words = ["calibrate", str(path), "--for", str(recipe), "-o", str(out), "--json"]
    done = CliRunner().invoke(cli.app, [*words, "--images", str(tmp_path / "images.npz")])
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert body["engine"] == "onnx" and body["tensors"] == 1
    other = write(tmp_path / "other.onnx", [node], weights(a=(6, 4)))
    with (
        open_statistics(out) as known,
        open_checkpoint(path) as same,
        open_checkpoint(other) as another,
    ):
        known.check_model(same)
        with pytest.raises(UsageError, match="another model"):
            known.check_model(another)


def external(path: Path, location: str) -> Path:
    """The graph of one product whose weight lies in another file."""
    node = helper.make_node("MatMul", ["x", "a"], ["y"])
    write(path, [node], weights(a=(6, 5)))
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "120")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    path.write_bytes(model.SerializeToString())
    return path


def test_data_beside_the_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(weights(a=(6, 5))["a"].tobytes())
    path = external(tmp_path / "m.onnx", "w.data")
    with collected(path) as known:
        found = moments(path, "a", known)[SECOND_MOMENT][0]
    np.testing.assert_allclose(found, mean_product(X.reshape(-1, 6)), rtol=1e-4)


@pytest.mark.parametrize("location", ["../w.data", "{absolute}", "link", "", "gone.data"])
def test_data_elsewhere_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.data").write_bytes(weights(a=(6, 5))["a"].tobytes())
    (folder / "link").symlink_to(tmp_path / "w.data")
    path = external(folder / "m.onnx", location.format(absolute=tmp_path / "w.data"))
    with pytest.raises(InputError):
        open_checkpoint(path)


def test_what_is_no_graph_or_needs_foreign_code_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\xff\xfe not a graph")
    with pytest.raises(InputError, match=r"no ONNX model, or a damaged one"):
        open_checkpoint(broken)
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="the file is empty"):
        open_checkpoint(tmp_path / "empty.onnx")
    nodes = [
        helper.make_node("Evil", ["x"], ["s"], domain="com.example"),
        helper.make_node("MatMul", ["s", "a"], ["y"]),
    ]
    path = write(tmp_path / "custom.onnx", nodes, weights(a=(6, 5)))
    with pytest.raises(InputError, match=r"unknown operator domain 'com\.example'"):
        collected(path)


def test_what_cannot_be_collected_is_said_before_any_work(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["s"]),
        helper.make_node("Identity", ["b"], ["c"]),
        helper.make_node("MatMul", ["s", "c"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, weights(a=(6, 5), b=(5, 3)))
    with pytest.raises(InputError, match=r"\[4, 5, 5\] do not fit"):
        collected(path, images=IMAGES[:, :5, :5])


def test_a_weight_is_reached_through_identity_and_transpose(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Identity", ["a"], ["i"]),
        helper.make_node("MatMul", ["x", "i"], ["s"]),
        helper.make_node("Transpose", ["b"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["s", "t"], ["y"]),
    ]
    made = weights(a=(6, 5), b=(3, 5))
    path = write(tmp_path / "m.onnx", nodes, made)
    with collected(path) as known:
        for name, rows in {"a": X.reshape(-1, 6), "b": (X @ made["a"]).reshape(-1, 5)}.items():
            found = moments(path, name, known)[SECOND_MOMENT][0]
            np.testing.assert_allclose(found, mean_product(rows), rtol=1e-4)
