"""`--onnx` and `export`: what is written, what is proven, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from toolbox import tool, tool_json

from compress.checkpoint import open_checkpoint, skeleton
from compress.errors import GateError
from compress.export_onnx.export import Prepared, prepare
from compress.export_onnx.options import ExportWords
from compress.output import in_float32, open_any
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass
from compress.report import Report
from compress.run import RunOptions, run

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FOUR_BITS, EIGHT_BITS = "quantize:bits=4,group=32", "quantize:bits=8,group=-1"
SUPER = 'super-weights:method=named,coordinates=["model.layers.0.mlp.down_proj.weight:3:5"]'


@pytest.fixture(scope="module")
def llama(tried: Any) -> Path:
    return tried("llama").path  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def captured(tried: Any) -> Prepared:
    """The graph: it depends on the config and the headers alone."""
    made = tried("llama").captured
    return Prepared(made.model, made.task, ExportWords(True).options())


def test_what_is_captured_is_what_is_prepared(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.export_onnx import capture

    wanted = ExportWords(True, opset=20).options()
    made = capture.Captured("graph", "decoder", (), (), (), "LlamaForCausalLM")
    seen = []

    def fake(checkpoint: Any, *, opset: int, progress: Any) -> Any:
        seen.append((checkpoint.path, opset))
        return made

    monkeypatch.setattr(capture, "capture", fake)
    with open_checkpoint(llama) as checkpoint:
        assert prepare(checkpoint, wanted) == Prepared("graph", "decoder", wanted)
    assert seen == [(llama, 20)]


def compressed(
    model: Path,
    out: Path,
    words: Sequence[str],
    graph: Prepared | None,
    **typed: Any,
) -> Report:
    """`compress run --onnx` in this process, with a graph that was captured before."""
    recipe = Recipe(tuple(parse_pass(word) for word in words))
    options = ExportWords(True, **typed).options()
    with open_checkpoint(model) as checkpoint:
        made = graph if graph is not None else prepare(checkpoint, options)
        prepared = Prepared(made.graph, made.task, options)
        plan = make_plan(checkpoint, recipe, Options(onnx=True))
        return run(plan, out, RunOptions(fsync=False, export=prepared))


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def places(path: Path) -> set[str]:
    """The files that a graph's external data lies in."""
    model = onnx.load(path, load_external_data=False)
    return {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


@pytest.mark.parametrize(
    ("words", "fmt", "files"),
    [
        ((FOUR_BITS,), "compressed-tensors", {"model.safetensors"}),
        (
            (SUPER, FOUR_BITS, "low-rank:rank=4"),
            "compressed-tensors",
            {"model.safetensors", "adapter/adapter_model.safetensors"},
        ),
        (("quantize:bits=3,group=32",), "onnx", {"model.compress.safetensors"}),
        (("prune:sparsity=0.5",), "dense", {"model.safetensors"}),
    ],
    ids=["codes", "every term", "3 bits", "pruned"],
)
def test_the_graph_reads_the_weight_files(
    llama: Path, captured: Prepared, tmp_path: Path, words: Sequence[str], fmt: str, files: set[str]
) -> None:
    out = tmp_path / "out"
    body = compressed(llama, out, words, captured).body
    assert body["format"] == fmt
    assert places(out / "model.onnx") == files
    found = body["onnx"]
    assert found["data_bytes"] == 0 and not (out / "model.onnx.data").exists()
    assert found["parity"]["exact_relative_error"] < 1e-5
    assert found["parity"]["relative_error"] < 1e-5  # 4 bits are exact unless asked
    assert found["shared_bytes"] <= sum((out / f).stat().st_size for f in files)
    assert body["files"]["model.onnx"] == (out / "model.onnx").stat().st_size
    onnx.checker.check_model(str(out / "model.onnx"))
    raw = (out / "model.onnx").read_bytes()
    assert b"site-packages" not in raw and str(tmp_path).encode() not in raw
    assert tool("verify", out).returncode == 0


def test_greedy_tokens_with_the_cache_are_our_decodes(
    llama: Path, captured: Prepared, tmp_path: Path
) -> None:
    import torch

    from compress.runtime.architecture import build
    from compress.runtime.loading import WeightLoader

    out = tmp_path / "out"
    compressed(llama, out, (FOUR_BITS,), captured)
    with open_any(out) as output:
        model = build(output.config, torch.float32, str(out))
        WeightLoader(in_float32(output), model, None).run()
    prompt = [3, 17, 5, 40]
    wanted = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            wanted.append(int(model(torch.tensor([wanted])).logits[0, -1].argmax()))
    runner = session(out / "model.onnx")
    names = [o.name for o in runner.get_outputs()]
    past = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
        for i in runner.get_inputs()
        if i.name.startswith("past")
    }
    assert past
    found, given = list(prompt), list(prompt)
    for _ in range(12):
        length = len(found)
        feed = past | {
            "input_ids": np.array([given]),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length - len(given), length)[None],
        }
        got = dict(zip(names, runner.run(None, feed), strict=True))
        past = {n: got[n.replace("past_key_values", "present")] for n in past}
        given = [int(got["logits"][0, -1].argmax())]
        found += given
    assert found == wanted


