"""Real trained models through the command line: exact plans, engines that load, exact restores.

The reference is always our own float32 decode: `unpack` writes the source's dtype, which for a
bfloat16 model rounds once more than an engine that computes in float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
from safetensors.numpy import load_file
from toolbox import tool, tool_json

from compress.checkpoint import open_checkpoint
from compress.output import CompressedCheckpoint, open_output
from compress.roles import fused_sets
from compress.tensor import Array

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.model

TEXT = "The committee met again on Tuesday, and once upon a time there was a little red ball."
DOWN = "model.layers.1.mlp.down_proj.weight"
SUPER_WEIGHTS = [(69, 339), (206, 339)]  # of layer 1, found by hand from its activations
RESNETS = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th"}


@dataclass(frozen=True)
class Source:
    """A real model, the class that loads it and the flags it takes."""

    path: Path
    auto: Any = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    """What a run made of a source: the directory and its report."""

    source: Source
    path: Path
    report: dict[str, Any]

    @property
    def changed(self) -> dict[str, dict[str, Any]]:
        """The report's rows of the tensors that passes worked on."""
        return {r["name"]: r for r in self.report["tensors"] if r["passes"]}

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """What each pass found."""
        return {one["name"]: one["facts"] for one in self.report["passes"]}


@pytest.fixture
def models(shared_dir: Path, minilm: Path) -> dict[str, Source]:
    folder = shared_dir / "models"
    decoder = transformers.AutoModelForCausalLM
    return {
        "tiny": Source(folder / "tiny-llama-en", decoder),
        "stories": Source(folder / "stories260k", decoder),
        "minilm": Source(minilm, transformers.AutoModel),
        **{k: Source(folder / v, None, ("--allow-pickle",)) for k, v in RESNETS.items()},
    }


def produce(source: Source, out: Path, *words: str) -> Output:
    """Plan, run and verify: the plan is exact to the byte, what no pass named is as it was."""
    job = [source.path, *words, *source.flags]
    counts_values = any(word.startswith(("prune", "super-weights")) for word in words)
    with ThreadPoolExecutor(2) as pool:  # most of a command's time here is Python's start
        planning = pool.submit(tool_json, "plan", *job, *(["--survey"] if counts_values else []))
        report = tool_json("run", *job, "-o", out)
        plan = planning.result()
    apart = {"report.json", "manifest.json"}
    files = {str(p.relative_to(out)): p.stat().st_size for p in out.rglob("*") if p.is_file()}
    counted = {name: size for name, size in files.items() if name not in apart}
    assert plan["exact"]
    assert plan["bytes"] == [sum(counted.values())] * 2
    assert plan["files"] == {name: [size, size] for name, size in counted.items()}
    assert plan["format"] == report["format"]
    assert report["totals"]["bytes_after"] == sum(counted.values())
    made = Output(source, out, report)
    verified = tool_json("verify", out, "--source", source.path, *source.flags)
    assert verified["bytes"] == sum(counted.values()) + files["report.json"]
    assert verified["untouched_compared"] == len(report["tensors"]) - len(made.changed)
    return made


def decoded(out: Path) -> Iterator[tuple[str, Array]]:
    """Every tensor of an output, decoded in float32; tensors of integers as they are."""
    with open_output(out) as checkpoint:
        for info in checkpoint.infos():
            if info.is_float:
                yield info.name, checkpoint.tensor(info.name).decode().reshape(info.shape)


def unpacked(made: Output) -> Path:
    """`compress unpack`: equal to the decode, rounded to the source's dtype."""
    dense = made.path.with_name("dense")
    tool_json("unpack", made.path, "-o", dense)
    stored = load_file(dense / "model.safetensors")
    for name, values in decoded(made.path):
        assert np.array_equal(stored[name], values.astype(stored[name].dtype)), name
    return dense


def outputs_of(model: Any, tokens: Any) -> Array:
    """Logits or last hidden states of one sentence."""
    with torch.no_grad():
        found: Array = model.eval()(**tokens)[0].float().numpy()
    return found


def load(path: Path, auto: Any) -> Any:
    return auto.from_pretrained(path, dtype=torch.float32, local_files_only=True)


