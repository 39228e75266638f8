"""`compress generate`: text from a prompt, streamed, and how fast it came."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compress.errors import InputError, UsageError, show
from compress.run import peak_memory
from compress.runtime.architecture import require_transformers
from compress.runtime.loading import load
from compress.runtime.memory import packed_bytes, resident_bytes
from compress.runtime.tokenizer import load_tokenizer

Write = Callable[[str], None]


def generate_text(
    path: Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    precision: str = "exact",
    threads: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    write: Write | None = None,
) -> dict[str, Any]:
    """Continue `prompt`; `write` gets the new text as it comes, in whole words.

    temperature  0 takes the likeliest token each time, otherwise tokens are drawn with `seed`

    Returns the text, the number of tokens, seconds and bytes. Raises UsageError for an argument,
    InputError where `path` is not a decoder, has no tokenizer or cannot continue the prompt.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be positive, not {max_new_tokens}")
    if not 0 <= temperature <= 100:
        raise UsageError(f"temperature must be 0 to 100, not {temperature}")
    if not path.is_dir():
        raise UsageError(
            f"{show(str(path))}: not a directory with a model",
            hint="name an output of compress run",
        )
    transformers = require_transformers()
    quiet(transformers)
    tokenizer = load_tokenizer(path)
    started = time.perf_counter()
    model = load(path, precision=precision, threads=threads)
    load_seconds = time.perf_counter() - started
    if not model.can_generate():
        raise InputError(
            f"{show(str(path))}: {type(model).__name__} does not generate text",
            hint="generate needs a decoder, such as a model for causal language modelling",
        )
    tokens = tokenizer(prompt, return_tensors="pt")
    if not tokens["input_ids"].numel():
        raise UsageError("the prompt has no tokens", hint="give some text as --prompt")
    streamer = _Streamer(tokenizer, write or (lambda text: None))
    torch.manual_seed(seed)
    try:
        _generate(model, tokenizer, tokens, streamer, max_new_tokens, temperature)
    except (ValueError, IndexError) as error:
        raise InputError(
            f"{show(str(path))}: {type(model).__name__} cannot continue the prompt:"
            f" {show(str(error), 200)}",
            hint="see generation_config.json, and max_position_embeddings in config.json"
            " for how long a text may be",
        ) from error
    return streamer.body() | {
        "prompt_tokens": int(tokens["input_ids"].shape[1]),
        "load_seconds": load_seconds,
        "resident_weight_bytes": resident_bytes(model),
        "packed_bytes": packed_bytes(path),
        "peak_memory_bytes": peak_memory(),
        "precision": precision,
        "threads": torch.get_num_threads(),
    }


def summary(body: dict[str, Any]) -> str:
    """One line about speed and memory."""
    speed = body["tokens_per_second"]
    spoken = "" if speed is None else f" ({speed:.1f} tokens/s)"
    return (
        f"{body['new_tokens']} tokens in {body['decode_seconds']:.2f} s{spoken},"
        f" prompt of {body['prompt_tokens']} in {body['prefill_seconds']:.2f} s;"
        f" weights {body['resident_weight_bytes'] / 1e6:,.1f} MB in memory,"
        f" {body['packed_bytes'] / 1e6:,.1f} MB on disk,"
        f" peak memory {body['peak_memory_bytes'] / 1e6:,.0f} MB; {body['threads']} threads"
    )


def quiet(transformers: Any) -> None:
    """No warnings and bars of transformers among our own output."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _generate(
    model: Any, tokenizer: Any, tokens: Any, streamer: Any, length: int, temperature: float
) -> None:
    """Greedy or drawn, one text; the model's own generation settings say where a text ends."""
    settings = model.generation_config
    pad = settings.pad_token_id
    if pad is None:
        end = settings.eos_token_id
        pad = end[0] if isinstance(end, list) else end
    draw: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        draw = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    known = {k: tokens[k] for k in ("input_ids", "attention_mask") if k in tokens}
    with torch.inference_mode():
        model.generate(
            **known,
            **draw,
            num_beams=1,  # a stream cannot take words back
            num_return_sequences=1,
            max_new_tokens=length,
            pad_token_id=0 if pad is None else pad,
            tokenizer=tokenizer,  # for stop strings
            streamer=streamer,
        )


class _Streamer:
    """What `generate` hands its tokens to: decodes them, keeps the time of the first."""

    def __init__(self, tokenizer: Any, write: Write) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._shown = 0
        self._times: list[float] = [time.perf_counter()]
        self._is_prompt = True

    def put(self, value: Any) -> None:
        """The prompt first, then one token a call."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self._times.append(time.perf_counter())
        self._tokens += value.reshape(-1).tolist()
        text = self._text()
        # The last word may still grow, and with it a character of which some bytes are missing
        # (U+FFFD at the end); one before a space is as broken as it will stay.
        end = text.rfind(" ") + 1
        if end > self._shown:
            self._write(text[self._shown : end])
            self._shown = end

    def end(self) -> None:
        """Write what was held back."""
        self._write(self._text()[self._shown :])

    def _text(self) -> str:
        # Without the clean-up, which takes back spaces that were shown.
        decoded: str = self._tokenizer.decode(
            self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return decoded

    def body(self) -> dict[str, Any]:
        """The text and its times; the first token's time is the prompt's."""
        count = len(self._tokens)
        prefill = self._times[1] - self._times[0] if count else 0.0
        decode = self._times[-1] - self._times[1] if count else 0.0
        return {
            "text": self._text(),
            "new_tokens": count,
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "tokens_per_second": (count - 1) / decode if count > 1 and decode else None,
        }
