"""The plan and the edges of the work: casts, empty tensors, odd shapes, what counts as changed."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from toolbox import tiny_llama, tool, tool_json, tool_process, write_safetensors

from compress.output import open_any


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def gpt2(folder: Path) -> Path:
    """Two blocks with GPT-2's transposed linears."""
    tensors = {"wte.weight": weights(64, 64)}
    for layer in range(2):
        prefix = f"h.{layer}."
        tensors[prefix + "attn.c_attn.weight"] = weights(64, 192, seed=layer)
        tensors[prefix + "attn.c_attn.bias"] = weights(192)
        tensors[prefix + "mlp.c_fc.weight"] = weights(64, 256, seed=layer + 5)
        tensors[prefix + "mlp.c_fc.bias"] = weights(256)
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_untouched_casts_keep_the_order_of_transposed_linears(tmp_path: Path) -> None:
    model, out = gpt2(tmp_path / "model"), tmp_path / "out"
    word = 'quantize:bits=8,group=64,targets=["h.0*"]'
    tool_json("run", model, "-o", out, word, "--untouched", "bf16")
    with open_any(model) as source, open_any(out) as result:
        for name in ("h.1.attn.c_attn.weight", "h.1.mlp.c_fc.weight", "h.1.mlp.c_fc.bias"):
            want = source.read(source.info(name)).astype(ml_dtypes.bfloat16)
            got = result.read(result.info(name))
            assert np.array_equal(want.astype(np.float32), got.astype(np.float32))