def tokenize(path: Path) -> Any:
    """The sentence in the words of the tokenizer that lies in `path`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    tokens = tokenizer(TEXT, return_tensors="pt")
    return {k: v for k, v in tokens.items() if k in ("input_ids", "attention_mask")}


def expected_outputs(made: Output) -> Array:
    """The unpacked model's, its rounded weights replaced by the float32 decode."""
    dense = unpacked(made)
    model = load(dense, made.source.auto)
    state = model.state_dict()
    replaced = 0
    for name, values in decoded(made.path):
        if name in state:
            state[name].copy_(torch.from_numpy(np.array(values)))
            replaced += 1
    assert replaced == sum(r["dtype"] in ("F32", "BF16") for r in made.report["tensors"])
    return outputs_of(model, tokenize(made.source.path))


def difference(made: Output, *, adapter: bool = False) -> float:
    """Largest difference of what transformers (and PEFT) compute from our own decode."""
    tokens = tokenize(made.path)  # the output brings its own tokenizer
    model = load(made.path, made.source.auto)
    found = outputs_of(model, tokens)  # the first forward unpacks the weights
    expected = expected_outputs(made)
    if adapter:
        peft = pytest.importorskip("peft")
        without = float(np.abs(found - expected).max())
        assert without > 1e-2, "the adapter has nothing to add"
        found = outputs_of(peft.PeftModel.from_pretrained(model, made.path / "adapter"), tokens)
    assert np.isfinite(found).all()
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


LOADED = {
    "tiny 2 bits": ["quantize:bits=2,group=64"],
    "tiny 4 bits": ["quantize"],
    "tiny 8 bits, bf16 scales": ["quantize:bits=8,group=-1,scale_dtype=bf16"],
    "tiny with head and embedding": [
        "quantize:bits=2,group=32",
        "quantize:bits=4,group=64,targets=[lm_head]",
        "quantize:bits=8,group=-1,targets=[model.embed_tokens]",
    ],
    "stories 2 bits, fp32 scales": ["quantize:bits=2,group=4,scale_dtype=fp32"],
    "stories 4 bits": ["quantize:bits=4,group=32,on_indivisible=channel"],
    "stories 8 bits": ["quantize:bits=8,group=-1"],
    "stories mixed": [
        "quantize:bits=4,group=4,overrides=[{targets: ['*down_proj'], bits: 8, group: 43}, "
        "{targets: ['re:.*[qkv]_proj'], bits: 2}]"
    ],
    "minilm 8 bits": ["quantize:bits=8,group=-1"],
    "minilm mixed with int8 tables": [
        "quantize:bits=4,group=64,overrides=[{targets: ['*.attention.output.dense'], bits: 8}, "
        "{targets: ['*.intermediate.dense'], bits: 2}]",
        "quantize:bits=8,group=-1,targets=['*_embeddings']",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LOADED)
def test_transformers_computes_what_we_decode(
    models: dict[str, Source], tmp_path: Path, case: str
) -> None:
    made = produce(models[case.partition(" ")[0]], tmp_path / "out", *LOADED[case])
    assert made.report["format"] == "compressed-tensors"
    assert difference(made) <= 1e-5


MIXED = (
    "quantize:bits=4,group=64,overrides=[{targets: ['re:.*[qkv]_proj'], bits: 8, group: -1}, "
    "{targets: ['*gate_proj', '*up_proj'], bits: 2, group: 32}, "
    "{targets: ['*down_proj', 'model.layers.3.self_attn.o_proj'], bits: 8, group: 128}]"
)


@pytest.mark.slow
def test_overrides_give_each_tensor_its_own_width(
    models: dict[str, Source], tmp_path: Path
) -> None:
    made = produce(models["tiny"], tmp_path / "out", MIXED)
    scheme = {n: (r["bits"], r["group_size"]) for n, r in made.changed.items()}
    assert len(scheme) == 42
    for name, found in scheme.items():
        if "down_proj" in name or "layers.3.self_attn.o_proj" in name:
            asked = (8, 128)
        elif "q_proj" in name or "k_proj" in name or "v_proj" in name:
            asked = (8, 256)
        elif "gate_proj" in name or "up_proj" in name:
            asked = (2, 32)
        else:
            asked = (4, 64)
        assert found == asked, name
    with open_checkpoint(models["tiny"].path) as checkpoint:
        sets = fused_sets(checkpoint.infos())
    assert len(sets) == 12  # q/k/v and gate/up of six layers
    assert all(len({scheme[n] for n in names}) == 1 for names in sets)
    assert made.report["format"] == "compressed-tensors"
    assert difference(made) <= 1e-5


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("quantize:bits=8,group=-1,targets=[model.embed_tokens]", "tie_word_embeddings"),
        ("quantize:bits=3,group=4", "3-bit"),
        ("quantize:group=4,overrides=[{targets: ['*up_proj'], bits: 8}]", "engines fuse these"),
    ],
)
def test_what_no_engine_loads_is_refused(
    models: dict[str, Source], tmp_path: Path, words: str, why: str
) -> None:
    job = [models["stories"].path, words, "-o", tmp_path / "out"]
    done = tool("run", *job, "--format", "compressed-tensors")
    assert done.returncode == 2
    assert why in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_tied_embedding_goes_to_the_native_format(
    models: dict[str, Source], tmp_path: Path
) -> None:
    words = ["quantize:bits=4,group=4", "quantize:bits=8,group=-1,targets=[model.embed_tokens]"]
    made = produce(models["stories"], tmp_path / "out", *words)
    assert made.report["format"] == "native"
    assert made.changed["model.embed_tokens.weight"]["bits"] == 8
    unpacked(made)


