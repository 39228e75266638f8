"""`graph.onnx` of a stranger: what no runtime would load is refused in one line that names it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import onnx_model, produce

from compress.checkpoint.source import open_checkpoint
from compress.errors import InputError
from compress.export_command import _export_onnx
from compress.export_onnx.options import ExportWords
from compress.unpacking import unpack_output

onnx = pytest.importorskip("onnx")
Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of a graph of two products, the second with a transposed weight."""
    root = tmp_path_factory.mktemp("graphs")
    path = onnx_model(root / "source" / "model.onnx")
    model = onnx.load(path)
    weight = model.graph.initializer[1]
    values = np.ascontiguousarray(onnx.numpy_helper.to_array(weight).T)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    turn = onnx.helper.make_node("Transpose", [weight.name], ["turned"], perm=[1, 0])
    model.graph.node.insert(0, turn)
    model.graph.node[-1].input[1] = "turned"
    onnx.save(model, path)
    out = produce(path, root / "out", ["quantize:bits=4,group=32"], "native")
    assert [n.op_type for n in onnx.load(out / "graph.onnx", load_external_data=False).graph.node][
        -1
    ] == "Linear"
    return out


def tampered(honest: Path, out: Path, change: Change) -> Path:
    """A copy of the output whose graph was changed."""
    shutil.copytree(honest, out)
    model = onnx.load(out / "graph.onnx", load_external_data=False)
    change(model)
    (out / "graph.onnx").write_bytes(model.SerializeToString())
    return out


def export(out: Path, target: Path) -> None:
    _export_onnx(
        out, target, ExportWords(True), module=None, ids=None, images=None, samples=None,
        overwrite=False, fsync=False,
    )  # fmt: skip


def refused(out: Path, target: Path, command: Callable[..., Any], **options: Any) -> str:
    """The message with which a command refuses an output; nothing is left of what it wrote."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(InputError) as caught:
        command(out, target, **options)
    assert sorted(out.parent.iterdir()) == before
    assert "graph.onnx" in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


def linear(model: Any) -> Any:
    return model.graph.node[-1]


def _one_input(model: Any) -> None:
    del linear(model).input[1:]


def _unnamed(model: Any) -> None:
    linear(model).input[1] = ""


def _swapped(model: Any) -> None:
    linear(model).input[:] = list(linear(model).input)[::-1]


def _attribute(model: Any) -> None:
    linear(model).attribute.append(onnx.helper.make_attribute("transposed", "abc"))


def _beyond(model: Any) -> None:
    linear(model).attribute.append(onnx.helper.make_attribute("transposed", 2))


def _inside(model: Any) -> None:
    """The product in both branches of an If."""
    node = onnx.NodeProto()
    node.CopyFrom(linear(model))
    node.output[0] = "inner"
    value = onnx.helper.make_tensor_value_info("inner", 1, None)
    branch = onnx.helper.make_graph([node], "b", [], [value])
    truth = onnx.numpy_helper.from_array(np.array(True), "truth")
    model.graph.initializer.append(truth)
    made = onnx.helper.make_node("If", ["truth"], ["y"], then_branch=branch, else_branch=branch)
    linear(model).CopyFrom(made)


def _data_type(number: int) -> Change:
    def change(model: Any) -> None:
        model.graph.initializer[0].data_type = number

    return change


def _opset(version: int) -> Change:
    def change(model: Any) -> None:
        model.opset_import[0].version = version

    return change


def _no_version(model: Any) -> None:
    model.opset_import[0].ClearField("version")
    model.graph.node[-1].output[0] = "q"


def _output(model: Any) -> None:
    model.graph.output[0].name = "q"


def _no_weights(model: Any) -> None:
    del model.graph.initializer[:]


def _no_indices(model: Any) -> None:
    model.graph.node[0].op_type = "Gather"
    model.graph.node[0].input[:] = ["first"]


def _wrong_attribute(model: Any) -> None:
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("axis", "one"))


def _cut_short(model: Any) -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(4, np.int64), "more")
    tensor.raw_data = tensor.raw_data[:-1]
    model.graph.initializer.append(tensor)


UNREADABLE: dict[str, tuple[Change, str]] = {
    "Linear of one input": (_one_input, "1 inputs, it takes 2 or 3"),
    "Linear of an unnamed weight": (_unnamed, "(Linear): 2 inputs, it takes"),
    "Linear, swapped": (_swapped, "second input 'r' is no matrix"),
    "Linear, transposed = abc": (_attribute, "attribute 'transposed'"),
    "Linear, transposed = 2": (_beyond, "attribute 'transposed'"),
    "Linear in a branch": (_inside, "lies in a graph inside of a node"),
    "data type 99": (_data_type(99), "tensor 'first': unknown data type 99"),
    "data type complex64": (_data_type(14), "tensor 'first': data type 14"),
    "opset 0": (_opset(0), "opset 0, the installed package onnx knows 1 to"),
    "opset -1": (_opset(-1), "opset -1,"),
    "opset 999": (_opset(999), "opset 999,"),
    "opset 2^40": (_opset(1 << 40), "opset 1099511627776,"),
    "opset without a version": (_no_version, "opset 0,"),
    "output of nothing": (_output, "nothing computes the output 'q'"),
    "no weights": (_no_weights, "reads 'first', which is no input"),
    "Gather of one input": (_no_indices, "input size 1 not in range"),
    "MatMul with an attribute": (_wrong_attribute, "Unrecognized attribute: axis"),
    "data that is cut short": (_cut_short, "tensor 'more': 31 bytes of data"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_graph_that_is_none_is_refused_when_it_is_read(
    honest: Path, tmp_path: Path, name: str
) -> None:
    change, message = UNREADABLE[name]
    out = tampered(honest, tmp_path / "out", change)
    assert message in refused(out, tmp_path / "plain", unpack_output, fsync=False)
    assert message in refused(out, tmp_path / "graph", export)


@pytest.mark.parametrize("change", [_output, _opset(999), _no_indices])
def test_a_source_is_held_to_the_same(tmp_path: Path, change: Change) -> None:
    """Else its output could not be read."""
    path = onnx_model(tmp_path / "source" / "model.onnx")
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"^model\.onnx: "):
        open_checkpoint(path)


# -- what only a runtime sees, when the weights are in place ---------------------------------------


def _half(model: Any) -> None:
    model.graph.initializer[0].data_type = onnx.TensorProto.FLOAT16


def _other_matrix(model: Any) -> None:
    model.graph.node[0].input[1] = "second"


def _text(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.STRING


def _old_cast(model: Any) -> None:
    """A function's name where opset 1 wants the number of a type."""
    model.opset_import[0].version = 1
    cast = onnx.helper.make_node("Cast", ["x"], ["c"], to="NOTHING")
    model.graph.node.insert(0, cast)
    model.graph.node[1].input[0] = "c"


