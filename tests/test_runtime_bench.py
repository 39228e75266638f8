"""What `compress bench` measures and how it prints it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import ml_dtypes
import pytest
from rich.console import Console
from toolbox import tiny_llama, tool_json

from compress.runtime import bench, layer_bench

pytest.importorskip("transformers")


def test_bench_measures_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_bench, "ROTATED", 1_000_000)
    model = tiny_llama(tmp_path / "model", dtype=ml_dtypes.bfloat16)
    out = tmp_path / "out"
    tool_json("run", model, "-o", out, "quantize:bits=4,group=32")
    body = bench.bench_model(out, reference=model, tokens=5, threads=1)
    assert body["tokens_per_second"].keys() == {"exact", "fast", "reference, torch bf16"}
    assert all(v > 0 for found in body["tokens_per_second"].values() for v in found.values())
    assert body["memory"]["packed_bytes"] == (out / "model.safetensors").stat().st_size
    layers = {tuple(layer["shape"]): layer for layer in body["layers"]}
    assert {shape: layer["count"] for shape, layer in layers.items()} == {
        (64, 64): 8, (64, 128): 2, (128, 64): 4,
    }  # fmt: skip
    for layer in layers.values():
        assert layer["bits"] == 4
        assert layer["milliseconds"].keys() == {
            "exact", "fast", "dense, torch", "dense", *(f"sparse {p}" for p in (30, 50, 70, 80, 90))
        }  # fmt: skip
        assert min(layer["rotated_bytes"].values()) >= 1_000_000
    console = Console(width=80, record=True, file=io.StringIO())
    bench.print_bench(json.loads(json.dumps(body)), console)
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert "128x64" in shown and "not time" in shown


@pytest.mark.parametrize(
    ("sparse", "sparsity", "at_most"),
    [
        ([0.9, 0.8, 0.7, 0.6, 0.5], 0.3, True),
        ([1.4, 1.2, 0.8, 0.6, 0.5], 0.6, False),
        ([1.9, 1.8, 1.7, 1.6, 1.5], None, False),
    ],
)
def test_break_even_is_interpolated(
    sparse: list[float], sparsity: float | None, at_most: bool
) -> None:
    times = {f"sparse {p}": 2 * t for p, t in zip(layer_bench.SPARSITIES, sparse, strict=True)}
    found = layer_bench.break_even(times | {"dense": 2.0})
    assert found is not None
    assert found["at_most"] is at_most
    assert found["sparsity"] == (None if sparsity is None else pytest.approx(sparsity))
    assert layer_bench.break_even({"exact": 1.0}) is None