ADAPTED = {
    "tiny 2 bits": ["super-weights", "quantize:bits=2,group=64", "low-rank:rank=8"],
    "tiny pruned": ["super-weights", "prune:sparsity=0.3", "quantize:group=64", "low-rank"],
    "stories named super weights": [
        "super-weights:coordinates=['1:3:5','1:9:5','2:0:171']",
        "quantize:bits=4,group=4",
        "low-rank:rank=4,ignore=['*q_proj']",
    ],
    "minilm pruned": ["prune:sparsity=0.5", "quantize:group=64", "low-rank:rank=16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ADAPTED)
def test_peft_adds_what_we_decode(models: dict[str, Source], tmp_path: Path, case: str) -> None:
    made = produce(models[case.partition(" ")[0]], tmp_path / "out", *ADAPTED[case])
    assert made.report["format"] == "compressed-tensors"
    assert difference(made, adapter=True) <= 1e-4


STORED = [
    ["quantize:bits=2,group=64"],
    ["prune:sparsity=0.6", "quantize:bits=2,group=64", "--format", "native"],
    ["quantize:bits=3,group=64,symmetric=false", "low-rank:rank=4,factor_dtype=int8"],
    ["quantize:bits=2,group=64", "--format", "dense"],
]


@pytest.mark.parametrize("words", STORED, ids=" ".join)
def test_super_weights_are_found_and_kept_exactly(
    models: dict[str, Source], tmp_path: Path, words: list[str]
) -> None:
    made = produce(models["tiny"], tmp_path / "out", "super-weights", *words)
    entries = made.facts["super-weights"]["entries"]
    assert {(e["tensor"], e["row"], e["column"]) for e in entries} == {
        (DOWN, row, column) for row, column in SUPER_WEIGHTS
    }
    assert all(e["layer"] == 1 for e in entries)
    outliers = {n: r["outliers"] for n, r in made.changed.items() if r["outliers"]}
    assert outliers == {DOWN: 2}
    original = load_file(models["tiny"].path / "model.safetensors")[DOWN]
    at = tuple(np.array(SUPER_WEIGHTS).T)
    assert [float(v) for v in original[at]] == [-1.328125, -0.75390625]
    kept = load_file(made.path / "super_weights.safetensors")
    assert kept[f"{DOWN}.values"].tobytes() == original[at].tobytes()
    stored = made.path / "model.safetensors"
    if made.report["format"] == "dense":
        assert load_file(stored)[DOWN][at].tobytes() == original[at].tobytes()
        assert tool("unpack", made.path, "-o", tmp_path / "dense").returncode == 0  # as it is
        assert load_file(tmp_path / "dense" / "model.safetensors")[DOWN].tobytes() == (
            load_file(stored)[DOWN].tobytes()
        )
    else:
        with open_output(made.path) as checkpoint:
            tensor = checkpoint.tensor(DOWN)
        assert np.array_equal(tensor.decode()[at], original[at].astype(np.float32))
        without = tensor.with_(outliers=None).decode()[at]
        assert not np.any(without == original[at].astype(np.float32))  # else nothing was shown
        back = load_file(unpacked(made) / "model.safetensors")[DOWN]
        assert back[at].tobytes() == original[at].tobytes()


def test_a_model_without_super_weights_says_so(models: dict[str, Source], tmp_path: Path) -> None:
    made = produce(models["stories"], tmp_path / "out", "super-weights", "quantize:group=4")
    assert made.facts["super-weights"]["found"] == 0
    assert not (made.path / "super_weights.safetensors").exists()


def state_of(source: Source) -> dict[str, Array]:
    """The pickled tensors by another reader than ours."""
    state = torch.load(source.path, map_location="cpu", weights_only=True)["state_dict"]
    return {name: values.numpy() for name, values in state.items()}


def check_restored(made: Output) -> dict[str, Array]:
    """Names, shapes and errors of the unpacked tensors; returns them."""
    state = state_of(made.source)
    dense = unpacked(made)
    back = load_file(dense / "model.safetensors")
    assert {"module.conv1.weight", "module.layer3.2.bn2.running_var"} <= back.keys()
    assert {n: (v.shape, v.dtype) for n, v in back.items()} == {
        n: (v.shape, v.dtype) for n, v in state.items()
    }
    compared = tool_json("diff", made.source.path, made.path, "--allow-pickle")
    assert compared["only_a"] == compared["only_b"] == []
    rows = {r["name"]: r for r in compared["tensors"]}
    for name, values in state.items():
        wide = values.astype(np.float64)
        error = float(np.sqrt(np.sum((back[name] - wide) ** 2) / np.sum(wide**2)))
        reported = made.changed.get(name, {"relative_error": 0.0})["relative_error"]
        assert reported == pytest.approx(error, abs=2e-6), name
        assert rows[name]["relative_error"] == pytest.approx(error, abs=2e-6), name
        assert rows[name]["equal"] == (name not in made.changed), name
    return back


@pytest.mark.slow
def test_a_cnn_of_four_bits_per_channel(models: dict[str, Source], tmp_path: Path) -> None:
    resnet = models["resnet20"]
    made = produce(resnet, tmp_path / "out", "quantize:bits=4,group=-1")
    assert made.report["format"] == "native"
    wide = {n for n, v in state_of(resnet).items() if v.ndim >= 2}  # the linear layer too
    assert made.changed.keys() == wide
    assert {r["bits"] for r in made.changed.values()} == {4}
    for name, values in check_restored(made).items():
        if name in wide:
            levels = [np.unique(row).size for row in values.reshape(values.shape[0], -1)]
            assert max(levels) <= 16, name


@pytest.mark.slow
def test_a_pruned_cnn_of_six_bits(models: dict[str, Source], tmp_path: Path) -> None:
    resnet = models["resnet32"]
    words = ["prune:sparsity=0.6", "quantize:bits=6,group=-1"]
    made = produce(resnet, tmp_path / "out", *words)
    state = {n: v for n, v in state_of(resnet).items() if n in made.changed}
    magnitudes = np.sort(np.abs(np.concatenate([v.ravel() for v in state.values()])))
    zeros = round(0.6 * magnitudes.size)
    assert magnitudes[zeros - 1] < magnitudes[zeros]  # no tie: one mask is right
    facts = made.facts["prune"]
    assert facts["weights"] == magnitudes.size
    assert facts["kept"] == magnitudes.size - zeros
    back = check_restored(made)
    for name, values in state.items():
        pruned = np.abs(values) < magnitudes[zeros]
        counted = made.changed[name]["sparsity"] * values.size
        assert counted == pytest.approx(np.count_nonzero(pruned), abs=1e-6), name
        assert not back[name][pruned].any(), name
    with open_output(made.path) as checkpoint:
        check_masks(checkpoint, state, magnitudes[zeros])


def check_masks(checkpoint: CompressedCheckpoint, state: dict[str, Array], least: float) -> None:
    """The stored counts and bitmasks are those of the threshold."""
    sparse = 0
    for name, values in state.items():
        kept = np.abs(values) >= least
        nonzeros = checkpoint.entries[name].terms.nonzeros
        assert nonzeros == (np.count_nonzero(kept),) * 2, name
        mask = checkpoint.tensor(name).mask
        if mask is not None:  # stored sparse; a dense form has its zeros in the codes
            assert np.array_equal(mask.reshape(kept.shape), kept), name
            sparse += 1
    assert sparse


@pytest.mark.parametrize("name", RESNETS)
def test_a_pickle_is_not_read_unasked(models: dict[str, Source], tmp_path: Path, name: str) -> None:
    resnet = models[name]
    for words in (["run", "-o", tmp_path / "out"], ["plan"]):
        done = tool(*words, resnet.path, "quantize:bits=4,group=-1")
        assert done.returncode == 3
        assert "--allow-pickle" in done.stderr
    assert list(tmp_path.iterdir()) == []
