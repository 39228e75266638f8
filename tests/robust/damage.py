"""Outputs of every kind, and ways to damage them; used by the tests and by bench/flips.py."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from toolbox import tiny_llama

from compress.checkpoint import open_checkpoint
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass
from compress.run import RunOptions, run

SHARD = 20_000  # bytes: makes shards of the small model
KINDS = {
    "native": ("native", ["prune:sparsity=0.5", "quantize:bits=3,group=32", "super-weights"]),
    "sharded": ("native", ["quantize:bits=5,group=-1", "low-rank:rank=2"]),
    "compressed-tensors": ("compressed-tensors", ["quantize:bits=4,group=32"]),
    "adapter": ("compressed-tensors", ["quantize:bits=4,group=32", "low-rank:rank=2"]),
    "dense": ("dense", ["prune:sparsity=0.5"]),
}


def produce(model: Path, out: Path, words: list[str], format_name: str, **options: Any) -> Path:
    """A run in this process; `shard` is the largest weight file."""
    shard = options.pop("shard", 5 * 10**9)
    recipe = Recipe(passes=tuple(parse_pass(word) for word in words))
    with open_checkpoint(model) as checkpoint:
        known = Options(format=format_name, jobs=1, max_shard_bytes=shard)
        plan = make_plan(checkpoint, recipe, known)
        run(plan, out, RunOptions(**{"fsync": False, "decoded_hashes": True} | options))
    return out


def onnx_model(path: Path) -> Path:
    """Two layers; one weight lies in a file beside it."""
    import onnx

    helper, rng = onnx.helper, np.random.default_rng(0)
    weights = {
        "first": rng.standard_normal((64, 96)).astype(np.float32),
        "second": rng.standard_normal((96, 32)).astype(np.float32),
    }
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "second"], ["y"]),
        ],
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["n", 64])],
        [value("y", onnx.TensorProto.FLOAT, ["n", 32])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True)
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=16000)
    assert (path.parent / "w.bin").stat().st_size > 16000
    return path


def outputs(root: Path) -> dict[str, Path]:
    """One small output of every kind: formats, shards, side files, unpacked, an engine's layout;
    of an .onnx file, with its graph.
    """
    from compress.export_onnx.genai import write_genai
    from compress.unpacking import unpack_output

    model = tiny_llama(root / "model", hidden=32, ffn=64, layers=1, vocabulary=32)
    made = {
        kind: produce(
            model, root / kind, words, name, **({"shard": SHARD} if kind == "sharded" else {})
        )
        for kind, (name, words) in KINDS.items()
    }
    graph = onnx_model(root / "source" / "model.onnx")
    made["graph"] = produce(graph, root / "graph", ["quantize:bits=4,group=32"], "native")
    unpack_output(made["native"], root / "unpacked", fsync=False)
    write_genai(made["compressed-tensors"], root / "genai", call_builder=False, fsync=False)
    return made | {"unpacked": root / "unpacked", "genai": root / "genai"}


def files_of(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Damage:
    """What was done to which file, in words."""

    what: str
    path: Path

    def __str__(self) -> str:
        return f"{self.path.name}: {self.what}"


@contextmanager
def damaged(out: Path, rng: random.Random, kind: str) -> Iterator[Damage]:
    """The output with one file damaged; it is as it was afterwards."""
    files = files_of(out)
    path = rng.choice(files)
    other = rng.choice([f for f in files if f != path])
    before = {f: f.read_bytes() for f in (path, other)}
    try:
        yield Damage(DAMAGES[kind](path, other, rng), path)
    finally:
        for file, content in before.items():
            file.write_bytes(content)


def _flip(path: Path, other: Path, rng: random.Random) -> str:
    place, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))
    return f"bit {bit} of byte {place}"


def _truncate(path: Path, other: Path, rng: random.Random) -> str:
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"cut to {size} bytes"


def _swap(path: Path, other: Path, rng: random.Random) -> str:
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)
    return f"swapped with {other.name}" if one != two else _flip(path, other, rng)


def _extend(path: Path, other: Path, rng: random.Random) -> str:
    with open(path, "ab") as file:
        file.write(b"\n")
    return "a line end more"


def _zero(path: Path, other: Path, rng: random.Random) -> str:
    """A page that a file system lost; where it was zero before, a flip instead."""
    content = path.read_bytes()
    place = rng.randrange(len(content))
    lost = content[:place] + bytes(len(content[place : place + 4096])) + content[place + 4096 :]
    path.write_bytes(lost)
    return f"zeros at byte {place}" if lost != content else _flip(path, other, rng)


DAMAGES: dict[str, Callable[[Path, Path, random.Random], str]] = {
    "flip": _flip,
    "truncate": _truncate,
    "swap": _swap,
    "extend": _extend,
    "zero": _zero,
}
