"""Graphs that exporters seldom write: old opsets, shared weights, weights that are outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.checkpoint import open_checkpoint
from compress.errors import InputError
from compress.export_onnx.export import prepare
from compress.export_onnx.options import ExportWords
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass
from compress.run import RunOptions, run

onnxruntime = pytest.importorskip("onnxruntime")

FOUR_BITS, EIGHT_BITS = "quantize:bits=4,group=32", "quantize:bits=8,group=-1"
MATMUL = helper.make_node("MatMul", ["x", "w"], ["y"])


def value(name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def compressed(
    tmp_path: Path, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any],
    shapes: Mapping[str, Sequence[int]], words: Sequence[str], *, opset: int = 17,
    dtype: Any = np.float32, **typed: Any,
) -> dict[str, Any]:  # fmt: skip
    """The report of compressing a graph; what was written has the checker's word."""
    rng = np.random.default_rng(4)
    weights = {n: np.asarray(rng.normal(size=s)).astype(dtype) for n, s in shapes.items()}
    graph = helper.make_graph(
        nodes, "odd", inputs, outputs, [numpy_helper.from_array(w, n) for n, w in weights.items()]
    )
    imports = [helper.make_opsetid("", opset)]
    source, out = tmp_path / "odd.onnx", tmp_path / "out"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), source)
    options = ExportWords(True, **typed).options()
    with open_checkpoint(source) as checkpoint:
        prepared = prepare(checkpoint, options)
        plan = make_plan(checkpoint, Recipe(tuple(parse_pass(w) for w in words)), Options())
        body = run(plan, out, RunOptions(fsync=False, export=prepared)).body
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    assert names(out / "model.onnx") == names(source)
    return dict(body["onnx"])


def names(path: Path) -> list[str]:
    graph = onnx.load(path, load_external_data=False).graph
    return [one.name for one in (*graph.input, *graph.output)]


TWICE = [
    helper.make_node("MatMul", ["x", "w"], ["h"]),
    helper.make_node("MatMul", ["h", "w"], ["y"]),
]


@pytest.mark.parametrize(
    ("words", "typed", "data_bytes"),
    [
        ((FOUR_BITS, "low-rank:rank=4"), {}, 0),
        ((FOUR_BITS,), {"style": "qdq"}, 64 * 64 // 2 + 64 * 2 * 2),
        (("prune:sparsity=0.3", "quantize:bits=4,group=24,on_indivisible=short"), {}, 0),
    ],
    ids=["low rank", "qdq", "odd groups"],
)
def test_a_weight_of_two_products_is_written_once(
    tmp_path: Path, words: Sequence[str], typed: Mapping[str, Any], data_bytes: int
) -> None:
    square = {"w": (64, 64)}
    section = compressed(
        tmp_path, TWICE, [value("x", ["n", 64])], [value("y", ["n", 64])], square, words, **typed
    )
    assert section["data_bytes"] == data_bytes
    assert section["parity"]["exact_relative_error"] < 1e-5
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    places = [[(e.key, e.value) for e in t.external_data] for t in graph.initializer]
    external = [place for place in places if place]
    assert len({tuple(place) for place in external}) == len(external)


def test_a_table_that_is_multiplied_too_is_one(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["w", "ids"], ["rows"]),
        helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows", "turned"], ["y"]),
    ]
    ids, logits = value("ids", ["n", "s"], TensorProto.INT64), value("y", ["n", "s", 50])
    words = ("quantize:bits=4,group=32,symmetric=false,targets=[w]", "low-rank:rank=4,targets=[w]")
    section = compressed(tmp_path, nodes, [ids], [logits], {"w": (50, 64)}, words)
    assert section["operators"] == {
        "GatherBlockQuantized 4 bits": 1, "MatMulNBits 4 bits": 1, "low-rank pairs": 1,
    }  # fmt: skip
    assert section["data_bytes"] == 0


def test_a_weight_that_is_an_output_is_dense(tmp_path: Path) -> None:
    gemm = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    section = compressed(
        tmp_path, [gemm], [value("x", ["n", 64])], [value("y", ["n", 48]), value("w", [48, 64])],
        {"w": (48, 64)}, ("quantize:bits=4,group=32,targets=[w]",),
    )  # fmt: skip
    assert section["dense"] == [{"name": "w", "why": "it is an output of the graph"}]


CONV = [
    helper.make_node("Conv", ["x", "w", "b"], ["maps"], pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["maps"], ["y"]),
]
CONV_SHAPES = {"w": (8, 4, 3, 3), "b": (8,)}


