"""`export --to genai`: the layout of onnxruntime-genai's builder, and the call of the builder."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toolbox import tiny_llama, write_safetensors

from compress.checkpoint import manifest, open_checkpoint
from compress.errors import CompressError, InputError, UsageError
from compress.export_onnx import genai_builder
from compress.export_onnx.genai import write_genai
from compress.export_onnx.genai_builder import BuilderOptions
from compress.output import CompressedCheckpoint, open_output
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass
from compress.run import RunOptions, run
from compress.tensor import DTYPES
from compress.verification import verify_output

Arrays = dict[str, np.ndarray]
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def compressed(model: Path, out: Path, *words: str) -> Path:
    """A run in this process."""
    recipe = Recipe(passes=tuple(parse_pass(word) for word in words))
    with open_checkpoint(model) as checkpoint:
        run(make_plan(checkpoint, recipe, Options(jobs=1)), out, RunOptions(fsync=False))
    return out


def export(out: Path, to: Path, **options: Any) -> dict[str, Any]:
    """The layout alone, unless told otherwise."""
    return write_genai(out, to, **{"call_builder": False, "fsync": False} | options)


def arrays_of(folder: Path) -> Arrays:
    """Every tensor of the layout, read without the package's reader."""
    found: Arrays = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                data = np.frombuffer(raw[start + begin : start + end], DTYPES[entry["dtype"]])
                found[name] = data.reshape(entry["shape"])
    return found


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 2, 4 or 8 bits from bytes, low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).reshape(packed.shape[0], -1)


def decoded(arrays: Arrays, module: str, config: dict[str, Any]) -> np.ndarray:
    """float32 [out, in] of one layer as the builder's loader reads it."""
    quantization = config["quantization_config"]
    own = quantization["overrides"].get(module, quantization)
    bits, group = own["bits"], own["group_size"]
    codes = unpacked(arrays[f"{module}.qweight"], bits)
    scales = arrays[f"{module}.scales"].astype(np.float32)
    assert codes.shape[1] == scales.shape[1] * group
    zeros = unpacked(arrays[f"{module}.qzeros"], bits)[:, : scales.shape[1]]
    spread = [np.repeat(one, group, axis=1) for one in (zeros, scales)]
    return (codes.astype(np.float32) - spread[0]) * spread[1]


def config_of(to: Path) -> dict[str, Any]:
    return json.loads((to / "checkpoint" / "config.json").read_text())


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


