"""The runtime: packed weights give what densely decoded ones give, in the memory of the file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ml_dtypes
import numpy as np
import pytest
import torch
from toolbox import produce, tiny_llama, write_safetensors

import compress
from compress.errors import InputError, UsageError
from compress.output import open_output
from compress.runtime import memory
from compress.runtime.modules import CompressedEmbedding, CompressedLinear, DenseLinear

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["The committee met again on Tuesday", "Once upon a time there was a little", "In 1914"]
NEW_TOKENS = 64


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


def greedy(model: Any, ids: Any) -> Any:
    """The prompt and the likeliest tokens after it."""
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                              max_new_tokens=NEW_TOKENS, pad_token_id=0)  # fmt: skip


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
        text = greedy(model, ids)
        assert text.shape[1] > ids.shape[1] + 8
        # The dense model's own text is the same where it finds each next token likeliest.
        likeliest = logits(dense, text).argmax(-1)[:, ids.shape[1] - 1 : -1]
        assert torch.equal(likeliest, text[:, ids.shape[1] :])


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


def test_what_a_class_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    """T5 casts activations to the dtype of `wo`, which it keeps in float32 beside float16."""
    source = tmp_path / "t5"
    config = transformers.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=1,
                                   num_heads=4, decoder_start_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(source)
    out = produce(source, tmp_path / "out", "quantize:bits=8,group=32,targets=['*.wo']")
    ids = torch.arange(5, 15)[None]
    for dtype, wo in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        auto = transformers.T5ForConditionalGeneration
        expected = auto.from_pretrained(source, dtype=dtype, local_files_only=True).eval()
        model = compress.load(source, dtype=dtype, dense_kernels=False)
        dtypes = {name: p.dtype for name, p in expected.named_parameters()}
        assert {name: p.dtype for name, p in model.named_parameters()} == dtypes
        assert dtypes["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == wo
        packed = compress.load(out, dtype=dtype)
        with torch.no_grad():
            results = [m(input_ids=ids, decoder_input_ids=ids).logits for m in
                       (expected, model, packed)]  # fmt: skip
        assert torch.equal(results[0], results[1])
        module = packed.encoder.block[0].layer[1].DenseReluDense.wo
        assert isinstance(module, CompressedLinear) and module.weight.dtype == wo
        assert results[2].dtype == results[0].dtype
        assert relative(results[2].double(), results[0].double()) <= 5e-2


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
        ({"dtype": ["bfloat16"]}, r"config\.json"),
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


# -- memory ----------------------------------------------------------------------------------

MEASURE = """
import sys
import torch, compress
from compress.run import peak_memory
from compress.runtime import memory
torch.set_num_threads(1)
for path in sys.argv[1:]:
    model = compress.load(path)
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]))
    print(peak_memory(), memory.resident_bytes(model))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_is_that_of_the_packed_file(tmp_path: Path) -> None:
    """Beside what the same program takes with a model of a few kilobytes."""
    outs = []
    for name, sizes in (
        ("tiny", {"layers": 1}),
        ("large", {"hidden": 1024, "ffn": 4096, "layers": 4, "vocabulary": 32000}),
    ):
        model = tiny_llama(tmp_path / name, dtype=ml_dtypes.bfloat16, **sizes)
        outs.append(produce(model, tmp_path / f"{name}-out", "quantize:bits=4,group=64"))
        shutil.rmtree(model)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *outs], capture_output=True, text=True, timeout=300,
        check=True,
    )  # fmt: skip
    (framework, _), (peak, resident) = (map(int, line.split()) for line in done.stdout.splitlines())
    packed = memory.packed_bytes(outs[1])
    assert 90e6 < packed < 130e6
    assert resident <= 1.02 * packed
    assert peak - framework <= 1.15 * packed
