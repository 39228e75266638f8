"""The lowered graph against numpy on the decoded weights: every term, operator and format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from compress.checkpoint import open_checkpoint, skeleton
from compress.evaluate.onnx_outputs import is_old
from compress.export_onnx.builder import DATA_FILE
from compress.export_onnx.lowering import Lowered, lower
from compress.export_onnx.pieces import in_pieces
from compress.export_onnx.stored import of_output
from compress.export_onnx.style import Style
from compress.output import open_any
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass
from compress.run import RunOptions, run

onnxruntime = pytest.importorskip("onnxruntime")

SHAPES = {
    "layers.0.q_proj.weight": (48, 64),
    "layers.0.out_proj.weight": (40, 100),  # no block divides the columns
    "layers.0.fc.weight": (32, 72),
    "model.embed_tokens.weight": (50, 64),
    "features.conv.weight": (12, 8, 3, 3),
}
LINEAR = [name for name, shape in SHAPES.items() if "layers" in name]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one weight of each kind, and biases."""
    rng = np.random.default_rng(7)
    folder = tmp_path_factory.mktemp("kinds")
    arrays = {n: rng.normal(size=s).astype(np.float32) / 8 for n, s in SHAPES.items()}
    arrays["layers.0.q_proj.weight"][5, 9] = 40.0  # a super weight
    for name in LINEAR:
        arrays[name.replace("weight", "bias")] = rng.normal(size=SHAPES[name][0]).astype(np.float32)
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    return folder


