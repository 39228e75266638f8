"""The samples do what they say: recipes on real models, the pipeline step, the batch loop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from toolbox import tiny_llama, tool, tool_json

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
COMPRESS = f"{sys.executable} -m compress"


def shell(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a sample script with our tool as `compress`."""
    return subprocess.run(
        ["bash", SAMPLES / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "COMPRESS": COMPRESS},
    )


def test_the_encoder_recipe_ships_minilm_under_20_mb(minilm: Path, tmp_path: Path) -> None:
    recipe = SAMPLES / "encoder.yaml"
    body = tool_json("run", minilm, "--recipe", recipe, "-o", tmp_path / "out")
    assert body["format"] == "compressed-tensors"
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*")) < 20_000_000


def test_the_decoder_recipe_on_a_trained_decoder(shared_dir: Path, tmp_path: Path) -> None:
    """One command calibrates, compresses, evaluates, and publishes or refuses."""
    model, data = shared_dir / "models" / "tiny-llama-en", shared_dir / "data"
    words = ["run", model, "--recipe", SAMPLES / "decoder.yaml"]
    words += ["--text", data / "wikitext2_valid.txt", "--eval-text", data / "wikitext2_test.txt"]
    some = ["--samples", "4", "--length", "256", "--eval-samples", "4"]
    passing = ["--fail-if", "kl>0.1", "--fail-if", "perplexity_ratio>1.05"]
    body = tool_json(*words, *some, *passing, "-o", tmp_path / "out")
    rows = {r["name"]: r for r in body["tensors"]}
    assert rows["model.layers.1.mlp.down_proj.weight"]["bits"] == 8
    assert rows["model.layers.1.mlp.down_proj.weight"]["outliers"] >= 2
    assert rows["model.layers.1.mlp.up_proj.weight"]["bits"] == 4
    assert 0 < body["evaluation"]["metrics"]["kl"] < 0.1
    assert (tmp_path / "out" / "manifest.json").exists()
    few = ["--samples", "1", "--length", "64", "--eval-samples", "1"]
    refused = tool(*words, *few, "--fail-if", "kl>0.00001", "-o", tmp_path / "refused")
    assert refused.returncode == 4
    assert "kl is" in refused.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_decoder_recipe_without_data(shared_dir: Path, tmp_path: Path) -> None:
    model = shared_dir / "models" / "tiny-llama-en"
    recipe = SAMPLES / "decoder-data-free.yaml"
    body = tool_json("run", model, "--recipe", recipe, "-o", tmp_path / "out")
    rows = {r["name"]: r for r in body["tensors"]}
    assert rows["model.layers.1.mlp.down_proj.weight"]["bits"] == 8
    assert rows["model.layers.1.mlp.down_proj.weight"]["outliers"] == 2
    assert rows["model.layers.1.mlp.up_proj.weight"]["bits"] == 4


def test_the_cnn_recipe_on_a_trained_resnet(shared_dir: Path, tmp_path: Path) -> None:
    model = shared_dir / "models" / "resnet20-12fca82f.th"
    recipe = SAMPLES / "cnn.yaml"
    body = tool_json("run", model, "--allow-pickle", "--recipe", recipe, "-o", tmp_path / "out")
    assert body["format"] == "native"
    assert body["totals"]["sparsity"] == pytest.approx(0.6, abs=1e-4)


def test_the_pipeline_step_passes_and_fails_as_its_gate_says(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    out, report = tmp_path / "out", tmp_path / "report.json"
    done = shell("ci-step.sh", model, SAMPLES / "decoder-data-free.yaml", out, report)
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    os.environ["MAX_ERROR"] = "0.0001"
    try:
        failed = shell(
            "ci-step.sh", model, SAMPLES / "decoder-data-free.yaml", tmp_path / "none", report
        )
    finally:
        del os.environ["MAX_ERROR"]
    assert failed.returncode == 4
    assert report.exists() and not (tmp_path / "none").exists()


def test_the_batch_loop_goes_on_after_a_failure(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny_llama(tmp_path / "models" / name)
    (tmp_path / "models" / "broken").mkdir()
    arguments = (tmp_path / "models", tmp_path / "outs", "quantize:bits=4,group=32")
    done = shell("batch.sh", *arguments)
    assert done.returncode == 1
    assert "a: compressed" in done.stdout and "b: compressed" in done.stdout
    assert "broken: exit 3" in done.stdout
    assert "a: done already" in shell("batch.sh", *arguments).stdout