@pytest.mark.parametrize(
    ("opset", "dtype", "raised"),
    [(7, np.float32, 13), (12, np.float32, 13), (13, np.float32, 13), (17, np.float16, 19)],
)
def test_old_convolutions_get_an_opset_with_scales_by_row(
    tmp_path: Path, opset: int, dtype: Any, raised: int
) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    section = compressed(
        tmp_path, CONV, [value("x", ["n", 4, 6, 6], kind)], [value("y", ["n", 8, 6, 6], kind)],
        CONV_SHAPES, (EIGHT_BITS,), opset=opset, dtype=dtype,
    )  # fmt: skip
    assert section["opset"] == raised
    assert section["operators"] == {"DequantizeLinear 8 bits": 1}


def test_scales_of_several_blocks_need_opset_13(tmp_path: Path) -> None:
    x, y = [value("x", ["n", 96])], [value("y", ["n", 48])]
    for words, opset in ((("quantize:bits=4,group=48",), 13), ((FOUR_BITS,), 9)):
        folder = tmp_path / str(opset)
        folder.mkdir()
        section = compressed(folder, [MATMUL], x, y, {"w": (96, 48)}, words, opset=9)
        assert section["opset"] == opset


@pytest.mark.parametrize("shape", [(), (1,), (48,), (1, 48), (1, 1)])
def test_every_shape_of_a_gemms_bias(tmp_path: Path, shape: Sequence[int]) -> None:
    gemm = helper.make_node("Gemm", ["x", "w", "c"], ["y"], transB=1)
    section = compressed(
        tmp_path, [gemm], [value("x", ["n", 64])], [value("y", ["n", 48])],
        {"w": (48, 64), "c": shape}, (FOUR_BITS,),
    )  # fmt: skip
    assert section["operators"] == {"MatMulNBits 4 bits": 1}
    assert section["parity"]["exact_relative_error"] < 1e-5


def test_a_vector_times_a_matrix(tmp_path: Path) -> None:
    section = compressed(
        tmp_path, [MATMUL], [value("x", [64])], [value("y", [48])], {"w": (64, 48)}, (FOUR_BITS,)
    )
    assert section["parity"]["exact_relative_error"] < 1e-5


def test_names_of_the_export_that_the_graph_has_already(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["w.product"], name="w.codes"),
        helper.make_node("Relu", ["w.product"], ["w.scale.cast"], name="b.load"),
        helper.make_node("Add", ["w.scale.cast", "b"], ["b.stored"], name="w.add"),
        helper.make_node("Relu", ["b.stored"], ["y"], name="y.same"),
    ]
    section = compressed(
        tmp_path, nodes, [value("x", ["n", 64])], [value("y", ["n", 48])],
        {"w": (64, 48), "b": (48,)}, (FOUR_BITS, "low-rank:rank=2"),
    )  # fmt: skip
    assert section["parity"]["exact_relative_error"] < 1e-5


def test_double_precision_is_proved_and_named(tmp_path: Path) -> None:
    kind = TensorProto.DOUBLE
    section = compressed(
        tmp_path, [MATMUL], [value("x", ["n", 64], kind)], [value("y", ["n", 48], kind)],
        {"w": (64, 48)}, (FOUR_BITS,), dtype=np.float64,
    )  # fmt: skip
    assert [one["name"] for one in section["dense"]] == ["w"]
    assert section["parity"]["relative_error"] < 1e-6


def test_made_up_images_grow_until_the_graph_takes_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    section = compressed(
        tmp_path, [conv], [value("x", ["n", 3, "h", "w"])], [value("y", ["n", 8, "a", "b"])],
        {"w": (8, 3, 13, 13)}, (EIGHT_BITS,),
    )  # fmt: skip
    assert section["parity"]["inputs"] == "random"
    assert capfd.readouterr().err == ""  # onnxruntime's own words do not reach the user


def test_inputs_that_cannot_be_made_up_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^odd\.onnx: .*made up at random") as caught:
        compressed(
            tmp_path, [MATMUL], [value("x", ["n", "k"])], [value("y", ["n", 48])],
            {"w": (100, 48)}, ("quantize:bits=4,group=20,on_indivisible=short",),
        )  # fmt: skip
    assert caught.value.hint is not None and "--ids" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["odd.onnx"]


def test_outputs_that_are_all_integers_cannot_be_proved(tmp_path: Path) -> None:
    nodes = [MATMUL, helper.make_node("ArgMax", ["y"], ["best"], axis=1)]
    with pytest.raises(InputError, match="no output of floating-point numbers") as caught:
        compressed(
            tmp_path, nodes, [value("x", ["n", 64])], [value("best", ["n", 1], TensorProto.INT64)],
            {"w": (64, 48)}, (FOUR_BITS,),
        )  # fmt: skip
    assert caught.value.hint is not None and "ArgMax" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["odd.onnx"]
