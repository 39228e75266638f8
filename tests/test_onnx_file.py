"""The reader of .onnx files: values from every place, roles by use, refusals, and little memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from compress import cli
from compress.checkpoint import Checkpoint, open_checkpoint, skeleton
from compress.errors import CompressError, InputError
from compress.tensor import Role

onnx = pytest.importorskip("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
TensorProto, ModelProto = onnx.TensorProto, onnx.ModelProto

RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 48)).astype(np.float32)  # 12 KiB: not loaded with the graph


def model_of(initializers: list[Any], nodes: list[Any] | None = None, **more: Any) -> Any:
    """A model from `x` to `y` with these initializers."""
    graph = helper.make_graph(
        nodes or [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    opsets = more.pop("opsets", [helper.make_opsetid("", 17)])
    return helper.make_model(graph, opset_imports=opsets, ir_version=more.pop("ir_version", 8))


def write(path: Path, model: Any) -> Path:
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def raw(name: str, array: np.ndarray) -> Any:
    return numpy_helper.from_array(array, name)


def external(name: str, data_type: int, dims: tuple[int, ...], **entries: Any) -> Any:
    made = TensorProto(name=name, data_type=data_type, dims=dims, data_location=1)
    for key, value in entries.items():
        entry = made.external_data.add()
        entry.key, entry.value = key, str(value)
    return made


def refused(path: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path).close()
    message = caught.value.message
    assert path.name in message and caught.value.hint and message.isprintable(), message
    for word in words:
        assert word in message, message


def skeleton_of(checkpoint: Checkpoint) -> Any:
    model = ModelProto()
    model.ParseFromString(checkpoint.graph)
    return model


# ---------------------------------------------------------------- values

TYPED = [
    (TensorProto.FLOAT, np.float32), (TensorProto.DOUBLE, np.float64),
    (TensorProto.INT64, np.int64), (TensorProto.INT32, np.int32), (TensorProto.INT16, np.int16),
    (TensorProto.INT8, np.int8), (TensorProto.UINT8, np.uint8), (TensorProto.UINT16, np.uint16),
    (TensorProto.UINT32, np.uint32), (TensorProto.UINT64, np.uint64),
    (TensorProto.BOOL, np.bool_), (TensorProto.FLOAT16, np.float16),
    (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
]  # fmt: skip


def samples(kind: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Random values of a type, its extremes first."""
    kind = np.dtype(kind)
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        values = RNG.integers(limits.min, limits.max, shape, kind, endpoint=True)
        values.reshape(-1)[:3] = [limits.min, limits.max, 0]
        return values
    if kind.kind == "b":
        return RNG.random(shape) < 0.5
    return RNG.standard_normal(shape).astype(kind)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("form", ["raw", "typed"])
def test_every_type_is_read_from_raw_and_from_typed_data(
    tmp_path: Path, form: str, large: bool
) -> None:
    shape = (7, 400) if large else (2, 3)
    wanted, known, tensors = {}, {}, []
    for data_type, kind in TYPED:
        values = samples(kind, shape)
        name = str(np.dtype(kind))
        made = raw(name, values)
        assert made.data_type == data_type
        if form == "typed":
            made = helper.make_tensor(name, data_type, shape, values.reshape(-1))
            assert not made.HasField("raw_data")
        wanted[name], known[name] = values, data_type
        tensors.append(made)
    path = write(tmp_path / "m.onnx", model_of([raw("w", W), *tensors]))
    with open_checkpoint(path) as checkpoint:
        assert [i.name for i in checkpoint.infos()] == ["w", *wanted]
        np.testing.assert_array_equal(checkpoint.read(checkpoint.info("w")), W)
        for name, values in wanted.items():
            info = checkpoint.info(name)
            got = checkpoint.read(info)
            assert info.dtype == skeleton.TAGS[known[name]] and info.nbytes == values.nbytes
            np.testing.assert_array_equal(got.view(np.uint8), values.view(np.uint8))
            row = checkpoint.read(info, 1, 2)
            np.testing.assert_array_equal(row.view(np.uint8), values[1:2].view(np.uint8))
            assert bytes(checkpoint.read_bytes(info, 0, info.nbytes)) == values.tobytes()
        assert checkpoint.weight_files == {"m.onnx": path.stat().st_size}
        before = checkpoint.fingerprint(), checkpoint.sample_hash(), checkpoint.content_hash()
    with open_checkpoint(path) as checkpoint:
        assert before == (
            checkpoint.fingerprint(), checkpoint.sample_hash(), checkpoint.content_hash()
        )  # fmt: skip


