"""`compress bench`: how fast a checkpoint runs from its packed weights, and what it holds."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.errors import InputError, UsageError, show
from compress.kernels import dispatch
from compress.run import peak_memory
from compress.runtime import cache_names
from compress.runtime.architecture import require_transformers
from compress.runtime.generate import quiet
from compress.runtime.layer_bench import BREAK_EVEN_NOTE, cache_note, time_layers
from compress.runtime.loading import load
from compress.runtime.memory import packed_bytes, resident_bytes
from compress.runtime.modules import CompressedLinear

ROUNDS = 5
PREFILL, PREFILL_ROUNDS = 64, 3  # tokens; a prompt takes long, so fewer rounds
WARM_UP = 4  # tokens


@dataclass
class Candidate:
    """One way of running the model, and the seconds of its steps."""

    name: str
    model: Any
    precision: str | None = None
    cache: Any = None
    token: Any = None
    steps: list[float] = field(default_factory=list)
    prefills: list[float] = field(default_factory=list)

    def speeds(self, prompt: int) -> dict[str, float | None]:
        """Tokens a second, of medians."""
        return {
            "decode": 1 / statistics.median(self.steps) if self.steps else None,
            "prefill": prompt / statistics.median(self.prefills) if self.prefills else None,
        }


def bench_model(
    path: Path,
    *,
    reference: Path | None = None,
    tokens: int = 64,
    threads: int | None = None,
    layers: bool = True,
) -> dict[str, Any]:
    """Measure `path`, candidates in turn in one process; medians.

    reference  a plain checkpoint that runs beside it, in bfloat16 by torch alone
    tokens     how many are decoded by each candidate, one at a time (batch 1)

    Raises UsageError for an argument (more tokens than the model has positions, too), InputError
    for a checkpoint that cannot be run.
    """
    if tokens < ROUNDS:
        raise UsageError(f"tokens must be {ROUNDS} or more, not {tokens}")
    quiet(require_transformers())
    started = time.perf_counter()
    model = load(path, threads=threads)
    load_seconds = time.perf_counter() - started
    memory = {
        "packed_bytes": packed_bytes(path),
        "resident_weight_bytes": resident_bytes(model),
        "peak_memory_bytes": peak_memory(),  # of loading; the measurements below take more
    }
    candidates = [Candidate(name, model, name) for name in ("exact", "fast")]
    if not any(isinstance(m, CompressedLinear) for m in model.modules()):
        candidates = [Candidate("dense", model)]
    if reference is not None:
        plain = load(reference, dtype="bfloat16", dense_kernels=False)
        candidates.append(Candidate("reference, torch bf16", plain))
    decoded = tokens if model.can_generate() else 0
    prompt = _prompt([c.model for c in candidates], decoded)
    with torch.inference_mode():
        _measure(candidates, prompt, tokens)
        found = time_layers(model) if layers else []
    return {
        "model": type(model).__name__,
        "backend": dispatch.current().backend.isa,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_seconds": load_seconds,
        "prompt_tokens": prompt.shape[1],
        "tokens": decoded,
        "tokens_per_second": {c.name: c.speeds(prompt.shape[1]) for c in candidates},
        "memory": memory,
        "layers": found,
        "notes": [note for note in (cache_note(found), BREAK_EVEN_NOTE) if note and found],
    }


def _prompt(models: list[Any], tokens: int) -> torch.Tensor:
    """Token numbers [1, n] that every model knows, so many that `tokens` more have positions."""
    length, vocabulary = PREFILL, None
    for model in models:
        text = model.config.get_text_config()
        size = getattr(text, "vocab_size", None)
        if size is None:
            raise InputError(
                f"{type(model).__name__} takes no tokens", hint="bench runs models of text"
            )
        vocabulary = min(size, vocabulary or size)
        longest = getattr(text, "max_position_embeddings", None)
        if not longest:
            continue
        room = longest - (WARM_UP + tokens if tokens else 0)
        if room < 1:
            most = longest - WARM_UP - 1
            raise UsageError(
                f"tokens must be {most} or fewer, not {tokens}: {type(model).__name__} here has"
                f" {longest} positions, the prompt takes one and {WARM_UP} tokens warm up",
                hint=f"use --tokens {most}" if most >= ROUNDS else "it is too small for bench",
            )
        length = min(length, max(1, longest // 2), room)
    numbers: torch.Tensor = torch.arange(length) * 7919 % int(vocabulary or 1)
    return numbers[None]


def _measure(candidates: list[Candidate], prompt: torch.Tensor, tokens: int) -> None:
    """Prompts and `tokens` decoded tokens of each candidate, shared out over the rounds."""
    for round_ in range(ROUNDS):
        for candidate in candidates:
            _use(candidate)
            if round_ < PREFILL_ROUNDS:
                started = time.perf_counter()
                result = candidate.model(prompt)
                candidate.prefills.append(time.perf_counter() - started)
            if not candidate.model.can_generate():
                continue
            if not round_:  # the first prompt fills the cache
                candidate.cache, candidate.token = cache_names.of_output(result), prompt[:, -1:]
                _decode(candidate, WARM_UP)
                candidate.steps.clear()
            _decode(candidate, tokens * (round_ + 1) // ROUNDS - tokens * round_ // ROUNDS)


def _use(candidate: Candidate) -> None:
    if candidate.precision is not None:
        for module in candidate.model.modules():
            if isinstance(module, CompressedLinear):
                module.precision = candidate.precision


def _decode(candidate: Candidate, tokens: int) -> None:
    argument = cache_names.argument_of(candidate.model) or cache_names.NAMES[0]
    for _ in range(tokens):
        started = time.perf_counter()
        result = candidate.model(candidate.token, **{argument: candidate.cache}, use_cache=True)
        candidate.token = result.logits[:, -1:].argmax(-1)
        candidate.cache = cache_names.of_output(result)
        candidate.steps.append(time.perf_counter() - started)


def print_bench(body: dict[str, Any], console: Any) -> None:
    """The tables, for a terminal of 80 columns."""
    from rich.table import Table
    from rich.text import Text

    console.print(
        Text(
            f"{show(str(body['model']))}, {body['dtype']}, {body['threads']} threads,"
            f" {body['backend']} kernels"
        )
    )
    speeds = Table("tokens a second", box=None, padding=(0, 1))
    for title in ("decode, batch 1", f"prompt of {body['prompt_tokens']}"):
        speeds.add_column(title, justify="right")
    for name, found in body["tokens_per_second"].items():
        speeds.add_row(name, *(_number(found[k], 1) for k in ("decode", "prefill")))
    console.print(speeds)
    memory = body["memory"]
    ratio = memory["resident_weight_bytes"] / max(1, memory["packed_bytes"])
    console.print(
        Text(
            f"weights: {memory['packed_bytes'] / 1e6:,.1f} MB on disk,"
            f" {memory['resident_weight_bytes'] / 1e6:,.1f} MB in memory ({ratio:.2f} x);"
            f" peak memory {memory['peak_memory_bytes'] / 1e6:,.0f} MB"
        )
    )
    if body["layers"]:
        console.print(_layer_table(body["layers"]))
        console.print("milliseconds a product, batch 1; sparse: bitmask, bf16, % zeros")
    for layer in body["layers"]:
        if layer["break_even"] is not None:
            rows, columns = layer["shape"]
            console.print(Text(f"{rows}x{columns}: {layer['break_even']['text']}"))
    for note in body["notes"]:
        console.print(Text(note))


def _layer_table(layers: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    titles = {"exact": "exact", "fast": "fast", "dense, torch": "torch", "dense": "own",
              "sparse 50": "50%", "sparse 70": "70%", "sparse 80": "80%",
              "sparse 90": "90%"}  # fmt: skip
    table = Table("layer", box=None, padding=(0, 1))
    for title in ("n", "bits", *titles.values()):
        table.add_column(title, justify="right")
    for layer in layers:
        times = layer["milliseconds"]
        table.add_row(
            "x".join(map(str, layer["shape"])),
            str(layer["count"]),
            "" if layer["bits"] is None else str(layer["bits"]),
            *(_number(times.get(name), 3) for name in titles),
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
