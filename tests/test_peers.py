"""The comparison with peers is fair: one protocol of perplexity, and bits counted as stored."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import PROJECT

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PROJECT / "bench" / "peers"))
    import figures

    return figures


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PROJECT / "bench" / "peers"))
    sys.modules.pop("evaluate", None)  # a package of that name may be installed
    import evaluate

    return evaluate


def test_bits_are_counted_as_stored(figures: ModuleType) -> None:
    weights = torch.ones(3, 20)
    # two groups a row, the second short: 3 * (20 * 4 + 2 * (16 + 4))
    assert figures.dense_bits(weights, 4, 16, 16, 4) == 360
    assert figures.dense_bits(weights, 4, -1, 16, 0) == 3 * (80 + 16)
    weights[:, ::2] = 0
    # three bytes of mask a row, 30 codes, scales
    assert figures.sparse_bits(weights, 4, 16, 16, 0) == 3 * 24 + 30 * 4 + 3 * 2 * 16


def test_levels_see_one_value_too_many(figures: ModuleType) -> None:
    weights = torch.arange(4.0).repeat(2, 4)
    assert figures.levels(weights, 8) == 4
    weights[1, 15] = 9
    assert figures.levels(weights, 8) == 5
    assert figures.levels(weights[:, :8], 8) == 4


def test_files_hold_what_was_decoded(figures: ModuleType, tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"]
    weights = {names[0]: torch.tensor([[0.0, 1.5]]), names[1]: torch.ones(2)}
    figures.save(tmp_path, weights, 9.0, seconds=1.0)
    found = figures.source_weights(tmp_path)
    assert sorted(found) == sorted(names) and found[names[0]].tolist() == [[0.0, 1.5]]
    said = (tmp_path / "figures.json").read_text()
    assert '"bits_per_weight": 4.5' in said and '"zeros": 0.5' in said and '"weights": 2' in said


def test_a_calibration_row_is_bos_and_the_text_in_order(
    evaluate: ModuleType, shared_dir: Path, tmp_path: Path
) -> None:
    model = shared_dir / "models" / "tiny-llama-en"
    text = tmp_path / "text.txt"
    text.write_text((shared_dir / "data" / "wikitext2_valid.txt").read_text()[:20000])
    tokens = evaluate.tokens(model, text)
    ids = evaluate.calibration_ids(model, text, sequences=4, length=64)
    assert ids.shape == (4, 64) and ids.dtype == np.int64 and not ids[:, 0].any()
    np.testing.assert_array_equal(ids[:, 1:].ravel(), tokens[: 4 * 63])
    assert len(evaluate.calibration_ids(model, text, 10**6, 64)) == len(tokens) // 63
    text.write_text("too short")
    evaluate.tokens.cache_clear()
    with pytest.raises(ValueError, match="a window takes 63"):
        evaluate.calibration_ids(model, text, 4, 64)


@pytest.mark.model
def test_perplexity_is_of_the_weights_given(evaluate: ModuleType, shared_dir: Path) -> None:
    model = shared_dir / "models" / "tiny-llama-en"
    test = shared_dir / "data" / "wikitext2_test.txt"
    dense = evaluate.perplexity(model, test, windows=1)
    ids = torch.from_numpy(evaluate.windows_of(model, test, 255, 1))
    with torch.no_grad():  # transformers shifts and averages by itself
        loss = evaluate.loaded(model)(ids, labels=ids).loss
    assert dense == pytest.approx(float(loss.exp()), rel=1e-5)
    name = "model.layers.5.mlp.down_proj.weight"
    zeros = np.zeros((256, 768), np.float32)
    assert evaluate.perplexity(model, test, {name: zeros}, windows=1) > 1.05 * dense
    assert evaluate.perplexity(model, test, windows=1) == dense  # the model is as it was
    with pytest.raises(ValueError, match="down_proj"):
        evaluate.perplexity(model, test, {name: zeros.T}, windows=1)
    with pytest.raises(ValueError, match=r"no\.such"):
        evaluate.perplexity(model, test, {"no.such": zeros}, windows=1)