def test_a_graph_that_differs_is_not_published(
    llama: Path, captured: Prepared, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(GateError, match="away from our decode"):
        compressed(llama, out, (FOUR_BITS,), captured, accuracy_level=4, tolerance=1e-6)
    assert not out.exists() and not list(tmp_path.glob(".*"))
    report = compressed(llama, out, (FOUR_BITS,), captured, accuracy_level=4)
    parity = report.body["onnx"]["parity"]
    assert parity["exact_relative_error"] < 1e-5 < parity["relative_error"] < 0.1


def test_a_wrong_operator_fails_the_proof(
    llama: Path, captured: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof finds what a wrong lowering would do, whatever the tolerance."""
    from compress.export_onnx import matrices

    monkeypatch.setattr(matrices.Matrix, "pairs", lambda self: [])
    with pytest.raises(GateError, match="with exact products"):
        compressed(llama, tmp_path / "out", (FOUR_BITS, "low-rank:rank=4"), captured, tolerance=9.0)
    assert not (tmp_path / "out").exists()


# -- an .onnx file as the source -----------------------------------------------------------------


def network(path: Path, opset: int = 17, dtype: Any = np.float32) -> Path:
    """Gather, MatMul, Gemm, a Conv, an Add that nobody can compress."""
    rng = np.random.default_rng(1)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    arrays = {
        "table": rng.normal(size=(40, 64)), "w": rng.normal(size=(64, 96)) / 8,
        "v": rng.normal(size=(48, 96)) / 8, "c": rng.normal(size=48),
        "kernel": rng.normal(size=(8, 4, 3, 3)) / 4, "shift": rng.normal(size=(1, 96)),
    }  # fmt: skip
    inits = [numpy_helper.from_array(a.astype(dtype), n) for n, a in arrays.items()]
    inits.append(numpy_helper.from_array(np.array([-1, 96]), "flat"))
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Reshape", ["h", "flat"], ["rows"]),
        helper.make_node("Add", ["rows", "shift"], ["moved"]),
        helper.make_node("Gemm", ["moved", "v", "c"], ["y"], transB=1),
        helper.make_node("Conv", ["image", "kernel"], ["maps"], pads=[1, 1, 1, 1]),
    ]
    value = helper.make_tensor_value_info
    inputs = [value("ids", TensorProto.INT64, ["n", 16]), value("image", kind, ["n", 4, "h", "w"])]
    outputs = [value("y", kind, ["rows", 48]), value("maps", kind, ["n", 8, "h", "w"])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, inits)
    imports = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def signature(path: Path) -> list[tuple[str, list[Any]]]:
    runner = session(path)
    return [(v.name, v.shape) for v in (*runner.get_inputs(), *runner.get_outputs())]


def outputs_of(path: Path) -> list[Any]:
    rng = np.random.default_rng(5)
    runner = session(path)
    feed = {"ids": rng.integers(0, 40, (1, 16)), "image": rng.normal(size=(1, 4, 5, 7))}
    kinds = {i.name: i.type for i in runner.get_inputs()}
    half = kinds["image"] == "tensor(float16)"
    feed["image"] = feed["image"].astype(np.float16 if half else np.float32)
    return runner.run(None, feed)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("words", "operators"),
    [
        ((FOUR_BITS + ",on_indivisible=short",), {"MatMulNBits 4 bits", "DequantizeLinear 4 bits"}),
        (("quantize:bits=8,group=-1",), {"MatMulNBits 8 bits", "DequantizeLinear 8 bits"}),
        (("prune:sparsity=0.3",), set()),
    ],
    ids=["4 bits", "8 bits", "pruned"],
)
def test_an_onnx_file_comes_out_as_one(
    tmp_path: Path, words: Sequence[str], operators: set[str]
) -> None:
    source, out = network(tmp_path / "net.onnx"), tmp_path / "out"
    body = compressed(source, out, words, None, accuracy_level=0).body
    assert set(body["onnx"]["operators"]) == operators
    assert [one["name"] for one in body["left_alone"]] == ["table", "shift"]
    assert signature(out / "model.onnx") == signature(source)
    plain = tmp_path / "plain"
    assert tool("unpack", out, "-o", plain).returncode == 0
    assert signature(plain / "model.onnx") == signature(source)
    for got, wanted in zip(outputs_of(out / "model.onnx"), outputs_of(plain / "model.onnx"),
                           strict=True):  # fmt: skip
        assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("opset", [11, 13, 21])
def test_old_graphs_are_raised_where_operators_need_it(tmp_path: Path, opset: int) -> None:
    source, out = network(tmp_path / "net.onnx", opset), tmp_path / "out"
    words = ("quantize:bits=4,group=12,on_indivisible=short",)  # no block fits 12
    body = compressed(source, out, words, None).body
    assert body["onnx"]["opset"] == 21
    assert signature(out / "model.onnx") == signature(source)


def test_half_precision_graphs_stay_so(tmp_path: Path) -> None:
    source, out = network(tmp_path / "net.onnx", 17, np.float16), tmp_path / "out"
    body = compressed(
        source, out, (FOUR_BITS + ",on_indivisible=short",), None, tolerance=0.01
    ).body
    assert body["onnx"]["parity"]["relative_error"] < 0.01
    assert signature(out / "model.onnx") == signature(source)


def test_export_again_in_place_and_elsewhere(tmp_path: Path) -> None:
    source, out = network(tmp_path / "net.onnx"), tmp_path / "out"
    compressed(source, out, ("quantize:bits=4,group=32,targets=[w,v]",), None)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    body = tool_json("export", out, "--to", "onnx", "--onnx-style", "qdq")
    assert set(body["onnx"]["operators"]) == {"DequantizeLinear 4 bits"}
    assert body["onnx"]["data_bytes"] > 0
    assert tool("verify", out).returncode == 0
    kept = {"model.compress.safetensors", skeleton.FILE, "recipe.yaml"}
    assert {n: (out / n).read_bytes() for n in kept} == {n: before[n] for n in kept}
    other = tmp_path / "other"
    tool_json("export", out, "--to", "onnx", "-o", other)
    assert places(other / "model.onnx") == {"model.onnx.data"}
    shutil.rmtree(out)  # the other directory needs nothing of it
    assert signature(other / "model.onnx") == signature(source)
    assert tool("verify", other).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("run", "{net}", "-o", "{out}", FOUR_BITS, "--onnx-style", "odd"), 2, "odd: unknown"),
        (("run", "{llama}", "-o", "{out}", FOUR_BITS, "--self-contained"), 2, "add --onnx"),
        (("run", "{llama}", "-o", "{out}", FOUR_BITS, "--onnx", "--onnx-opset", "5"), 2, "18 to"),
        (("export", "{llama}", "--to", "onnx"), 2, "add -o DIR"),
        (("export", "{llama}", "--to", "gguf"), 2, "one of onnx"),
        (("export", "{llama}", "--to", "genai"), 2, "add -o DIR"),
        (("export", "{net}.not", "--to", "onnx"), 2, "no such file"),
        (("run", "{net}", "-o", "{out}", EIGHT_BITS, "--onnx-opset", "25"), 2, "keeps its own"),
        (("run", "{net}", "-o", "{out}", EIGHT_BITS, "--image-shape", "8,8,3"), 2, "no --module"),
        (("export", "{net}", "--to", "onnx", "-o", "{out}", "--onnx-opset", "25"), 2, "its own"),
        (("export", "{net}", "--to", "onnx", "-o", "{out}", "--no-build"), 2, "--build: it means"),
        (("export", "{llama}", "--to", "genai", "-o", "{out}", "--self-contained"), 2, "nothing"),
        (("export", "{llama}", "--to", "dense", "-o", "{out}", "--onnx-opset", "21"), 2, "nothing"),
        (
            (
                "run",
                "{llama}",
                "-o",
                "{out}",
                FOUR_BITS,
                "--onnx",
                "--onnx-style",
                "qdq",
                "--onnx-accuracy-level",
                "0",
            ),
            2,
            "has none",
        ),
    ],
)
def test_refusals(
    llama: Path, tmp_path: Path, arguments: Sequence[str], code: int, said: str
) -> None:
    names = {"net": network(tmp_path / "net.onnx"), "llama": llama, "out": tmp_path / "out"}
    done = tool(*(str(word).format(**names) for word in arguments))
    assert done.returncode == code, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_plan_knows_the_graph_to_the_byte(tmp_path: Path) -> None:
    source, out = network(tmp_path / "net.onnx"), tmp_path / "out"
    words = FOUR_BITS + ",on_indivisible=short"
    planned = tool_json("plan", source, words)
    compressed(source, out, (words,), None)
    sizes = {p.name: p.stat().st_size for p in out.iterdir()}
    assert planned["onnx_bytes"] == [sizes["model.onnx"]] * 2
    assert planned["bytes"][0] == sum(
        size for name, size in sizes.items()
        if name not in ("model.onnx", "report.json", "manifest.json")
    )  # fmt: skip


def test_a_changed_skeleton_is_refused(tmp_path: Path) -> None:
    source, out = network(tmp_path / "net.onnx"), tmp_path / "out"
    compressed(source, out, (FOUR_BITS + ",on_indivisible=short",), None)
    model = onnx.load(out / skeleton.FILE, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "/etc/passwd"
    (out / skeleton.FILE).write_bytes(model.SerializeToString())
    done = tool("export", out, "--to", "onnx")
    assert done.returncode == 3 and "lie elsewhere" in done.stderr
    assert json.loads((out / "manifest.json").read_text())["format"] == "onnx"
