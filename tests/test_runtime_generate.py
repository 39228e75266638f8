"""`compress generate`: what it writes, on how many threads, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from toolbox import produce, tiny_llama

from compress.errors import InputError, UsageError
from compress.runtime.generate import _Streamer, generate_text

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "w3 w5 .x8"


def add_tokenizer(folder: Path, size: int) -> Path:
    """Words w1, .x2, w3...: a clean-up would take the space before a point away."""
    words = {f"w{i}" if i % 2 else f".x{i}": i for i in range(size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with a tokenizer."""
    return add_tokenizer(tiny_llama(tmp_path_factory.mktemp("speaker") / "model"), 96)


def with_settings(model: Path, folder: Path, settings: dict[str, Any]) -> Path:
    shutil.copytree(model, folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    with pytest.raises(InputError, match="no tokenizer"):
        generate_text(model, "a")
    with pytest.raises(UsageError, match="max_new_tokens"):
        generate_text(model, "a", max_new_tokens=0)
    with pytest.raises(UsageError, match="not a directory"):
        generate_text(tmp_path / "nothing", "a")


def test_an_encoder_does_not_generate(minilm: Path) -> None:
    with pytest.raises(InputError, match="BertModel does not generate"):
        generate_text(minilm, "a")


def test_the_stream_is_the_text_where_a_clean_up_would_change_it(speaker: Path) -> None:
    parts: list[str] = []
    body = generate_text(speaker, PROMPT, max_new_tokens=8, write=parts.append)
    assert " ." in body["text"] and body["new_tokens"] == 8
    assert len(parts) > 3 and "".join(parts) == body["text"]


def test_only_a_character_at_the_end_is_held_back() -> None:
    class Bytes:
        def decode(self, tokens: list[int], **_: Any) -> str:
            return bytes(tokens).decode(errors="replace")

    parts: list[str] = []
    streamer = _Streamer(Bytes(), parts.append)
    streamer.put(torch.tensor([[1]]))  # the prompt
    for number in b"a \xff b \xc3\xa9":
        streamer.put(torch.tensor([number]))
    assert parts == ["a ", "\ufffd ", "b "]
    streamer.end()
    assert "".join(parts) == streamer.body()["text"] == "a \ufffd b \u00e9"


def test_beams_of_the_settings_are_left_out(speaker: Path, tmp_path: Path) -> None:
    expected = generate_text(speaker, PROMPT, max_new_tokens=4)["text"]
    beams = with_settings(speaker, tmp_path / "a", {"num_beams": 4, "num_return_sequences": 2})
    assert generate_text(beams, PROMPT, max_new_tokens=4)["text"] == expected


def test_settings_that_do_not_fit_are_an_error_of_input(speaker: Path, tmp_path: Path) -> None:
    wrong = with_settings(speaker, tmp_path / "a", {"repetition_penalty": -1.0})
    with pytest.raises(InputError, match="cannot continue the prompt: `penalty`"):
        generate_text(wrong, PROMPT, max_new_tokens=4)


def test_a_text_longer_than_the_positions_is_an_error_of_input(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=8,
                                     bos_token_id=1, eos_token_id=None)  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = add_tokenizer(tmp_path / "gpt2", 40)
    assert generate_text(model, PROMPT, max_new_tokens=5)["new_tokens"] == 5
    with pytest.raises(InputError, match="cannot continue the prompt"):
        generate_text(model, PROMPT, max_new_tokens=20)


# A command with its work left out: what it would run on.
COMMAND = """
import sys, types
from compress import cli
name = f"compress.runtime.{sys.argv[1]}"
stub = sys.modules[name] = types.ModuleType(name)
def work(*_, **__):
    import torch
    return {"threads": torch.get_num_threads()}
stub.generate_text = stub.bench_model = work
stub.summary = stub.print_bench = None
cli.app([*sys.argv[1:], "--json"])
"""


def test_the_commands_run_on_the_threads_of_torch() -> None:
    """0 threads, the default, is what torch takes where nothing limits it."""
    clean = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    programs = (
        ["import torch; print(torch.get_num_threads())"],
        [COMMAND, "generate", "out", "-p", "a"],
        [COMMAND, "bench", "out"],
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", *words], stdout=subprocess.PIPE, text=True, env=clean
        )
        for words in programs
    ]
    plain, *reports = (process.communicate(timeout=120)[0] for process in running)
    assert [json.loads(report)["threads"] for report in reports] == [int(plain)] * 2


def test_the_command_streams_to_stdout(
    speaker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # so that importing the command line leaves no trace
    from compress.cli import app

    app(["generate", str(speaker), "-p", PROMPT, "--max-new-tokens", "3"], standalone_mode=False)
    shown = capsys.readouterr()
    assert shown.out == generate_text(speaker, PROMPT, max_new_tokens=3)["text"] + "\n"
    assert "3 tokens in" in shown.err and "tokens/s" in shown.err and "; 1 threads" in shown.err


@pytest.mark.slow
def test_packed_weights_stream_the_greedy_text(shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "models" / "stories260k"
    out = produce(source, tmp_path / "out", "quantize:bits=4,group=4")
    prompt = "Once upon a time there was a little"
    parts: list[str] = []
    body = generate_text(out, prompt, max_new_tokens=24, threads=1, write=parts.append)
    assert len(parts) > 3 and "".join(parts) == body["text"]
    assert body["new_tokens"] == 24 and body["tokens_per_second"] > 0
    drawn = [generate_text(out, prompt, max_new_tokens=24, threads=1, temperature=1.0, seed=s)
             for s in (1, 1, 2)]  # fmt: skip
    assert drawn[0]["text"] == drawn[1]["text"] != drawn[2]["text"]
