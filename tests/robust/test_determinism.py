"""The same bytes, whatever the threads, the environment, the place and the instruction set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from toolbox import tiny_llama, tool, tool_process, tree

CHAIN = ("super-weights", "prune:sparsity=0.4", "quantize:bits=4,group=32", "low-rank:rank=4")
# Low-rank factors go through BLAS, which promises its bits on one machine type only.
EXACT = ("super-weights", "prune:sparsity=0.4", "quantize:bits=3,group=32")
ENVIRONMENTS: dict[str, Mapping[str, str]] = {
    "hash seed 0": {"PYTHONHASHSEED": "0"},
    "hash seed 1": {"PYTHONHASHSEED": "1"},
    "C": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"},
    "Turkish, Tokyo": {"LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Tokyo"},
    "narrow": {"COLUMNS": "20", "NO_COLOR": "1", "TERM": "dumb"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("determinism") / "model"
    return tiny_llama(folder, dtype=ml_dtypes.bfloat16, hidden=128, ffn=320, shards=2)


@pytest.fixture(scope="module")
def wanted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SHA-256 of every file of the chain's output, its report and the run block apart."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    assert tool("run", model, "-o", out, *CHAIN, "--jobs", "1").returncode == 0
    return tree(out)


@pytest.mark.parametrize("jobs", range(2, 9))
def test_threads(model: Path, wanted: Mapping[str, str], tmp_path: Path, jobs: int) -> None:
    words = ("--jobs", str(jobs), "--memory", "2MB")
    assert tool("run", model, "-o", tmp_path / "out", *CHAIN, *words).returncode == 0
    assert tree(tmp_path / "out") == wanted


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment(model: Path, wanted: Mapping[str, str], tmp_path: Path, name: str) -> None:
    done = tool_process("run", model, "-o", tmp_path / "out", *CHAIN, **ENVIRONMENTS[name])
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == wanted


def test_working_directory(model: Path, wanted: Mapping[str, str], tmp_path: Path) -> None:
    elsewhere = tmp_path / "a" / "b"
    elsewhere.mkdir(parents=True)
    done = tool("run", model, "-o", "../out", *CHAIN, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "a" / "out") == wanted


def test_where_the_source_lies(model: Path, wanted: Mapping[str, str], tmp_path: Path) -> None:
    """Another folder and other times of the files change the fingerprint alone."""
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in model.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert tool("run", moved, "-o", tmp_path / "out", *CHAIN).returncode == 0
    found = tree(tmp_path / "out")
    assert {n: h for n, h in found.items() if n != "manifest.json"} == {
        n: h for n, h in wanted.items() if n != "manifest.json"
    }


def test_instruction_sets(model: Path, tmp_path: Path) -> None:
    """The numpy reference, portable C++ and every instruction set that this processor has."""
    compiled = pytest.importorskip("compress.kernels._cpu")
    sets = ["reference", *compiled.available_isas()]
    trees = []
    for isa in sets:
        out = tmp_path / isa
        done = tool_process("run", model, "-o", out, *EXACT, COMPRESS_ISA=isa)
        assert done.returncode == 0, done.stderr
        trees.append(tree(out))
    assert all(found == trees[0] for found in trees)


def test_graphs(tmp_path: Path) -> None:
    """An .onnx file: the graphs that come out are the same bytes too."""
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(64, 96)), "v": rng.normal(size=(96, 64))}
    inits = [onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items()]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["h"]),
        onnx.helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "net", [value("x", 1, ["n", 64])], [value("y", 1, ["n", 64])], inits
    )
    made = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10
    )
    onnx.save(made, tmp_path / "net.onnx")
    trees = []
    for number, seed in enumerate("01"):
        out = tmp_path / f"out{number}"
        words = ("quantize:bits=4,group=32", "low-rank:rank=2", "--jobs", str(1 + number))
        done = tool_process("run", tmp_path / "net.onnx", "-o", out, *words, PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
        trees.append(tree(out))
    assert "model.onnx" in trees[0] and trees[0] == trees[1]