def test_elements_that_are_not_packed_are_read_too(tmp_path: Path) -> None:
    def tagged(number: int, wire: int, payload: bytes) -> bytes:
        return bytes([number << 3 | wire]) + payload

    floats = b"".join(tagged(4, 5, v.tobytes()) for v in W[0])
    integers = b"".join(tagged(7, 0, bytes([v])) for v in range(8)) + tagged(7, 2, b"\x02\x08\x09")
    tensors = [
        TensorProto(name=name, data_type=data_type, dims=[count]).SerializeToString() + data
        for name, data_type, count, data in (("f", 1, 48, floats), ("i", 7, 10, integers))
    ]
    model = model_of([raw("w", W)]).SerializeToString()
    fields = b"".join(b"\x2a" + _varint(len(t)) + t for t in tensors)
    path = write(tmp_path / "m.onnx", _with_graph_fields(model, fields))
    with open_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(checkpoint.info("f")), W[0])
        np.testing.assert_array_equal(checkpoint.read(checkpoint.info("i")), np.arange(10))


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def _with_graph_fields(model: bytes, fields: bytes) -> bytes:
    """The model with more fields at the end of its graph."""
    whole = ModelProto()
    whole.ParseFromString(model)
    graph = whole.graph.SerializeToString() + fields
    whole.ClearField("graph")
    return whole.SerializeToString() + b"\x3a" + _varint(len(graph)) + graph


def test_data_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.data").write_bytes(b"\0" * 100 + W.tobytes())
    bias = np.arange(48, dtype=np.float16)
    (tmp_path / "b.data").write_bytes(bias.tobytes())
    steps = np.array([3, 4], np.int64)
    (tmp_path / "i.data").write_bytes(steps.tobytes())
    tensors = [
        external("w", 1, W.shape, location="sub/a.data", offset=100, length=W.nbytes),
        external("tied", 1, W.shape, location="sub/a.data", offset=100),
        external("b", 10, (48,), location="./b.data", checksum="ff"),
        external("i", 7, (2,), location="i.data"),
    ]
    path = write(tmp_path / "m.onnx", model_of(tensors))
    with open_checkpoint(path) as checkpoint:
        for name in ("w", "tied"):
            info = checkpoint.info(name)
            assert (info.file, info.offset) == ("sub/a.data", 100)
            np.testing.assert_array_equal(checkpoint.read(info, 5, 7), W[5:7])
        np.testing.assert_array_equal(checkpoint.read(checkpoint.info("b")), bias)
        assert set(checkpoint.weight_files) == {"m.onnx", "sub/a.data", "b.data", "i.data"}
        inline = {t.name: t for t in skeleton_of(checkpoint).graph.initializer}
        np.testing.assert_array_equal(numpy_helper.to_array(inline["i"]), steps)
        first = checkpoint.content_hash(), checkpoint.fingerprint()
        checkpoint.check_unchanged()
        (tmp_path / "b.data").write_bytes(bias.tobytes()[::-1])
        with pytest.raises(InputError, match=r"b\.data: the file changed"):
            checkpoint.check_unchanged()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.content_hash() != first[0] and checkpoint.fingerprint() != first[1]


