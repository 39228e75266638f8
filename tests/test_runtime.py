"""The runtime: packed weights give what densely decoded ones give, in the memory of the file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ml_dtypes
import numpy as np
import pytest
import torch
from toolbox import tiny_llama, tool, tool_json, write_safetensors

import compress
from compress.errors import InputError, UsageError
from compress.kernels.packing import codes_segment, pack_linear
from compress.kernels.rows import decode_rows
from compress.output import open_output
from compress.runtime import memory, ops
from compress.runtime.modules import CompressedEmbedding, CompressedLinear, DenseLinear
from compress.tensor import Codes

transformers = pytest.importorskip("transformers")

PROMPTS = ["The committee met again on Tuesday", "Once upon a time there was a little", "In 1914"]
NEW_TOKENS = 64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests share the machine: waiting for a second thread would be most of their time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def produce(model: Path, out: Path, *words: str) -> Path:
    tool_json("run", model, "-o", out, *words)
    return out


def densely(model: Path, out: Path, auto: Any, dtype: Any = torch.float32) -> Any:
    """The source's model with the decoded weights of `out` in the place of its own."""
    dense = auto.from_pretrained(model, dtype=dtype, local_files_only=True).eval()
    state = dense.state_dict()
    with open_output(out) as checkpoint, torch.no_grad():
        for info in checkpoint.infos():
            if info.name in state:
                values = checkpoint.info(info.name).from_matrix(
                    checkpoint.tensor(info.name).decode()
                )
                state[info.name].copy_(torch.from_numpy(np.array(values)))
    return dense


