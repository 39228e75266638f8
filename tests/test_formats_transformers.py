"""What transformers and PEFT make of our bytes: the logits of our own decode."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
from safetensors.numpy import save_file
from toolbox import tool_json

from compress import formats, kernels
from compress.checkpoint import open_checkpoint
from compress.formats import metadata
from compress.formats.base import ADAPTER, MODEL, Entry
from compress.layout import PART_FILES
from compress.output import open_any
from compress.passes.base import CodesSpec, Terms
from compress.tensor import DTYPES, Array, Codes, Factors, Outliers, Role, Tensor, TensorInfo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.model

ENGINE = formats.get("compressed-tensors")
Choice = Callable[[TensorInfo, Array], tuple[Tensor, Terms] | None]
Decoded = dict[str, Array]


def quantize(
    info: TensorInfo, source: Array, bits: int, group: int, scale_dtype: str = "F16"
) -> tuple[Tensor, Terms]:
    rows, columns = source.shape
    group = min(group, columns)
    codes = Codes(
        np.empty((rows, columns), np.uint8),
        np.empty((rows, -(-columns // group)), DTYPES[scale_dtype]),
        None,
        bits,
        group,
    )
    bad = kernels.quantize_groups(
        source,
        None,
        bits=bits,
        group_size=group,
        symmetric=True,
        scale_dtype=scale_dtype,
        search="none",
        signed_scale=False,
        codes=codes.values,
        scale=codes.scale,
        zero_point=None,
        sums=np.zeros((rows, 3)),
    )
    assert bad == -1
    return Tensor(info, source, codes=codes), Terms(codes=CodesSpec(bits, group, True, scale_dtype))


def linear(bits: int, group: int, scale_dtype: str = "F16") -> Choice:
    def choose(info: TensorInfo, source: Array) -> tuple[Tensor, Terms] | None:
        if info.role is not Role.LINEAR:
            return None
        return quantize(info, source, bits, group, scale_dtype)

    return choose


def role_of(info: TensorInfo) -> Role:
    """The roles of the three models here, told from names, so that the tests stand alone."""
    if len(info.shape) != 2 or not info.name.endswith(".weight"):
        return Role.NORM
    if info.name == "lm_head.weight":
        return Role.HEAD
    if "embed_tokens" in info.name or "word_embeddings" in info.name:
        return Role.EMBEDDING
    if "position_embeddings" in info.name or "token_type" in info.name:
        return Role.POSITION
    return Role.LINEAR


def build(source: Path, out: Path, choose: Choice, *, force: bool = False) -> Decoded:
    """Write an output by hand; returns the decoded value of every tensor."""
    decoded: Decoded = {}
    parts: dict[str, dict[str, Array]] = {MODEL: {}}
    entries = []
    out.mkdir(parents=True)
    with open_checkpoint(source) as checkpoint:
        infos = [dataclasses.replace(i, role=role_of(i)) for i in checkpoint.infos()]
        for info in infos:
            values = checkpoint.read(info)
            chosen = choose(info, values)
            if chosen is None:
                parts[MODEL][info.name] = values
                decoded[info.name] = values.astype(np.float32)
                continue
            tensor, terms = chosen
            entries.append(Entry(info, terms))
            decoded[info.name] = tensor.decode().reshape(info.shape)
            for (part, name), array in ENGINE.pack(tensor, terms).items():
                parts.setdefault(part, {})[name] = array
        changed = {e.info.name: e.terms for e in entries}
        if not force:
            assert formats.refusal(ENGINE, changed, infos, checkpoint.config) is None
        files = ENGINE.extra_files(entries, checkpoint.config, infos)
    for name, content in files.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    record = metadata.encode(ENGINE.name, entries)
    save_file(parts[MODEL], out / "model.safetensors", metadata=record)
    for part in parts.keys() - {MODEL}:
        save_file(parts[part], out / PART_FILES[part], metadata={"format": "pt"})
    return decoded


def run(model: Any) -> Array:
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        logits: Array = model.eval()(ids)[0].float().numpy()
    return logits


def reference(source: Path, decoded: Decoded, auto: Any, prefix: str = "") -> Array:
    """Outputs of the source model with our decoded weights put into it."""
    model = auto.from_pretrained(source, dtype=torch.float32)
    state = model.state_dict()
    for name, values in decoded.items():
        inner = name.removeprefix(prefix)
        if inner in state:
            state[inner].copy_(torch.from_numpy(np.array(values)))
    return run(model)


def loaded(out: Path, auto: Any, **options: Any) -> Any:
    return auto.from_pretrained(out, dtype=torch.float32, **options)


@pytest.fixture
def tiny(shared_dir: Path) -> Path:
    return shared_dir / "models" / "tiny-llama-en"


@pytest.fixture
def stories(shared_dir: Path) -> Path:
    return shared_dir / "models" / "stories260k"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [32, 43, 172])
def test_bytes_equal_the_librarys(bits: int, columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << bits, (5, columns)).astype(np.uint8)
    info = TensorInfo("m.weight", "", "F32", (5, columns), 20 * columns, role=Role.LINEAR)
    codes = Codes(values, np.ones((5, 1), np.float16), None, bits, columns)
    tensor = Tensor(info, np.zeros((5, columns), np.float32), codes=codes)
    named = ENGINE.pack(tensor, Terms(codes=CodesSpec(bits, columns, True, "F16")))
    signed = torch.from_numpy(values.astype(np.int16) - (1 << (bits - 1))).to(torch.int8)
    theirs = pack_to_int32(signed, bits).numpy()
    assert named[MODEL, "m.weight_packed"].tobytes() == theirs.tobytes()


@pytest.mark.parametrize(
    ("bits", "group", "scale_dtype"),
    [(2, 4, "F16"), (4, 4, "BF16"), (8, 1 << 20, "F32"), (4, 1 << 20, "F16")],
)
def test_llama_loads(
    stories: Path, tmp_path: Path, bits: int, group: int, scale_dtype: str
) -> None:
    """Columns of 172 at 2 and 4 bits do not fill whole words."""
    auto = transformers.AutoModelForCausalLM
    decoded = build(stories, tmp_path / "out", linear(bits, group, scale_dtype))
    expected = reference(stories, decoded, auto)
    assert np.abs(run(loaded(tmp_path / "out", auto)) - expected).max() <= 1e-5


def test_a_model_class_without_the_outer_name_loads(stories: Path, tmp_path: Path) -> None:
    auto = transformers.AutoModel
    decoded = build(stories, tmp_path / "out", linear(4, 4))
    expected = reference(stories, decoded, auto, prefix="model.")
    assert np.abs(run(loaded(tmp_path / "out", auto)) - expected).max() <= 1e-5


def mixed(info: TensorInfo, source: Array) -> tuple[Tensor, Terms] | None:
    """Every kind of module at once: int8 table, 8-bit head, 2, 4 and 8 bits, some left alone."""
    if info.role is Role.EMBEDDING:
        return quantize(info, source, 8, 1 << 20)
    if info.role is Role.HEAD or "down_proj" in info.name:
        return quantize(info, source, 8, 32)
    if info.role is not Role.LINEAR or "layers.4.self_attn.o_proj" in info.name:
        return None
    return quantize(info, source, 2 if "layers.1.self_attn" in info.name else 4, 32)


def test_mixed_widths_head_and_embedding_load(tiny: Path, tmp_path: Path) -> None:
    auto = transformers.AutoModelForCausalLM
    decoded = build(tiny, tmp_path / "out", mixed)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mixed-precision"
    expected = reference(tiny, decoded, auto)
    assert np.abs(run(loaded(tmp_path / "out", auto)) - expected).max() <= 1e-5


def test_minilm_with_int8_tables_loads(minilm: Path, tmp_path: Path) -> None:
    def choose(info: TensorInfo, source: Array) -> tuple[Tensor, Terms] | None:
        if info.role in (Role.EMBEDDING, Role.POSITION):
            return quantize(info, source, 8, 1 << 20)
        return linear(4, 64)(info, source)

    auto = transformers.AutoModel
    decoded = build(minilm, tmp_path / "out", choose)
    expected = reference(minilm, decoded, auto)
    model = loaded(tmp_path / "out", auto)
    assert np.abs(run(model) - expected).max() <= 1e-5


def test_a_tied_embedding_breaks_which_is_why_it_is_refused(stories: Path, tmp_path: Path) -> None:
    def table(info: TensorInfo, source: Array) -> tuple[Tensor, Terms] | None:
        return quantize(info, source, 8, 1 << 20) if info.role is Role.EMBEDDING else None

    with pytest.raises(AssertionError, match="tie_word_embeddings"):
        build(stories, tmp_path / "refused", table)
    build(stories, tmp_path / "out", table, force=True)
    with pytest.raises(RuntimeError, match="dtype"):
        run(loaded(tmp_path / "out", transformers.AutoModelForCausalLM))


def adapted(bits: int, group: int) -> Choice:
    """Low rank on most modules (of two ranks), super weights on some, both on others."""

    def choose(info: TensorInfo, source: Array) -> tuple[Tensor, Terms] | None:
        if info.role is not Role.LINEAR:
            return None
        tensor, terms = quantize(info, source, bits, group)
        if "v_proj" in info.name or "down_proj" in info.name:
            rows, columns = np.array([0, 2, 5]), np.array([7, 3, 7])
            values = source[rows, columns] + source.dtype.type(0.5)
            tensor = tensor.with_(outliers=Outliers(rows, columns, values, True))
            terms = dataclasses.replace(terms, outliers=(3, 3), outlier_columns=(2, 2))
        if "q_proj" in info.name or "v_proj" in info.name:
            return tensor, terms
        rank = 4 if "down_proj" in info.name or "layers.1." in info.name else 8
        error = source.astype(np.float32) - tensor.with_(outliers=None).decode()
        u, s, v = np.linalg.svd(error, full_matrices=False)
        factors = Factors((u[:, :rank] * s[:rank]).astype(np.float16), v[:rank].astype(np.float16))
        return tensor.with_(factors=factors), dataclasses.replace(terms, rank=rank)

    return choose


@pytest.mark.parametrize("dequantize", [False, True])
def test_adapter_restores_factors_and_super_weights(
    stories: Path, tmp_path: Path, dequantize: bool
) -> None:
    peft = pytest.importorskip("peft")
    auto = transformers.AutoModelForCausalLM
    out = tmp_path / "out"
    decoded = build(stories, out, adapted(4, 4))
    expected = reference(stories, decoded, auto)
    options: dict[str, Any] = {}
    if dequantize:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = loaded(out, auto, **options)
    base = run(model)  # without `dequantize` the first forward decompresses, which PEFT needs
    assert np.isfinite(base).all()
    assert np.abs(base - expected).max() > 1e-2
    # `dequantize` decodes in the scales' float16: each weight is rounded once more.
    tolerance = 2e-2 if dequantize else 1e-4
    found = run(peft.PeftModel.from_pretrained(model, out / Path(PART_FILES[ADAPTER]).parent))
    assert np.abs(found - expected).max() <= tolerance


def test_a_run_with_super_weights_serves_them_with_and_without_the_adapter(
    tiny: Path, tmp_path: Path
) -> None:
    """The base alone is no worse than plain codes; the adapter makes the super weights exact."""
    peft = pytest.importorskip("peft")
    auto = transformers.AutoModelForCausalLM
    out, plain_out = tmp_path / "out", tmp_path / "plain"
    tool_json("run", tiny, "-o", out, "super-weights", "quantize:bits=4,group=32")
    tool_json("run", tiny, "-o", plain_out, "quantize:bits=4,group=32")
    base = loaded(out, auto)
    assert np.array_equal(run(base), run(loaded(plain_out, auto)))
    adapted_model = peft.PeftModel.from_pretrained(base, out / "adapter")
    with open_any(out) as checkpoint:
        decoded = {i.name: checkpoint.tensor(i.name).decode() for i in checkpoint.infos()}
        decoded = {n: v.reshape(checkpoint.info(n).shape) for n, v in decoded.items()}
        places = checkpoint.tensor("model.layers.1.mlp.down_proj.weight").outliers
    assert places is not None and places.rows.tolist() == [69, 206]
    merged = adapted_model.merge_and_unload().state_dict()
    found = merged["model.layers.1.mlp.down_proj.weight"].numpy()[places.rows, places.columns]
    assert found == pytest.approx(places.values.astype(np.float32), rel=1e-6)
    assert np.abs(run(adapted_model) - reference(tiny, decoded, auto)).max() <= 1e-4


def test_ranks_of_layers_1_and_11_are_told_apart(tmp_path: Path) -> None:
    """PEFT matches rank_pattern by the end of a module's name."""
    peft = pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=12,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")

    def choose(info: TensorInfo, source: Array) -> tuple[Tensor, Terms] | None:
        if "up_proj" not in info.name:
            return linear(8, 16)(info, source)
        rank = 1 + int(info.name.split(".")[2]) % 11
        tensor, terms = quantize(info, source, 8, 16)
        rng = np.random.default_rng(rank)
        factors = Factors(
            rng.normal(size=(16, rank)).astype(np.float16) / 8,
            rng.normal(size=(rank, 16)).astype(np.float16) / 8,
        )
        return tensor.with_(factors=factors), dataclasses.replace(terms, rank=rank)

    auto = transformers.AutoModelForCausalLM
    decoded = build(tmp_path / "source", tmp_path / "out", choose)
    expected = reference(tmp_path / "source", decoded, auto)
    model = loaded(tmp_path / "out", auto)
    run(model)
    found = peft.PeftModel.from_pretrained(model, tmp_path / "out" / "adapter")
    assert np.abs(run(found) - expected).max() <= 1e-4


def test_our_reader_agrees_with_the_loaded_model(tiny: Path, tmp_path: Path) -> None:
    """The decompressed weights inside transformers are bit-equal to our decode."""
    out = tmp_path / "out"
    build(tiny, out, mixed)
    model = loaded(out, transformers.AutoModelForCausalLM)
    run(model)
    state = model.state_dict()
    with open_any(out) as checkpoint:
        for info in checkpoint.infos():
            ours = checkpoint.tensor(info.name).decode().reshape(info.shape)
            assert np.array_equal(state[info.name].numpy(), ours), info.name


def test_native_files_are_not_taken_for_a_model(stories: Path, tmp_path: Path) -> None:
    suffix = formats.get("native").weights_suffix
    shutil.copy(stories / "config.json", tmp_path)
    shutil.copy(stories / "model.safetensors", tmp_path / f"model{suffix}")
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