def test_a_model_of_more_than_2_gb_is_read_row_by_row(tmp_path: Path) -> None:
    rows, columns = 150_000, 4096
    data = tmp_path / "w.data"
    data.touch()
    os.truncate(data, rows * columns * 4)
    with open(data, "r+b") as file:
        file.seek(149_999 * columns * 4)
        file.write(np.arange(columns, dtype=np.float32).tobytes())
    assert data.stat().st_size > 2_300_000_000
    path = write(
        tmp_path / "m.onnx", model_of([external("w", 1, (rows, columns), location="w.data")])
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_checkpoint(path) as checkpoint:
        info = checkpoint.info("w")
        assert info.role is Role.CONV1D
        found = checkpoint.read(info, 149_999, 150_000)
        checkpoint.sample_hash()
    np.testing.assert_array_equal(found[0], np.arange(columns))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 50_000


def test_a_large_file_is_opened_without_its_weights_in_memory(tmp_path: Path) -> None:
    """1 GB inline, in a sparse file: the tensor's data is a hole between its name and the rest."""
    nbytes = 1 << 30
    model = model_of([])
    tensor = TensorProto(name="w", data_type=1, dims=[nbytes // 4096, 1024]).SerializeToString()
    tensor_size = len(tensor) + 1 + len(_varint(nbytes)) + nbytes
    graph = model.graph.SerializeToString()
    graph_size = len(graph) + 1 + len(_varint(tensor_size)) + tensor_size
    model.ClearField("graph")
    path = tmp_path / "m.onnx"
    with open(path, "wb") as file:
        file.write(model.SerializeToString() + b"\x3a" + _varint(graph_size) + graph)
        file.write(b"\x2a" + _varint(tensor_size) + tensor + b"\x4a" + _varint(nbytes))
        file.truncate(file.tell() + nbytes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with open_checkpoint(path) as checkpoint:
        info = checkpoint.info("w")
        assert info.nbytes == nbytes
        assert not checkpoint.read(info, info.shape[0] - 1).any()
    assert time.perf_counter() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


# ---------------------------------------------------------------- roles


def roles(tmp_path: Path, nodes: list[Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    made = [raw(n, np.zeros(s, np.float32)) for n, s in shapes.items()]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    path = write(tmp_path / "m.onnx", model_of(made, nodes, opsets=opsets))
    with open_checkpoint(path) as checkpoint:
        return {i.name: i.role.value for i in checkpoint.infos()}


def node(kind: str, inputs: str, output: str = "y", **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


BRANCH = helper.make_graph(
    [node("MatMul", "x w", "o")], "b", [], [helper.make_tensor_value_info("o", 1, None)]
)
TURN = node("Transpose", "w", "t", perm=[1, 0])


@pytest.mark.parametrize(
    ("nodes", "shape", "role"),
    [
        ([node("MatMul", "x w")], (4, 4), "conv1d"),
        ([TURN, node("MatMul", "x t")], (4, 4), "linear"),
        ([node("MatMul", "x t"), TURN], (4, 4), "linear"),  # whatever the order of the nodes
        ([node("Identity", "w", "t"), node("MatMul", "x t")], (4, 4), "conv1d"),
        ([node("Gemm", "x w")], (4, 4), "conv1d"),
        ([node("Gemm", "x w", transB=1)], (4, 4), "linear"),
        ([TURN, node("Gemm", "x t", transB=1)], (4, 4), "conv1d"),
        ([node("Conv", "x w")], (4, 4, 3), "conv"),
        ([node("Gather", "w x")], (4, 4), "embedding"),
        ([node("MatMul", "x w", "s"), node("Gemm", "s w")], (4, 4), "conv1d"),
        ([node("Gather", "w x", "s"), TURN, node("MatMul", "s t")], (4, 4), "embedding"),  # tied
        # What nobody may touch:
        ([node("MatMul", "w x")], (4, 4), "unclear"),
        ([node("MatMul", "w w")], (4, 4), "unclear"),
        ([node("MatMul", "x w")], (2, 4, 4), "unclear"),
        ([node("Transpose", "w", "t", perm=[0, 1]), node("MatMul", "x t")], (4, 4), "unclear"),
        ([node("ConvTranspose", "x w")], (4, 4, 3), "unclear"),
        ([node("Gather", "w x", axis=1)], (4, 4), "unclear"),
        ([node("MatMul", "x w", "s"), node("Add", "s w")], (4, 4), "unclear"),
        ([node("MatMul", "x w", "s"), TURN, node("MatMul", "s t")], (4, 4), "unclear"),
        ([node("MatMul", "x w", "s"), node("Identity", "w")], (4, 4), "unclear"),  # y is w itself
        ([node("MatMul", "x w", "s"),
          node("If", "x", then_branch=BRANCH, else_branch=BRANCH)], (4, 4), "unclear"),
        ([helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft")],
         (4, 4), "unclear"),
        # Vectors:
        ([node("Add", "x w")], (4,), "bias"),
        ([node("LayerNormalization", "x w v")], (4,), "norm"),
        ([node("LayerNormalization", "x v w")], (4,), "bias"),
        ([node("Mul", "x w")], (4,), "state"),
        ([node("Mul", "x w")], (), "state"),
    ],
)  # fmt: skip
def test_a_role_is_what_the_nodes_make_of_a_weight(
    tmp_path: Path, nodes: list[Any], shape: tuple[int, ...], role: str
) -> None:
    assert roles(tmp_path, nodes, {"w": shape, "v": (4,)})["w"] == role


def test_integers_are_state_whoever_reads_them(tmp_path: Path) -> None:
    table = raw("w", np.zeros((64, 4), np.int64))
    path = write(tmp_path / "m.onnx", model_of([table], [node("Gather", "w x")]))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.info("w").role is Role.STATE


# ---------------------------------------------------------------- the skeleton


def test_the_skeleton_has_the_graph_and_no_weights(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["s"], name="product", doc_string="/home/me"),
        node("Add", "s b", "t"),
        node("Reshape", "t shape"),
    ]
    shape, scalar = np.array([1, -1], np.int64), np.float32(2)
    bias = np.zeros(48, np.float32)
    words = helper.make_tensor("words", TensorProto.STRING, [2], [b"a" * 3000, b"b" * 3000])
    tensors = [raw("w", W), raw("b", bias), raw("shape", shape), raw("scalar", scalar), words]
    tensors.append(raw("ids", np.arange(600, dtype=np.int64)))
    model = model_of(tensors, nodes)
    entry = model.metadata_props.add()
    entry.key, entry.value = "path", "/home/me"
    path = write(tmp_path / "m.onnx", model)
    with open_checkpoint(path) as checkpoint:
        kept = skeleton_of(checkpoint)
        assert set(skeleton.weights_of(kept)) == {"w", "b", "ids"}
        assert b"/home/me" not in (checkpoint.graph or b"") and len(checkpoint.graph or b"") < 8000
        weight = skeleton.weights_of(kept)["w"]
        assert list(weight.dims) == [64, 48] and weight.data_type == TensorProto.FLOAT
        inline = {t.name: numpy_helper.to_array(t) for t in kept.graph.initializer
                  if not skeleton.is_weight(t)}  # fmt: skip
        assert set(inline) == {"shape", "scalar", "words"}
        np.testing.assert_array_equal(inline["shape"], shape)
        assert inline["words"].tolist() == ["a" * 3000, "b" * 3000]
        names = {i.name for i in checkpoint.infos()}
        assert names == {"w", "b", "shape", "scalar", "ids"}, "strings are no tensors"
        np.testing.assert_array_equal(checkpoint.read(checkpoint.info("scalar")), scalar)
        assert [n.op_type for n in kept.graph.node] == ["MatMul", "Add", "Reshape"]
        assert checkpoint.graph_path == path and checkpoint.directory == tmp_path


def test_in_the_skeleton_products_read_their_weights_themselves(tmp_path: Path) -> None:
    """A transposed weight, one behind an Identity, and one that has to stay as it is."""
    nodes = [
        node("Identity", "w", "i"),
        node("Transpose", "i", "t", perm=[1, 0]),
        node("MatMul", "x t", "a"),
        node("Transpose", "v", "u", perm=[1, 0]),
        node("Gemm", "a u", "b", transB=1),
        node("Gemm", "b u", "c", transB=1),
        node("Transpose", "z", "q", perm=[1, 0]),
        node("Add", "c q"),
    ]
    square = RNG.standard_normal((64, 64)).astype(np.float32)
    made = [raw("w", square), raw("v", square[::-1]), raw("z", square[:, ::-1])]
    path = write(tmp_path / "m.onnx", model_of(made, nodes))
    with open_checkpoint(path) as checkpoint:
        kept = skeleton_of(checkpoint)
        roles = {i.name: i.role for i in checkpoint.infos()}
    assert roles == {"w": Role.LINEAR, "v": Role.CONV1D, "z": Role.UNCLEAR}
    found = [(n.op_type, list(n.input), [a.i for a in n.attribute]) for n in kept.graph.node]
    assert found[:3] == [
        ("Linear", ["x", "w"], []), ("Gemm", ["a", "v"], [0]), ("Gemm", ["b", "v"], [0])
    ]  # fmt: skip
    assert [kind for kind, _, _ in found[3:]] == ["Transpose", "Add"]
    assert skeleton.DOMAIN in {entry.domain for entry in kept.opset_import}


@pytest.mark.parametrize("ir_version", [3, 8])
def test_initializers_that_are_inputs_too_are_constants(tmp_path: Path, ir_version: int) -> None:
    model = model_of([raw("w", W)], ir_version=ir_version)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, W.shape))
    with open_checkpoint(write(tmp_path / "m.onnx", model)) as checkpoint:
        kept = skeleton_of(checkpoint)
        assert [v.name for v in kept.graph.input] == ["x"] and kept.ir_version >= 4
        assert bool(checkpoint.warnings) == (ir_version > 3)


# ---------------------------------------------------------------- files and folders


def test_a_directory_with_one_graph_is_that_graph(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    model = model_of([external("w", 1, W.shape, location="w.bin")])
    write(tmp_path / "net.onnx", model)
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    (tmp_path / "labels.txt").write_text("a\n")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.graph is not None and checkpoint.config == {"hidden_size": 64}
        assert checkpoint.sidecars == ["labels.txt"]
        np.testing.assert_array_equal(checkpoint.read(checkpoint.info("w")), W)
    with open_checkpoint(tmp_path / "net.onnx") as checkpoint:
        assert checkpoint.sidecars == [] and checkpoint.config == {"hidden_size": 64}
    write(tmp_path / "other.onnx", model)
    with pytest.raises(InputError, match=r"2 weight files.*net\.onnx, other\.onnx"):
        open_checkpoint(tmp_path)
    write(tmp_path / "model.onnx", model)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.graph_path == tmp_path / "model.onnx"
        assert "other.onnx" in checkpoint.warnings[0]
    from conftest import write_safetensors

    write_safetensors(tmp_path / "model.safetensors", {"a": ("F32", [1], b"\0" * 4)})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.graph is None, "safetensors come first"


def test_commands_read_onnx_files(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", model_of([raw("w", W)]))
    done = CliRunner().invoke(cli.app, ["inspect", str(path), "--json"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["tensors"]
    assert (row["name"], row["role"], row["shape"]) == ("w", "conv1d", [64, 48])


def test_without_an_onnx_file_the_package_onnx_is_not_imported(tmp_path: Path) -> None:
    from conftest import write_safetensors

    path = write_safetensors(tmp_path / "m.safetensors", {"a": ("F32", [2, 2], b"\0" * 16)})
    code = (
        "import sys\nfrom compress import cli\nfrom compress.checkpoint import open_checkpoint\n"
        "open_checkpoint(sys.argv[1]).close()\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'onnx', 'google', 'torch'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- refusals


def tensor(**fields: Any) -> Any:
    return TensorProto(**({"name": "w", "data_type": 1, "dims": [4]} | fields))


ZEROS = b"\0" * 16


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (tensor(raw_data=ZEROS[:15]), "15 bytes of data where type and dims need 16"),
        (tensor(raw_data=ZEROS + b"\0"), "17 bytes"),
        (tensor(), "0 bytes"),
        (tensor(float_data=[1, 2, 3]), "12 bytes"),
        (tensor(dims=[2], raw_data=ZEROS[:8], float_data=[1, 2]), "given twice"),
        (tensor(int32_data=[1, 2, 3, 4]), "int32_data, which is not for its type"),
        (tensor(data_type=7, int64_data=[1, 2, 3]), "3 elements of data where its dims need 4"),
        (tensor(data_type=7, int64_data=[1] * 5), "elements of data where its dims need 4"),
        (tensor(data_type=3, int32_data=[1, 2, 3, 300]), "values from 1 to 300"),
        (tensor(data_type=2, int32_data=[1, 2, 3, -1]), "values from -1 to 3"),
        (tensor(data_type=9, int32_data=[0, 1, 2, 0]), "values from 0 to 2"),
        (tensor(data_type=12, uint64_data=[1 << 32, 0, 0, 0]), "4294967296"),
        (tensor(dims=[-4], raw_data=ZEROS), "a dimension of -4"),
        (tensor(dims=[1 << 24, 1 << 25]), "562949953421312 elements"),
        (tensor(dims=[1] * 65, raw_data=ZEROS[:4]), "65 dimensions"),
        (tensor(data_type=0, raw_data=ZEROS), "unknown data type 0"),
        (tensor(data_type=99, raw_data=ZEROS), "unknown data type 99"),
        (tensor(raw_data=ZEROS, segment=TensorProto.Segment(begin=0, end=2)), "segment"),
        (tensor(name="", raw_data=ZEROS), "an initializer called ''"),
        (tensor(name="__metadata__", raw_data=ZEROS), "__metadata__"),
        (tensor(name="y", raw_data=ZEROS), "the output of node 'MatMul' is an initializer"),
        (tensor(data_type=8, string_data=[b"a"]), "1 elements of data where its dims need 4"),
        (tensor(data_type=8, dims=[1], string_data=[b"a" * (2 << 20)]), "cannot hold"),
        (tensor(data_type=17, raw_data=b"\0" * 5), "5 bytes"),
        (external("w", 17, (4,), location="d"), "in another file"),
        (external("w", 1, (4,), location="d", offset=8, length=16), "bytes 8 to 24 of d"),
        (external("w", 1, (4,), location="d", offset="0x0"), "offset '0x0'"),
        (external("w", 1, (3,), location="d"), "16 bytes of data where type and dims need 12"),
        (external("w", 1, (4,), location="d/"), "d"),
        (external("w", 1, (4,), location=""), "no path below"),
        (external("w", 1, (4,), location="sub\\d"), "no path below"),
        (external("w", 1, (4,), location="d", basepath="/"), "basepath"),
    ],
)  # fmt: skip
def test_malformed_initializers_are_refused(tmp_path: Path, made: Any, words: str) -> None:
    (tmp_path / "d").write_bytes(ZEROS)
    refused(write(tmp_path / "m.onnx", model_of([made])), words)


def test_overlapping_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(ZEROS)
    pair = [external(n, 1, (2,), location="d", offset=o, length=8) for n, o in (("w", 0), ("v", 4))]
    refused(write(tmp_path / "m.onnx", model_of(pair)), "overlap another tensor's")


def _changed(change: Callable[[Any], Any]) -> bytes:
    model = model_of([raw("w", W)])
    change(model)
    return bytes(model.SerializeToString())


def _nested(depth: int) -> Any:
    graph = helper.make_graph([node("Identity", "x", "o")], "g", [], [
        helper.make_tensor_value_info("o", 1, None)])  # fmt: skip
    for _ in range(depth):
        graph = helper.make_graph(
            [node("If", "c", "o", then_branch=graph, else_branch=BRANCH)], "g", [],
            [helper.make_tensor_value_info("o", 1, None)],
        )  # fmt: skip
    return graph


WHOLE = _changed(lambda model: None)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (WHOLE[:-1], "damaged"),
        (WHOLE[: len(WHOLE) // 2], "damaged"),
        (WHOLE.replace(b"MatMul", b"M\xfftMul"), "not UTF-8"),
        (WHOLE.replace(b"B\x01w", b"B\x01\xff"), "name is not UTF-8"),
        (WHOLE + b"\0", "unknown field 0"),
        (WHOLE + b"\xfa\x01\x00", "unknown field 31"),
        (WHOLE + b"\x3a\x00", "field 7 twice"),
        (WHOLE + b"\x28", "a number without end"),
        (WHOLE + b"\x28" + b"\xff" * 10 + b"\x01", "a number without end"),
        (WHOLE + b"\x38\x01", "wire type 0"),
        (WHOLE + b"\xa2\x01\x00", "training information"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"PK\x03\x04", "zip"),
        (_changed(lambda m: m.graph.ClearField("node")), "a graph without nodes"),
        (_changed(lambda m: m.graph.ClearField("output")), "without outputs"),
        (_changed(lambda m: m.ClearField("opset_import")), "no opset_import"),
        (_changed(lambda m: m.opset_import.add(domain="ai.onnx", version=3)), "two versions"),
        (_changed(lambda m: m.graph.node.add(op_type="A", domain="evil")), "domain 'evil'"),
        (_changed(lambda m: m.graph.node.add(domain="")), "has no operator"),
        (_changed(lambda m: m.graph.node.add(op_type="Relu", input=["x"])), "has no output"),
        (_changed(lambda m: m.graph.node.add(op_type="A", domain="com.microsoft")),
         "in no opset_import"),
        (_changed(lambda m: m.graph.node.append(node("Relu", "x"))), "another node's output"),
        (_changed(lambda m: m.graph.initializer.append(raw("w", W))), "two initializers"),
        (_changed(lambda m: m.functions.add(name="MatMul", domain="")), "ONNX itself"),
        (_changed(lambda m: m.graph.node.add(
            op_type="If", output=["z"],
            attribute=[helper.make_attribute("then_branch", _nested(25))])),
         "levels deep"),
    ],
)  # fmt: skip
def test_malformed_models_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = write(tmp_path / "m.onnx", data)
    with pytest.raises(InputError) as caught:
        open_checkpoint(path).close()
    assert words in caught.value.message, caught.value.message


def test_functions_of_the_model_itself_are_known(tmp_path: Path) -> None:
    opset = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    nodes = [helper.make_node("F", ["x", "w"], ["y"], domain="own")]
    model = model_of([raw("w", W)], nodes, opsets=opset)
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    model.functions.append(helper.make_function("own", "F", ["a", "b"], ["c"], body, opset[:1]))
    with open_checkpoint(write(tmp_path / "m.onnx", model)) as checkpoint:
        assert checkpoint.info("w").role is Role.UNCLEAR
    model.functions[0].node.append(helper.make_node("G", ["a"], ["d"], domain="evil"))
    refused(write(tmp_path / "m.onnx", model), "domain 'evil'")


@pytest.mark.parametrize("place", ["attribute", "tensors", "sparse", "subgraph", "function"])
def test_data_in_other_files_is_refused_everywhere_else(tmp_path: Path, place: str) -> None:
    (tmp_path / "d").write_bytes(ZEROS)
    outside = external("k", 1, (4,), location="d")
    sparse = onnx.SparseTensorProto(values=outside, indices=raw("", np.arange(4)), dims=[9])
    inner = helper.make_graph([node("Identity", "k", "o")], "i", [], [
        helper.make_tensor_value_info("o", 1, None)], [outside])  # fmt: skip
    made: dict[str, Any] = {
        "attribute": helper.make_node("Constant", [], ["k"], value=outside),
        "tensors": helper.make_node("Constant", [], ["k"], many=[outside]),
        "sparse": helper.make_node("Constant", [], ["k"], sparse_value=sparse),
        "subgraph": helper.make_node("If", ["c"], ["k"], then_branch=inner, else_branch=inner),
    }
    made["function"] = made["attribute"]
    model = model_of([raw("w", W)])
    if place == "function":
        opset = [helper.make_opsetid("", 17)]
        model.functions.append(helper.make_function("own", "F", [], ["k"], [made[place]], opset))
    else:
        model.graph.node.append(made[place])
    refused(write(tmp_path / "m.onnx", model), "its data lies in another file", "'k'")


@pytest.mark.parametrize("kind", ["MatMulNBits", "DequantizeLinear", "QLinearMatMul"])
def test_a_quantized_graph_is_refused_unless_allowed(tmp_path: Path, kind: str) -> None:
    codes, scale = raw("codes", np.zeros((64, 48), np.uint8)), raw("s", np.float32(1))
    point = raw("z", np.uint8(0))
    made = {
        "MatMulNBits": helper.make_node(
            kind, ["x", "codes", "s"], ["y"], name="n", domain="com.microsoft"
        ),
        "DequantizeLinear": helper.make_node(kind, ["i", "s", "z"], ["y"], name="n"),
        "QLinearMatMul": helper.make_node(
            kind, ["x", "s", "z", "codes", "s", "z", "s", "z"], ["y"], name="n"
        ),
    }[kind]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    nodes = [node("Identity", "codes", "i"), made]
    path = write(tmp_path / "m.onnx", model_of([codes, scale, point], nodes, opsets=opsets))
    refused(path, "'codes'", "'n'", kind, "already quantized")
    with open_checkpoint(path, allow_quantized=True) as checkpoint:
        assert checkpoint.info("codes").role is Role.STATE


def test_activations_alone_do_not_make_a_graph_quantized(tmp_path: Path) -> None:
    nodes = [
        node("QuantizeLinear", "x s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("MatMul", "d w"),
    ]
    tensors = [raw("w", W), raw("s", np.float32(1)), raw("z", np.uint8(0))]
    with open_checkpoint(write(tmp_path / "m.onnx", model_of(tensors, nodes))) as checkpoint:
        assert checkpoint.info("w").role is Role.CONV1D


# ---------------------------------------------------------------- against the package onnx


@st.composite
def models(draw: Any) -> bytes:
    """Serialized models with initializers of any type and form."""
    tensors = [raw("w", W[:, :17])]  # large enough not to be loaded
    for number in range(draw(st.integers(0, 4))):
        data_type, kind = draw(st.sampled_from(TYPED))
        shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
        values = np.resize(samples(kind, (12, 5)), shape)
        made = raw(f"t{number}", values)
        if draw(st.booleans()):
            made = helper.make_tensor(f"t{number}", data_type, shape, values.reshape(-1))
        tensors.append(made)
    draw(st.randoms()).shuffle(tensors)
    return bytes(model_of(tensors).SerializeToString())


@settings(
    max_examples=300, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=models(), seed=st.integers(0, 1 << 32), changes=st.integers(0, 3))
def test_what_is_read_is_what_onnx_reads(
    tmp_path: Path, data: bytes, seed: int, changes: int
) -> None:
    """Mutated bytes are refused, or mean to us what they mean to the package onnx."""
    rng = np.random.default_rng(seed)
    mutated = bytearray(data)
    for _ in range(changes):
        reach = len(mutated) if rng.integers(2) else min(300, len(mutated))  # or near the start
        place = int(rng.integers(reach))
        match rng.integers(4):
            case 0:
                mutated[place] = int(rng.integers(256))
            case 1:
                mutated[place] ^= 1 << int(rng.integers(8))
            case 2:
                del mutated[place : place + int(rng.integers(1, 9))]
            case _:
                mutated[place:place] = rng.bytes(int(rng.integers(1, 9)))
    path = write(tmp_path / "m.onnx", bytes(mutated))
    try:
        checkpoint = open_checkpoint(path)
    except CompressError as error:
        assert changes, f"a valid model was refused: {error.message}"
        assert error.message.isprintable() and error.exit_code == 3
        return
    with checkpoint:
        model = ModelProto()
        model.ParseFromString(bytes(mutated))
        known = {t.name: t for t in model.graph.initializer if t.data_type in skeleton.TAGS}
        assert [i.name for i in checkpoint.infos()] == list(known)
        for info in checkpoint.infos():
            wanted = numpy_helper.to_array(known[info.name])
            got = checkpoint.read(info)
            assert got.shape == wanted.shape and got.tobytes() == wanted.tobytes()


# ---------------------------------------------------------------- from end to end


def test_a_graph_with_transposed_and_tied_weights_is_compressed_and_proved(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    nodes = [
        node("Gather", "table input_ids", "e"),
        node("Transpose", "a", "at", perm=[1, 0]),
        node("MatMul", "e at", "h"),
        node("Relu", "h", "r"),
        node("MatMul", "r b", "s"),
        node("Transpose", "table", "tt", perm=[1, 0]),
        node("MatMul", "s tt", "logits"),
    ]
    shapes = {"table": (50, 64), "a": (128, 64), "b": (128, 64)}
    made = [raw(n, (RNG.standard_normal(s) / 8).astype(np.float32)) for n, s in shapes.items()]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", 50])], made,
    )  # fmt: skip
    opset = [helper.make_opsetid("", 17)]
    path = write(tmp_path / "m.onnx", helper.make_model(graph, opset_imports=opset, ir_version=8))
    out = tmp_path / "out"
    words = ["run", str(path), "-o", str(out), "quantize:bits=4,group_size=32", "--no-fsync"]
    done = CliRunner().invoke(cli.app, [*words, "--json"])
    assert done.exit_code == 0, done.output or done.exception
    written = onnx.load(out / "model.onnx", load_external_data=False)
    kinds = sorted(n.op_type for n in written.graph.node)
    assert kinds.count("MatMulNBits") == 2, kinds
    import onnxruntime

    ids = np.random.default_rng(1).integers(0, 50, (2, 9))
    dense, packed = (
        onnxruntime.InferenceSession(str(p)).run(["logits"], {"input_ids": ids})[0]
        for p in (path, out / "model.onnx")
    )
    error = np.linalg.norm(dense - packed) / np.linalg.norm(dense)
    assert 0.01 < error < 0.25, "4 bits, and the same function"
    done = CliRunner().invoke(cli.app, ["unpack", str(out), "-o", str(tmp_path / "plain")])
    assert done.exit_code == 0, done.output or done.exception
    again = onnxruntime.InferenceSession(str(tmp_path / "plain" / "model.onnx"))
    np.testing.assert_allclose(
        again.run(["logits"], {"input_ids": ids})[0], packed, rtol=1e-3, atol=1e-4
    )
