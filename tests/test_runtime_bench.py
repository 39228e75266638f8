"""What `compress bench` measures and how it prints it."""

from __future__ import annotations

import io
import json
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from rich.console import Console
from toolbox import produce, tiny_llama
from torch import nn

from compress.errors import UsageError
from compress.kernels.packing import codes_segment, pack_linear
from compress.runtime import bench, layer_bench
from compress.runtime.modules import CompressedLinear
from compress.tensor import Codes

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_bench_measures_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_bench, "ROTATED", 1_000_000)
    model = tiny_llama(tmp_path / "model", dtype=ml_dtypes.bfloat16)
    out = produce(model, tmp_path / "out", "quantize:bits=4,group=32")
    body = bench.bench_model(out, reference=model, tokens=7, threads=1)
    assert body["tokens"] == 7 and body["prompt_tokens"] == 64
    assert body["notes"] == [layer_bench.BREAK_EVEN_NOTE]
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


def test_positions_bound_the_prompt_and_the_tokens(tmp_path: Path) -> None:
    """GPT-2's positions are a table: one more than its rows would be an IndexError."""
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="tokens must be 27 or fewer, not 64"):
        bench.bench_model(tmp_path / "gpt2", layers=False)
    for tokens, prompt in ((27, 1), (14, 14), (8, 16)):
        body = bench.bench_model(tmp_path / "gpt2", tokens=tokens, layers=False)
        assert (body["tokens"], body["prompt_tokens"]) == (tokens, prompt)
        assert body["tokens_per_second"]["dense"]["decode"] > 0


def test_every_token_that_was_asked_for_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        calls = 0

        def can_generate(self) -> bool:
            return True

        def modules(self) -> list[object]:
            return []

        def forward(
            self, ids: torch.Tensor, cache: object = None, use_cache: bool = False
        ) -> types.SimpleNamespace:
            self.calls += ids.shape[1] == 1
            return types.SimpleNamespace(logits=torch.zeros(1, 1, 4), cache="kept")

        __call__ = forward

    model = Model()
    candidate = bench.Candidate("dense", model)
    bench._measure([candidate], torch.zeros(1, 3, dtype=torch.int64), 64)
    assert len(candidate.steps) == 64 == model.calls - bench.WARM_UP
    assert candidate.cache == "kept"  # as transformers 5.24 calls it


def test_products_that_share_copies_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is read again only after all others, whichever product reads it."""
    monkeypatch.setattr(layer_bench, "ROTATED", 50 * 4 * layer_bench.CALLS)
    copies = layer_bench._rotated([torch.zeros(50)])
    read: list[int] = []
    runners = {
        name: layer_bench._Runner(lambda w: read.append(w.data_ptr()), copies)
        for name in ("exact", "fast")
    }
    monkeypatch.setattr(layer_bench, "CALLS", 7)
    layer_bench._medians(runners)
    count = len(copies.tensors)
    assert len(read) == 2 * 7 * (layer_bench.ROUNDS + 1)
    assert count == 24
    for start in range(len(read) - count + 1):
        assert len(set(read[start : start + count])) == count


def test_too_few_copies_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_bench, "MOST_COPIES", 4)
    values = codes_segment(
        Codes(np.ones((8, 16), np.uint8), np.ones((8, 1), np.float16), None, 4, 16)
    )
    packed = torch.from_numpy(pack_linear(8, 16, [values]))
    layers = layer_bench.time_layers(nn.ModuleList([CompressedLinear(packed)]))
    note = layer_bench.cache_note(layers)
    assert note is not None and "(4 copies), not 150 MB" in note
    assert layer_bench.cache_note([{"rotated_bytes": {"exact": 150_000_000}}]) is None


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