def logits(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        return model(ids).logits.double()


def greedy(model: Any, ids: Any) -> list[int]:
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return made[0, ids.shape[1] :].tolist()


def relative(found: Any, expected: Any) -> float:
    return float((found - expected).norm() / expected.norm())


OUTPUTS = {
    "4 bits": ["quantize:bits=4,group=64"],
    "8 bits": ["quantize:bits=8,group=-1"],
    "3 bits, zero points, int8 factors": [
        "quantize:bits=3,group=64,symmetric=false", "low-rank:rank=4,factor_dtype=int8",
    ],
    "2 bits, head and table too": [
        "super-weights", "quantize:bits=2,group=64", "quantize:bits=4,group=64,targets=[lm_head]",
        "quantize:bits=8,group=-1,targets=[model.embed_tokens]",
    ],
    "every term": [
        "super-weights", "prune:sparsity=0.3", "quantize:bits=4,group=64", "low-rank:rank=8",
        "--format", "native",
    ],
    "pruned": ["super-weights", "prune:sparsity=0.6", "--format", "native"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", OUTPUTS)
def test_the_same_greedy_text_as_dense_weights(shared_dir: Path, tmp_path: Path, case: str) -> None:
    source = shared_dir / "models" / "tiny-llama-en"
    out = produce(source, tmp_path / "out", *OUTPUTS[case])
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    dense = densely(source, out, transformers.AutoModelForCausalLM)
    model = compress.load(out, dtype="float32")
    assert sum(isinstance(m, CompressedLinear) for m in model.modules()) >= 42
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert 0 < relative(logits(model, ids), logits(dense, ids)) <= 1e-4
        assert greedy(model, ids) == greedy(dense, ids)


def test_bfloat16_stays_as_close_as_bfloat16_is(shared_dir: Path, tmp_path: Path) -> None:
    """Rounding of activations to bfloat16 is a hundred times what the products add."""
    source = shared_dir / "models" / "tiny-llama-en"
    out = produce(source, tmp_path / "out", "quantize:bits=4,group=64")
    ids = torch.tensor([[0, *range(100, 120)]])
    exact = logits(densely(source, out, transformers.AutoModelForCausalLM), ids)
    dense = densely(source, out, transformers.AutoModelForCausalLM, torch.bfloat16)
    model = compress.load(out)
    assert model.dtype == torch.bfloat16
    assert isinstance(model.lm_head, DenseLinear)
    assert relative(logits(model, ids), exact) <= 1.5 * relative(logits(dense, ids), exact)


def test_fast_is_coarser_and_still_close(shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "models" / "stories260k"
    out = produce(source, tmp_path / "out", "quantize:bits=4,group=4")
    ids = torch.tensor([[1, *range(300, 330)]])
    dense = logits(densely(source, out, transformers.AutoModelForCausalLM), ids)
    error = {p: relative(logits(compress.load(out, precision=p), ids), dense)
             for p in ("exact", "fast")}  # fmt: skip
    assert error["exact"] <= 1e-4 < error["fast"] <= 3e-2


def test_a_tied_table_is_held_once(shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "models" / "stories260k"
    words = ["quantize:bits=4,group=4", "quantize:bits=8,group=-1,targets=[model.embed_tokens]"]
    out = produce(source, tmp_path / "out", *words)
    model = compress.load(out)
    table, head = model.get_input_embeddings(), model.lm_head
    assert isinstance(table, CompressedEmbedding) and isinstance(head, CompressedLinear)
    assert table.packed.data_ptr() == head.packed.data_ptr()
    ids = torch.tensor([[1, *range(300, 330)]])
    dense = densely(source, out, transformers.AutoModelForCausalLM)
    assert torch.equal(table(ids), dense.get_input_embeddings()(ids))
    assert relative(logits(model, ids), logits(dense, ids)) <= 1e-4


def test_an_encoder_with_biases_and_int8_tables(minilm: Path, tmp_path: Path) -> None:
    words = ["quantize:bits=4,group=64", "low-rank:rank=4", "quantize:bits=8,group=-1,"
             "targets=['*_embeddings']"]  # fmt: skip
    out = produce(minilm, tmp_path / "out", *words[:1], words[2], words[1])
    model = compress.load(out)
    dense = densely(minilm, out, transformers.AutoModel)
    ids = torch.arange(1000, 1040).reshape(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with torch.no_grad():
        found, expected = (m(ids, attention_mask=mask)[0] * mask[..., None] for m in (model, dense))
    assert isinstance(model.embeddings.position_embeddings, CompressedEmbedding)
    cosine = torch.nn.functional.cosine_similarity(found.sum(1), expected.sum(1))
    assert float(cosine.min()) > 0.999999
    assert relative(found.double(), expected.double()) <= 1e-4


def test_a_transposed_linear_and_other_names(tmp_path: Path) -> None:
    """GPT-2: Conv1D layers, a tied head, names without the model's prefix."""
    source = tmp_path / "gpt2"
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=32, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.GPT2LMHeadModel(config).eval()
    for name, parameter in reference.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    reference.save_pretrained(source)
    state = {n.removeprefix("transformer."): p.detach().numpy()
             for n, p in reference.transformer.named_parameters()}  # fmt: skip
    write_safetensors(source / "model.safetensors", state)
    out = produce(source, tmp_path / "out", "quantize:bits=8,group=32")
    model = compress.load(out)
    assert isinstance(model.transformer.h[1].mlp.c_fc, CompressedLinear)
    ids = torch.arange(20).reshape(1, 20)
    dense = reference
    with open_output(out) as checkpoint, torch.no_grad():
        for info in checkpoint.infos():
            values = info.from_matrix(checkpoint.tensor(info.name).decode())
            dense.transformer.get_parameter(info.name).copy_(torch.from_numpy(np.array(values)))
    assert relative(logits(model, ids), logits(dense, ids)) <= 1e-4


def test_plain_and_dense_outputs_load_as_they_are(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "model", shards=2)
    out = produce(source, tmp_path / "out", "quantize:bits=4,group=32", "--format", "dense")
    ids = torch.arange(3, 20).reshape(1, -1)
    for path in (source, out):
        expected = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
        model = compress.load(path)
        assert not any(isinstance(m, CompressedLinear) for m in model.modules())
        assert torch.equal(logits(model, ids), logits(expected, ids))
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())


# -- ops and modules -------------------------------------------------------------------------


def codes(rows: int, columns: int, bits: int, group_size: int, zero: bool = False) -> Codes:
    rng = np.random.default_rng(rows + columns + bits)
    groups = -(-columns // group_size)
    scale = rng.uniform(0.01, 0.1, (rows, groups)).astype(np.float16)
    points = rng.integers(0, 1 << bits, (rows, groups), dtype=np.uint8) if zero else None
    values = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    return Codes(values, scale, points, bits, group_size)


def linear(rows: int = 24, columns: int = 48, **options: Any) -> CompressedLinear:
    packed = pack_linear(rows, columns, [codes_segment(codes(rows, columns, 4, 16))], **options)
    return CompressedLinear(torch.from_numpy(packed)).eval()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("columns", "group_size"), [(64, 32), (80, 80), (50, 20), (300, 300)])
def test_rows_of_a_packed_table(bits: int, columns: int, group_size: int) -> None:
    table = codes(37, columns, bits, group_size, zero=bits in (3, 4))
    packed = pack_linear(37, columns, [codes_segment(table)])
    rows = np.array([36, 0, 16, 15, 16])
    assert np.array_equal(decode_rows(packed, rows), table.dequantize()[rows])
    with pytest.raises(IndexError, match="0 to 36"):
        decode_rows(packed, np.array([37]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (0, 48)])
def test_any_leading_shape_and_dtype(dtype: Any, shape: tuple[int, ...]) -> None:
    weight = torch.from_numpy(codes(24, 48, 4, 16).dequantize()).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = linear()(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 24)
    expected = x.double() @ weight.T
    step = {torch.float32: 1e-4, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert float((y.double() - expected).norm()) <= step * float(expected.norm())


def test_a_transposed_input_is_read_in_its_own_order() -> None:
    x = torch.randn(48, 5).T
    module = linear()
    assert not x.is_contiguous()
    assert torch.equal(module(x), module(x.contiguous()))


@pytest.mark.filterwarnings("ignore")
def test_torch_accepts_the_ops() -> None:
    packed = linear().packed
    x = torch.randn(2, 3, 48)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(ops.linear, (x.to(dtype), packed, 24, "exact"))
        torch.library.opcheck(ops.dense_linear, (x.to(dtype), torch.randn(24, 48).to(dtype)))
        torch.library.opcheck(ops.embedding, (torch.tensor([[1, 3]]), packed, 48, dtype))


def compiled(model: Any, x: Any, backend: str) -> Any:
    with torch.no_grad():
        return torch.compile(model, fullgraph=True, backend=backend)(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_takes_the_model_whole(tmp_path: Path, backend: str) -> None:
    source = tiny_llama(tmp_path / "model", layers=1, dtype=ml_dtypes.bfloat16)
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    words = ["quantize:bits=4,group=32", "quantize:bits=8,group=-1,targets=[model.embed_tokens]"]
    model = compress.load(produce(source, tmp_path / "out", *words), dtype="float32")
    model.config.use_cache = False
    ids = torch.arange(3, 20).reshape(1, -1)
    torch._dynamo.reset()
    found = compiled(model, ids, backend).logits
    # A last bit of an activation may round another way, a step of its 16 bits.
    assert relative(found.double(), logits(model, ids)) <= 1e-4


@pytest.mark.filterwarnings("ignore")
def test_export_keeps_the_op() -> None:
    module, x = linear(), torch.randn(2, 48)
    program = torch.export.export(
        module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    )
    assert "compress.linear" in str(program.graph)
    longer = torch.randn(7, 48)
    assert torch.equal(program.module()(longer), module(longer))


def test_dense_linear_shares_the_weight() -> None:
    plain = torch.nn.Linear(48, 24, bias=True, dtype=torch.bfloat16).requires_grad_(False)
    module = DenseLinear(plain)
    assert module.weight is plain.weight
    for batch in (1, 8, 40):
        x = torch.randn(batch, 48).bfloat16()
        expected = x.double() @ plain.weight.double().T + plain.bias.double()
        assert torch.allclose(module(x).double(), expected, rtol=2e-2, atol=2e-2)


def test_wrong_tensors_are_named() -> None:
    module = linear()
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 48\], not \[2, 47\]"):
        module(torch.randn(2, 47))
    with pytest.raises(ValueError, match="x is on the device meta"):
        module(torch.randn(2, 48, device="meta"))
    with pytest.raises(ValueError, match="x requires a gradient"):
        module(torch.randn(2, 48, requires_grad=True))
    with pytest.raises(TypeError, match="float32, float16 or bfloat16, not"):
        module(torch.zeros(2, 48, dtype=torch.int32))
    with pytest.raises(ValueError, match="precision"):
        CompressedLinear(module.packed, "rough")
    with pytest.raises(TypeError, match="packed must be uint8"):
        CompressedLinear(module.packed.float())
    with pytest.raises(ValueError, match="not a packed matrix"):
        CompressedLinear(torch.zeros(1000, dtype=torch.uint8))
    table = CompressedEmbedding(module.packed, torch.float32)
    with pytest.raises(ValueError, match="indices are on the device meta"):
        table(torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(IndexError, match="0 to 23"):
        table(torch.tensor([24]))


def test_state_and_copies_keep_the_packed_bytes() -> None:
    import copy

    module = linear(bias=np.arange(24, dtype=np.float32))
    x = torch.randn(3, 48)
    twin = copy.deepcopy(module).to(torch.bfloat16)
    assert twin.packed.dtype == torch.uint8
    assert torch.equal(twin(x), module(x))
    assert module.weight.shape == (24, 48) and module.weight.is_meta
    assert list(module.state_dict()) == ["packed"]


# -- bad input -------------------------------------------------------------------------------


def test_what_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(tmp_path / "model")
    with pytest.raises(UsageError):
        compress.load(tmp_path / "nothing")
    with pytest.raises(UsageError, match="precision 'rough'"):
        compress.load(model, precision="rough")
    with pytest.raises(UsageError, match="dtype int4"):
        compress.load(model, dtype="int4")
    with pytest.raises(UsageError, match="threads must be positive"):
        compress.load(model, threads=0)
    config = json.loads((model / "config.json").read_text())
    for change, words in (
        ({"model_type": "no-such-model"}, "model_type no-such-model is unknown"),
        ({"hidden_size": 32}, "has the shape"),
        ({"num_hidden_layers": 3}, "9 weights of LlamaForCausalLM are not there"),
    ):
        (model / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=words):
            compress.load(model)
    (model / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        compress.load(model)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="transformers") as caught:
        compress.load(model)
    assert "compress-checkpoints[hf]" in str(caught.value.hint)


def test_generate_says_what_is_missing(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    out = produce(model, tmp_path / "out", "quantize:bits=4,group=32")
    from compress.runtime.generate import generate_text

    with pytest.raises(InputError, match="no tokenizer"):
        generate_text(out, "a")
    with pytest.raises(UsageError, match="max_new_tokens"):
        generate_text(out, "a", max_new_tokens=0)
    done = tool("generate", tmp_path / "nothing", "--prompt", "a")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_an_encoder_does_not_generate(minilm: Path) -> None:
    from compress.runtime.generate import generate_text

    with pytest.raises(InputError, match="BertModel does not generate"):
        generate_text(minilm, "a")


@pytest.mark.slow
def test_generate_streams_the_greedy_text(shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "models" / "tiny-llama-en"
    out = produce(source, tmp_path / "out", "quantize:bits=4,group=64")
    from compress.runtime.generate import generate_text

    parts: list[str] = []
    body = generate_text(out, PROMPTS[0], max_new_tokens=24, threads=1, write=parts.append)
    assert len(parts) > 3 and "".join(parts) == body["text"]
    assert body["new_tokens"] == 24 and body["tokens_per_second"] > 0
    drawn = [generate_text(out, PROMPTS[0], max_new_tokens=24, threads=1, temperature=1.0, seed=s)
             for s in (1, 1, 2)]  # fmt: skip
    assert drawn[0]["text"] == drawn[1]["text"] != drawn[2]["text"]
    done = tool("generate", out, "--prompt", PROMPTS[0], "--max-new-tokens", "24", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == body["text"] + "\n"
    assert "tokens/s" in done.stderr and "Traceback" not in done.stderr


# -- memory ----------------------------------------------------------------------------------

MEASURE = """
import sys
import torch, compress
from compress.run import peak_memory
torch.set_num_threads(1)
model = compress.load(sys.argv[1])
with torch.inference_mode():
    model(torch.tensor([[1, 2, 3]]))
from compress.runtime import memory
print(peak_memory(), memory.resident_bytes(model))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_is_that_of_the_packed_file(tmp_path: Path) -> None:
    """Beside what the same program takes with a model of a few kilobytes."""
    outs = []
    for name, sizes in (
        ("tiny", {"layers": 1}),
        ("large", {"hidden": 1024, "ffn": 4096, "layers": 12, "vocabulary": 32000}),
    ):
        model = tiny_llama(tmp_path / name, dtype=ml_dtypes.bfloat16, **sizes)
        outs.append(produce(model, tmp_path / f"{name}-out", "quantize:bits=4,group=64"))
        shutil.rmtree(model)
    running = [
        subprocess.Popen([sys.executable, "-c", MEASURE, out], stdout=subprocess.PIPE, text=True)
        for out in outs
    ]
    (framework, _), (peak, resident) = (
        map(int, process.communicate(timeout=300)[0].split()) for process in running
    )
    packed = memory.packed_bytes(outs[1])
    assert 160e6 < packed < 260e6
    assert resident <= 1.02 * packed
    assert peak - framework <= 1.15 * packed