UNLOADABLE: dict[str, tuple[Change, str]] = {
    "integers for floats": (_data_type(7), "reads the weight first as I64"),
    "half for single": (_half, "bound to different types"),
    "a matrix that does not fit": (_other_matrix, "Incompatible dimensions"),
    "an input of text": (_text, "tensor(string)"),
    "a cast to no type": (_old_cast, "does not load it"),
}


@pytest.mark.parametrize("name", UNLOADABLE)
def test_unpack_publishes_no_graph_that_cannot_be_loaded(
    honest: Path, tmp_path: Path, name: str
) -> None:
    change, message = UNLOADABLE[name]
    out = tampered(honest, tmp_path / "out", change)
    assert message in refused(out, tmp_path / "plain", unpack_output, fsync=False)


def _without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)


def test_without_onnxruntime_the_checker_decides(
    honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_onnxruntime(monkeypatch)
    out = tampered(honest, tmp_path / "out", _other_matrix)
    assert "package onnx" in refused(out, tmp_path / "plain", unpack_output, fsync=False)
    unpack_output(honest, tmp_path / "plain", fsync=False)
    assert (tmp_path / "plain" / "model.onnx").is_file()


def _bfloat16(model: Any) -> None:
    """No processor has a kernel for it: the graph is right all the same."""
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    for tensor in model.graph.initializer:
        tensor.data_type = onnx.TensorProto.BFLOAT16


def _unheard_of(model: Any) -> None:
    """An operator of a newer onnxruntime."""
    made = onnx.helper.make_node("NewerThanThis", ["x"], ["n"], domain="com.microsoft")
    model.graph.node.append(made)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


@pytest.mark.parametrize("change", [_bfloat16, _unheard_of])
def test_what_this_machine_cannot_run_is_unpacked(
    honest: Path, tmp_path: Path, change: Change
) -> None:
    out = tampered(honest, tmp_path / "out", change)
    unpack_output(out, tmp_path / "plain", fsync=False)
    onnx.checker.check_model(str(tmp_path / "plain" / "model.onnx"), full_check=True)


# -- the export and its proof ----------------------------------------------------------------------


def _vast(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1 << 40


def test_the_proof_makes_up_no_vast_inputs(honest: Path, tmp_path: Path) -> None:
    out = tampered(honest, tmp_path / "out", _vast)
    message = refused(out, tmp_path / "graph", export)
    assert "its inputs, x [1099511627776, 64] among them, are more than 268,435,456" in message


def test_many_open_axes_take_no_more(honest: Path, tmp_path: Path) -> None:
    """Lengths are tried until the graph runs; the longest of five open axes would be 20 GB."""
    names = ["a", "b", "c", "d", "e"]

    def change(model: Any) -> None:
        value = onnx.helper.make_tensor_value_info("wide", onnx.TensorProto.FLOAT, names)
        model.graph.input.append(value)
        shape = onnx.numpy_helper.from_array(np.array([7], np.int64), "seven")
        model.graph.initializer.append(shape)
        model.graph.node.append(onnx.helper.make_node("Reshape", ["wide", "seven"], ["never"]))

    out = tampered(honest, tmp_path / "out", change)
    assert "onnxruntime cannot run it" in refused(out, tmp_path / "graph", export)


def test_a_conversion_that_onnx_refuses_is_an_input_error() -> None:
    from compress.export_onnx.opset import raised

    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["q"])
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [1])], [value("y", 1, [1])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)])
    with pytest.raises(InputError, match="cannot be raised to opset 21"):
        raised(model, 21)


def test_a_graph_of_onnxruntimes_own_operators_gets_an_opset(honest: Path, tmp_path: Path) -> None:
    """What is put into it are operators of ONNX itself."""

    def change(model: Any) -> None:
        del model.graph.node[:-1]
        model.graph.node[-1].input[0] = "r"
        made = onnx.helper.make_node("FusedMatMul", ["x", "first"], ["r"], domain="com.microsoft")
        model.graph.node.insert(0, made)
        kept = [o for o in model.opset_import if o.domain == "compress"]
        del model.opset_import[:]
        model.opset_import.extend([*kept, onnx.helper.make_opsetid("com.microsoft", 1)])

    out = tampered(honest, tmp_path / "out", change)
    export(out, tmp_path / "graph")
    made = onnx.load(tmp_path / "graph" / "model.onnx", load_external_data=False)
    assert {o.domain for o in made.opset_import} == {"", "com.microsoft"}