def graph_of_kinds(opset: int = 21, data_type: int = TensorProto.FLOAT) -> Any:
    """The skeleton: a node for each weight, an output for each node."""
    nodes, inputs, outputs, initializers = [], [], [], []
    for name in LINEAR:
        rows, columns = SHAPES[name]
        x, y = f"x.{name}", f"y.{name}"
        bias = name.replace("weight", "bias")
        nodes.append(helper.make_node("Linear", [x, name, bias], [y], domain=skeleton.DOMAIN))
        inputs.append(helper.make_tensor_value_info(x, data_type, ["b", "s", columns]))
        outputs.append(helper.make_tensor_value_info(y, data_type, ["b", "s", rows]))
        initializers.append(skeleton.weight(name, data_type, (rows, columns)))
        initializers.append(skeleton.weight(bias, data_type, (rows,)))
    table, conv = "model.embed_tokens.weight", "features.conv.weight"
    nodes.append(helper.make_node("Gather", [table, "ids"], ["rows"], axis=0))
    nodes.append(helper.make_node("Conv", ["image", conv], ["maps"], pads=[1, 1, 1, 1]))
    inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"]))
    inputs.append(helper.make_tensor_value_info("image", data_type, ["b", 8, 6, 6]))
    outputs.append(helper.make_tensor_value_info("rows", data_type, ["b", "s", 64]))
    outputs.append(helper.make_tensor_value_info("maps", data_type, ["b", 12, 6, 6]))
    initializers += [skeleton.weight(n, data_type, SHAPES[n]) for n in (table, conv)]
    graph = helper.make_graph(nodes, "kinds", inputs, outputs, initializers)
    domains = [helper.make_opsetid("", opset), helper.make_opsetid(skeleton.DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


def compressed(model: Path, out: Path, words: Sequence[str], fmt: str) -> None:
    """`compress run`, in this process."""
    recipe = Recipe(tuple(parse_pass(word) for word in words))
    with open_checkpoint(model) as checkpoint:
        run(make_plan(checkpoint, recipe, Options(format=fmt)), out, RunOptions(fsync=False))


def data_of(lowered: Lowered) -> bytes:
    """`model.onnx.data`, in memory."""
    data = bytearray(lowered.data_bytes)
    for copy in lowered.copies:
        made = np.ascontiguousarray(copy.make()).tobytes()
        assert len(made) == copy.nbytes
        data[copy.offset : copy.offset + copy.nbytes] = made
    return bytes(data)


def export(out: Path, style: Style, graph: Any | None = None) -> Lowered:
    """Lower the graph over an output and write the two files into it."""
    with open_any(out) as checkpoint:
        lowered = lower(graph or graph_of_kinds(), of_output(checkpoint), style)
        (out / DATA_FILE).write_bytes(data_of(lowered))
    (out / "model.onnx").write_bytes(lowered.model.SerializeToString())
    onnx.checker.check_model(str(out / "model.onnx"))
    return lowered


def check(out: Path, tolerance: float = 2e-5) -> None:
    """Every output of the graph is what numpy makes of the decoded weights."""
    rng = np.random.default_rng(3)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(out / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    feed: dict[str, Any] = {
        "ids": rng.integers(0, 50, (2, 3)),
        "image": rng.normal(size=(2, 8, 6, 6)),
    }
    feed |= {f"x.{n}": rng.normal(size=(2, 3, SHAPES[n][1])) for n in LINEAR}
    feed = {k: v if k == "ids" else v.astype(np.float32) for k, v in feed.items()}
    got = dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))
    with open_any(out) as checkpoint:
        held = {n: checkpoint.read(checkpoint.info(n)).astype(np.float64) for n in SHAPES}
        bias = {n: checkpoint.read(checkpoint.info(n.replace("weight", "bias"))) for n in LINEAR}
    wanted = {f"y.{n}": feed[f"x.{n}"] @ held[n].T + bias[n] for n in LINEAR}
    wanted["rows"] = held["model.embed_tokens.weight"][feed["ids"]]
    padded = np.pad(feed["image"], ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    wanted["maps"] = np.einsum("bcxykl,ockl->boxy", patches, held["features.conv.weight"])
    assert wanted.keys() == got.keys()
    for name, values in wanted.items():
        error = np.abs(got[name] - values).max() / np.abs(values).max()
        assert error < tolerance, (name, error)


ALL = "targets=*weight"
RECIPES: dict[str, tuple[str, ...]] = {
    "4 bits in groups": ("quantize:bits=4,group=32,targets=*_proj*,on_indivisible=short",),
    "2 bits": ("quantize:bits=2,group=32,targets=*q_proj*",),
    "8 bits in rows": (f"quantize:bits=8,group=-1,{ALL}",),
    "3 bits": (f"quantize:bits=3,group=16,on_indivisible=short,{ALL}",),
    "5 bits": ("quantize:bits=5,group=24,on_indivisible=short,targets=*layers*weight",),
    "zero points": (f"quantize:bits=4,group=8,symmetric=false,on_indivisible=short,{ALL}",),
    "zero points in blocks": ("quantize:bits=4,group=32,symmetric=false,on_indivisible=short",),
    "whole rows with zero points": ("quantize:bits=8,group=-1,symmetric=false",),
    "pruned": ("prune:sparsity=0.5", "quantize:bits=4,group=32,on_indivisible=short"),
    "factors": ("quantize:bits=4,group=32,on_indivisible=short", "low-rank:rank=4"),
    "super weights": (
        "super-weights:targets=*q_proj*",
        "quantize:bits=4,group=32,targets=*_proj*,on_indivisible=short",
    ),
    "only pruned": ("prune:sparsity=0.5",),
}  # fmt: skip


@pytest.mark.parametrize("fmt", ["onnx", "native", "auto"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_term_runs_as_it_decodes(model: Path, tmp_path: Path, recipe: str, fmt: str) -> None:
    out = tmp_path / "out"
    compressed(model, out, RECIPES[recipe], fmt)
    export(out, Style(accuracy_level=0))
    if recipe == "2 bits" and is_old(onnxruntime.__version__):
        with pytest.raises(Exception, match="MatMulNBits"):
            check(out)
        return
    check(out)


def test_a_table_that_is_multiplied_too_is_written_once(model: Path, tmp_path: Path) -> None:
    name, out = "model.embed_tokens.weight", tmp_path / "out"
    compressed(model, out, (f"quantize:bits=3,group=16,targets={name}",), "native")
    graph = graph_of_kinds()
    graph.graph.node.append(
        helper.make_node("Linear", ["h", name], ["logits"], domain=skeleton.DOMAIN)
    )
    graph.graph.input.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["b", 64]))
    graph.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 50]))
    for style in (Style(), Style(self_contained=True)):
        lowered = export(out, style, graph)
        assert [n.op_type for n in lowered.model.graph.node].count("GatherBlockQuantized") == 1
        codes = [c.nbytes for c in lowered.copies if name in c.name and c.nbytes >= 50 * 64 // 2]
        assert codes == [50 * 64 // 2]  # 3 bits are widened to 4


def test_large_products_in_pieces_give_the_same(model: Path, tmp_path: Path) -> None:
    name, out = "layers.0.q_proj.weight", tmp_path / "out"
    compressed(model, out, (f"quantize:bits=8,group=16,symmetric=false,targets={name}",), "native")
    made = export(out, Style(accuracy_level=0)).model
    in_pieces(made, most=64 * 20)
    (out / "model.onnx").write_bytes(made.SerializeToString())
    onnx.checker.check_model(str(out / "model.onnx"))
    sizes = [a.i for n in made.graph.node if n.op_type == "MatMulNBits" for a in n.attribute
             if a.name == "N"]  # fmt: skip
    assert sizes == [20, 20, 8]
    check(out)


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_of_16_bits_is_not_widened_for_its_rows(tmp_path: Path, tied: bool) -> None:
    name = "model.embed_tokens.weight"
    table = np.random.default_rng(0).normal(size=(50, 64)).astype(ml_dtypes.bfloat16)
    save_file({name: table}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    nodes = [helper.make_node("Gather", [name, "ids"], ["rows"], axis=0)]
    outputs = [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["b", "s", 64])]
    if tied:
        domain = skeleton.DOMAIN
        nodes.append(helper.make_node("Linear", ["rows", name], ["logits"], domain=domain))
        outputs.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", 50]))
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])
    held = [skeleton.weight(name, TensorProto.FLOAT, (50, 64))]
    graph = helper.make_graph(nodes, "table", [ids], outputs, held)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid(skeleton.DOMAIN, 1)]
    made = helper.make_model(graph, opset_imports=domains, ir_version=10)
    with open_checkpoint(tmp_path) as checkpoint:
        model = lower(made, of_output(checkpoint), Style()).model
    gather = next(n for n in model.graph.node if n.op_type == "Gather")
    (stored,) = (t for t in model.graph.initializer if t.name == gather.input[0])
    assert stored.data_type == TensorProto.BFLOAT16
    assert [n.op_type for n in model.graph.node].count("Cast") == (2 if tied else 1)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {"ids": np.array([[3, 4, 49]])})
    wide = table.astype(np.float32)
    np.testing.assert_array_equal(found[0], wide[[[3, 4, 49]]])
    if tied:
        np.testing.assert_allclose(found[1], wide[[[3, 4, 49]]] @ wide.T, atol=1e-4)