LAYOUTS = {
    "4 bits": (["quantize:bits=4,group=32"], 128, {(4, 32)}),
    "pruned, zero points": (
        ["prune:sparsity=0.5", "quantize:bits=4,group=16,symmetric=false"],
        128,
        {(4, 16)},
    ),
    "3 bits, short groups": (["quantize:bits=3,group=32,on_indivisible=short"], 172, {(4, 32)}),
    "6 bits, odd groups": (
        ["quantize:bits=6,group=48,symmetric=false,on_indivisible=short"],
        144,
        {(8, 16)},
    ),
    "a scale a row": (["quantize:bits=8,group=-1"], 172, {(8, 64), (8, 32)}),
    "a scale a tensor": (["quantize:bits=8,group=0,scale_dtype=fp32"], 128, {(8, 64), (8, 128)}),
    "2 bits in long groups": (["quantize:bits=2,group=256"], 512, {(2, 64), (2, 128)}),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_layout_decodes_to_what_the_output_decodes_to(tmp_path: Path, case: str) -> None:
    words, ffn, widths = LAYOUTS[case]
    if case.startswith("2 bits"):
        words = [f"{words[0]},on_indivisible=channel"]
    model = tiny_llama(tmp_path / "m", layers=1, ffn=ffn, dtype=np.float16)
    out = compressed(model, tmp_path / "out", *words)
    body = export(out, tmp_path / "to")
    arrays, config = arrays_of(tmp_path / "to" / "checkpoint"), config_of(tmp_path / "to")
    layers = 0
    with open_output(out) as checkpoint:
        assert isinstance(checkpoint, CompressedCheckpoint)
        for info in checkpoint.infos():
            if info.name not in checkpoint.entries:
                assert np.array_equal(arrays.pop(info.name), checkpoint.read(info))
                continue
            wanted = checkpoint.tensor(info.name).decode()
            found = decoded(arrays, info.module, config)
            rows, columns = wanted.shape
            assert np.array_equal(found[:rows, :columns], wanted)
            assert not found[rows:].any()
            assert not found[:, columns:].any()
            layers += 1
    assert layers == body["layers"] == 7
    assert len(arrays) == 3 * layers  # nothing beside them
    wide = config["intermediate_size"]
    assert arrays["model.layers.0.mlp.down_proj.qweight"].shape[0] == 64
    assert decoded(arrays, "model.layers.0.mlp.down_proj", config).shape == (64, wide)
    assert decoded(arrays, "model.layers.0.mlp.up_proj", config).shape == (wide, 64)
    assert (wide == ffn) == (ffn != 172)
    assert any("neurons of zeros" in note for note in body["notes"]) == (ffn == 172)
    chosen = config["quantization_config"]
    pairs = {(o["bits"], o["group_size"]) for o in [chosen, *chosen["overrides"].values()]}
    assert pairs == widths
    assert chosen["quant_method"] == "olive"


def test_widths_that_differ_are_overrides_and_not_fused(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m", layers=2)
    out = compressed(
        model,
        tmp_path / "out",
        "quantize:bits=8,group=64,targets=*layers.1.*k_proj*",
        "quantize:bits=4,group=32,ignore=*layers.1.*k_proj*",
    )
    body = export(out, tmp_path / "to", options=BuilderOptions(accuracy_level=0))
    overrides = config_of(tmp_path / "to")["quantization_config"]["overrides"]
    assert overrides == {"model.layers.1.self_attn.k_proj": {"bits": 8, "group_size": 64}}
    command = body["builder"]["command"]
    assert command in body["summary"]
    for option in ("fuse_qkv=false", "accuracy_level=0", "hf_remote=false", "/lm_head/MatMul"):
        assert option in command
    kept = compressed(model, tmp_path / "one", "quantize:bits=4,group=32")
    assert "fuse_qkv" not in export(kept, tmp_path / "to-one")["builder"]["command"]


def test_fused_tensors_become_their_parts(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m", layers=1, ffn=96)
    arrays = arrays_of(model)
    for fused, parts in FUSED.items():
        block = "self_attn" if fused == "qkv_proj" else "mlp"
        names = [f"model.layers.0.{block}.{part}.weight" for part in parts]
        arrays[f"model.layers.0.{block}.{fused}.weight"] = np.concatenate(
            [arrays.pop(name) for name in names]
        )
    write_safetensors(model / "model.safetensors", arrays)
    out = compressed(model, tmp_path / "out", "quantize:bits=4,group=32,symmetric=false")
    export(out, tmp_path / "to")
    found, config = arrays_of(tmp_path / "to" / "checkpoint"), config_of(tmp_path / "to")
    with open_output(out) as checkpoint:
        assert isinstance(checkpoint, CompressedCheckpoint)
        for fused, parts in FUSED.items():
            block = "model.layers.0." + ("self_attn" if fused == "qkv_proj" else "mlp")
            whole = checkpoint.tensor(f"{block}.{fused}.weight").decode()
            joined = np.concatenate([decoded(found, f"{block}.{p}", config) for p in parts])
            assert np.array_equal(joined, whole)
            assert f"{block}.{fused}.qweight" not in found
    edit_config(out, num_key_value_heads=2)
    with pytest.raises(InputError, match=r"qkv_proj.*192 rows.*128"):
        export(out, tmp_path / "no")


def test_a_table_of_codes_is_written_decoded_and_a_head_keeps_its_codes(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m", layers=1)
    arrays = arrays_of(model)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"][::-1] * 2
    write_safetensors(model / "model.safetensors", arrays)
    edit_config(model, tie_word_embeddings=False)
    word = 'quantize:bits=8,group=32,targets=["*proj*", "*embed*", "lm_head*"]'
    out = compressed(model, tmp_path / "out", word)
    body = export(out, tmp_path / "to")
    found = arrays_of(tmp_path / "to" / "checkpoint")
    with open_output(out) as checkpoint:
        assert isinstance(checkpoint, CompressedCheckpoint)
        table = checkpoint.info("model.embed_tokens.weight")
        assert table.name in checkpoint.entries
        assert np.array_equal(found[table.name], checkpoint.read(table))
    assert found["lm_head.qweight"].shape == (96, 64)
    assert "lm_head.weight" not in found
    assert "shared_embeddings=false" in body["builder"]["command"]
    assert "/lm_head/MatMul" not in body["builder"]["command"]
    assert any("embedding tables" in note for note in body["notes"])
    assert not any(note in body["summary"] for note in body["notes"])  # they are printed before it


REFUSED = {
    "a low-rank term": (["quantize:bits=4,group=32", "low-rank:rank=2"], "low-rank", 128),
    "super weights": (
        ['super-weights:method=named,coordinates=["0:3:5"]', "quantize:group=32"],
        "down_proj.*super weights",
        128,
    ),
    "a layer left alone": (["quantize:group=32,ignore=*o_proj*"], "o_proj.*not quantized", 128),
    "groups of 24": (["quantize:group=24,on_indivisible=short"], "groups of 24 columns", 96),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_builder_has_no_place_for_is_refused(tmp_path: Path, case: str) -> None:
    words, message, ffn = REFUSED[case]
    model = tiny_llama(tmp_path / "m", layers=1, ffn=ffn)
    out = compressed(model, tmp_path / "out", *words)
    with pytest.raises(UsageError, match=message) as caught:
        export(out, tmp_path / "to")
    assert "model.layers.0." in caught.value.message
    assert caught.value.hint
    assert not (tmp_path / "to").exists()


def test_what_is_no_language_model_of_ours_is_refused(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m", layers=1)
    with pytest.raises(UsageError, match="not an output of this tool"):
        export(model, tmp_path / "to")
    pruned = compressed(model, tmp_path / "pruned", "prune:sparsity=0.5")
    with pytest.raises(UsageError, match="with codes") as caught:
        export(pruned, tmp_path / "to")
    assert "quantize:bits=4" in (caught.value.hint or "")
    out = compressed(model, tmp_path / "out", "quantize:bits=4,group=32")
    with pytest.raises(UsageError, match="overlap"):
        export(out, out / "to")
    edit_config(out, architectures=None)
    with pytest.raises(UsageError, match="architecture"):
        export(out, tmp_path / "to")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuilderOptions(precision="fp8"), "precision fp8"),
        (BuilderOptions(provider="tpu"), "execution provider tpu"),
        (BuilderOptions(accuracy_level=5), "accuracy level 5"),
        (BuilderOptions(extra=("prune_lm_head",)), "not KEY=VALUE"),
        (BuilderOptions(extra=("hf_remote=true",)), "hf_remote"),
    ],
)
def test_options_that_the_builder_does_not_have(
    tmp_path: Path, options: BuilderOptions, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export(tmp_path / "out", tmp_path / "to", options=options)


# A stand-in for the package: its builder does what the scenario says, its engine "runs" a model.
_ENGINE = """
import pathlib
class Model:
    def __init__(self, path):
        if "broken" in (pathlib.Path(path) / "model.onnx").read_text():
            raise RuntimeError("head_size shall be a multiple of 16")
class GeneratorParams:
    def __init__(self, model): pass
    def set_search_options(self, max_length):
        if max_length != 128:
            raise RuntimeError(f"a window of 4096 in a context of 128 gave {max_length}")
class Generator:
    def __init__(self, model, params): pass
    def append_tokens(self, tokens): pass
    def generate_next_token(self): pass
"""
_BUILDER = """
import json, os, pathlib, sys
arguments = dict(zip(sys.argv[1:11:2], sys.argv[2:12:2]))
to = pathlib.Path(arguments["-o"])
seen = sorted(os.listdir(arguments["-i"]))
os.makedirs(arguments["-c"])
print("Reading layer 0")
SCENARIO
(to / "model.onnx").write_text("graph")
(to / "model.onnx.data").write_bytes(bytes(100))
config = {"model": {"context_length": 128}, "arguments": sys.argv[11:], "seen": seen}
config["offline"] = os.environ["HF_HUB_OFFLINE"]
(to / "genai_config.json").write_text(json.dumps(config))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Installs the package with a builder that runs this code before it writes its files."""

    def install(scenario: str) -> None:
        package = tmp_path / "site" / "onnxruntime_genai"
        (package / "models").mkdir(parents=True)
        (package / "__init__.py").write_text(_ENGINE)
        (package / "models" / "__init__.py").write_text("")
        (package / "models" / "builder.py").write_text(_BUILDER.replace("SCENARIO", scenario))
        monkeypatch.syspath_prepend(package.parent)
        paths = [str(package.parent), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))

    return install


@pytest.fixture
def out(tmp_path: Path) -> Path:
    model = tiny_llama(tmp_path / "m", layers=1)
    (model / "tokenizer.json").write_text("{}")
    edit_config(model, sliding_window=4096)
    return compressed(model, tmp_path / "out", "quantize:bits=4,group=32")


def test_the_builder_is_called_where_it_is_installed(
    tmp_path: Path, out: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in("")
    to = tmp_path / "to"
    seen: list[tuple[str, int, int]] = []
    body = export(
        out,
        to,
        call_builder=None,
        options=BuilderOptions(accuracy_level=0, extra=("prune_lm_head=true",)),
        progress=lambda *step: seen.append(step),
    )
    made = json.loads((to / "genai_config.json").read_text())
    assert made["offline"] == "1"
    assert made["seen"] == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    for option in ("accuracy_level=0", "prune_lm_head=true", "hf_remote=false"):
        assert option in made["arguments"]
    assert body["builder"]["called"]
    assert "model.onnx" in body["summary"]
    assert body["files"]["model.onnx.data"] == 100
    assert sum(body["files"].values()) == body["bytes"] > body["layout_bytes"]
    assert seen[-4:] == [("build", 0, 1), ("build", 1, 1), ("try", 0, 1), ("try", 1, 1)]
    listed = manifest.read(to)["files"]
    assert set(listed) == set(body["files"])
    assert verify_output(to)["files"] == len(listed)
    (to / "model.onnx").write_text("grapH")
    with pytest.raises(CompressError, match=r"model\.onnx: its SHA-256"):
        verify_output(to)


@pytest.mark.parametrize(
    ("scenario", "message", "hint"),
    [
        ('raise ValueError("no \x1b[31mway")', r"builder failed: ValueError: no \\x1b", "layout"),
        ("import a_package_that_is_not_there", "ModuleNotFoundError", "pip install"),
        ("os.kill(os.getpid(), 9)", "signal 9", "memory"),
        ("sys.exit(0)", "wrote no model.onnx", None),
        ('(to / "model.onnx").write_text("broken graph")\nreal = pathlib.Path.write_text\n'
         'pathlib.Path.write_text = lambda p, t: p.name == "model.onnx" or real(p, t)',
         "does not run it: RuntimeError: head_size", "--to onnx"),
    ],
)  # fmt: skip
def test_a_builder_that_fails_publishes_nothing(
    tmp_path: Path,
    out: Path,
    stand_in: Callable[[str], None],
    scenario: str,
    message: str,
    hint: str | None,
) -> None:
    stand_in(scenario)
    with pytest.raises(CompressError, match=message) as caught:
        export(out, tmp_path / "to", call_builder=True)
    assert caught.value.exit_code == 1
    assert "\x1b" not in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")
    assert not list(tmp_path.glob("*to*"))


def test_without_the_builder_the_layout_is_written(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(genai_builder, "installed", lambda: None)
    with pytest.raises(UsageError, match="onnxruntime-genai is not installed"):
        export(out, tmp_path / "to", call_builder=True)
    to = tmp_path / "to"
    body = export(out, to, call_builder=None)
    assert not body["builder"]["called"]
    assert not (tmp_path / "to" / "model.onnx").exists()
    assert {name.partition("/")[0] for name in body["files"]} == {"checkpoint"}
    assert re.search(
        r"python -m onnxruntime_genai\.models\.builder -i \S+checkpoint", body["summary"]
    )
    assert verify_output(to)["ok"]
    with pytest.raises(UsageError, match="exists"):
        export(out, to)
    with pytest.raises(UsageError, match="not compared with a source"):
        verify_output(to, source=out)


@pytest.mark.parametrize(("version", "taken"), [("0.9.2", False), ("0.18.0", True), ("1.0", True)])
def test_a_builder_that_knows_other_options_is_not_called(
    tmp_path: Path,
    out: Path,
    stand_in: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    taken: bool,
) -> None:
    stand_in("")
    monkeypatch.setattr(genai_builder, "installed", lambda: version)
    if taken:
        body = export(out, tmp_path / "to", call_builder=None)
        assert body["builder"]["version"] == version
        return
    with pytest.raises(UsageError, match=f"onnxruntime-genai {re.escape(version)}: 0.18 or newer"):
        export(out, tmp_path / "to", call_builder=None)


def test_the_real_builder_and_engine(tmp_path: Path, shared_dir: Path) -> None:
    """A gated MLP of 172, 3 bits beside 8: the same tokens as our decode run by transformers."""
    engine = pytest.importorskip("onnxruntime_genai")
    pytest.importorskip("onnx_ir")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tiny_llama(tmp_path / "m", ffn=172, vocabulary=512, seed=3)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared_dir / "models" / "stories260k" / name, model)
    out = compressed(
        model,
        tmp_path / "out",
        "quantize:bits=8,group=32,targets=*k_proj*",
        "quantize:bits=3,group=32,on_indivisible=short,ignore=*k_proj*",
    )
    to = tmp_path / "to"
    export(out, to, call_builder=True, options=BuilderOptions(accuracy_level=0))
    reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).float().eval()
    with open_output(out) as checkpoint:
        state = {i.name: torch.from_numpy(checkpoint.read(i)) for i in checkpoint.infos()}
    reference.load_state_dict(state, strict=False)
    reference.tie_weights()
    built = engine.Model(str(to))
    params = engine.GeneratorParams(built)
    params.set_search_options(max_length=32)
    generator = engine.Generator(built, params)
    tokens = [1, 5, 9]
    generator.append_tokens(np.array(tokens, np.int32))
    for _ in range(12):
        found = np.array(generator.get_logits()).reshape(-1)[-512:]
        with torch.no_grad():
            wanted = reference(torch.tensor([tokens])).logits[0, -1].numpy()
        assert np.abs(found - wanted).max() < 1e-5
        tokens.append(int(wanted.argmax()))
        assert int(found.argmax()) == tokens[-1]
        generator.append_tokens(np.array(tokens[-1:], np.int32))