def test_untouched_casts_take_every_shape(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    tensors = {
        "layers.0.mlp.experts.gate_up_proj.other": weights(64, 256, 96),
        "a.fc1.weight": weights(64, 64),
        "empty.weight": np.zeros((3, 0), np.float32),
        "scalar": np.float32(3).reshape(()),
        "half": weights(5).astype(np.float16),
    }
    write_safetensors(model, tensors)
    out = tmp_path / "out"
    tool_json("run", model, "-o", out, 'quantize:group=64,targets=["a.*"]', "--untouched", "bf16")
    with open_any(out) as result:
        for name, array in tensors.items():
            assert result.info(name).shape == array.shape
            if name != "a.fc1.weight":
                want = array.astype(ml_dtypes.bfloat16).astype(np.float32)
                got = result.read(result.info(name)).astype(np.float32)
                assert np.array_equal(got, want)


def test_a_cast_that_overflows_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    big = np.array([1.0, 1e6], np.float32)
    write_safetensors(model, {"a.fc1.weight": weights(64, 64), "norm.weight": big})
    done = tool("run", model, "-o", tmp_path / "out", "quantize:group=64", "--untouched", "fp16")
    assert done.returncode == 3
    assert "norm.weight" in done.stderr and "1e+06" in done.stderr


def test_super_weights_and_a_cast_go_together(tmp_path: Path) -> None:
    model, out = tiny_llama(tmp_path / "model"), tmp_path / "out"
    word = "super-weights:method=named,coordinates=[0:1:2]"
    tool_json("run", model, "-o", out, word, "--untouched", "bf16")
    name = "model.layers.0.mlp.down_proj.weight"
    with open_any(model) as source, open_any(out / "super_weights.safetensors") as kept:
        exact = source.read(source.info(name))[1, 2]
        assert kept.read(kept.info(f"{name}.values"))[0] == exact


def test_gated_error_does_not_depend_on_what_was_not_touched(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    errors = [
        tool_json("run", model, "-o", tmp_path / kind, "quantize:group=32", "--untouched", kind)[
            "totals"
        ]["relative_error"]
        for kind in ("keep", "fp16")
    ]
    assert errors[0] == errors[1] > 0


def test_a_pass_that_found_nothing_changed_nothing(tmp_path: Path) -> None:
    model, out = tiny_llama(tmp_path / "model"), tmp_path / "out"
    body = tool_json("run", model, "-o", out, "super-weights")
    assert body["totals"]["weights_targeted"] == 0
    assert "nothing to change" in body["verdict"]
    assert body["passes"][0]["facts"]["found"] == 0
    found = tool_json("verify", out, "--source", model)
    assert found["untouched_compared"] == found["tensors"]


def test_empty_and_thin_matrices_pass(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    write_safetensors(
        model,
        {
            "a.fc1.weight": np.zeros((0, 128), np.float32),
            "b.fc1.weight": weights(1, 128),
            "c.fc1.weight": weights(128, 1),
        },
    )
    for number, words in enumerate(
        (["prune"], ["quantize:group=-1"], ["prune:sparsity=0.25", "quantize:group=-1"])
    ):
        out = tmp_path / f"out{number}"
        tool_json("run", model, "-o", out, *words, "--format", "native")
        assert tool("verify", out).returncode == 0


def test_what_is_stored_is_what_ran(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    first, second = tmp_path / "a", tmp_path / "b"
    words = ["quantize:bits=4,group=32", "--format", "native", "--untouched", "bf16"]
    tool_json("run", model, "-o", first, *words, "--fail-if", "relative_error>0.9")
    recipe = first / "recipe.yaml"
    assert "relative_error" in recipe.read_text()
    tool_json("run", model, "-o", second, "--recipe", recipe)
    for name in ("model.compress.safetensors", "recipe.yaml"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_reads_count_every_sweep(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", dtype=ml_dtypes.bfloat16, hidden=128)
    with open_any(model) as checkpoint:
        infos = checkpoint.infos()
    every = sum(i.nbytes for i in infos)
    mlp = sum(i.nbytes for i in infos if ".mlp." in i.name)
    linears = sum(i.nbytes for i in infos if "_proj" in i.name)
    assert tool_json("plan", model, "super-weights")["reads"] == every + mlp
    assert tool_json("plan", model, "prune")["reads"] == every + linears


def test_a_decoder_is_warned_tied_or_not(tmp_path: Path) -> None:
    for model in (gpt2(tmp_path / "gpt2"), tiny_llama(tmp_path / "llama")):
        warnings = tool_json("plan", model, "prune:sparsity=0.6")["warnings"]
        assert any("hurts large language models" in w for w in warnings)


def test_a_chain_of_runs_verifies(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    tool_json("run", model, "-o", pruned, "prune:sparsity=0.3")
    (pruned / "notes.txt").write_text("mine")
    done = tool("run", pruned, "-o", out, "quantize:group=32")
    assert done.returncode == 0, done.stderr
    assert (out / "notes.txt").read_text() == "mine"
    assert tool("verify", out).returncode == 0


def test_inspect_takes_an_index_and_prints_spectra(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", shards=2)
    body = tool_json("inspect", model / "model.safetensors.index.json")
    assert len(body["tensors"]) == 20
    assert "energy rank 16" in tool("inspect", model, "--spectra").stdout


def test_diff_sees_what_float32_cannot_and_prints_json(tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    values = np.ones((4, 4))
    write_safetensors(a, {"w.weight": values, "z.weight": np.zeros(2, np.float32)})
    write_safetensors(b, {"w.weight": values * (1 + 1e-12), "z.weight": np.ones(2, np.float32)})
    done = tool("diff", a, b, "--json")
    rows = {r["name"]: r for r in json.loads(done.stdout)["tensors"]}
    assert rows["w.weight"]["relative_error"] == pytest.approx(1e-12, rel=1e-3)
    assert rows["z.weight"]["relative_error"] is None


@pytest.mark.parametrize(
    "words",
    [
        ["quantize", "--memory", "1e999"],
        ["quantize:targets=[*fc1*]"],
        ["quantize:bits=["],
        ["low-rank"],
    ],
)
def test_words_that_cannot_be_are_usage_errors(tmp_path: Path, words: list[str]) -> None:
    model = tiny_llama(tmp_path / "model")
    done = tool("plan", model, *words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("words", [["quantize:bits=4"], ["prune", "--format", "native"]], ids=str)
def test_the_bound_on_memory_holds_and_is_near(tmp_path: Path, words: list[str]) -> None:
    model = tiny_llama(tmp_path / "model", hidden=1024, ffn=4096, dtype=ml_dtypes.bfloat16)
    planned = tool_json("plan", model, *words)["peak_memory"]
    done = tool_process("run", model, "-o", tmp_path / "out", *words, "--json")
    totals = json.loads(done.stdout)["totals"]
    assert totals["peak_memory"] <= planned <= 2 * totals["peak_memory"]
