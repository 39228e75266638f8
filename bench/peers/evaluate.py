"""Perplexity by one fixed protocol, the same for every method; and the ids that all calibrate on.

    python bench/peers/evaluate.py MODEL TEXT [--weights dense.safetensors] [--windows 200]
    python bench/peers/evaluate.py MODEL TEXT --ids ids.npy [--sequences 64] [--length 512]

Runs in this project's environment. The protocol: the whole file tokenized at once by the model's
tokenizer without special tokens, cut from its start into windows of 255 tokens that do not overlap;
each window after one BOS; the first 200 windows; fp32 weights and arithmetic; exp of the mean of
-log p over all predicted tokens, 255 a window.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

WINDOW = 255  # predicted tokens of a window, BOS not among them
BATCH = 8


@functools.lru_cache(maxsize=2)
def tokens(model_dir: Path, text: Path) -> np.ndarray:
    """Token ids int64 [n] of the whole file, no special tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    encoded = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
    return np.asarray(encoded.ids, np.int64)


def windows_of(model_dir: Path, text: Path, length: int, count: int) -> np.ndarray:
    """Ids int64 [count, 1 + length]: BOS, then `length` tokens of the file, from its start.

    Fewer rows where the file is shorter; raises ValueError where it has none.
    """
    found = tokens(model_dir, text)
    count = min(count, len(found) // length)
    if count < 1:
        raise ValueError(f"{text}: {len(found)} tokens, a window takes {length}")
    bos = json.loads((model_dir / "config.json").read_text())["bos_token_id"]
    rows = found[: count * length].reshape(count, length)
    return np.concatenate([np.full((count, 1), bos, np.int64), rows], axis=1)


def calibration_ids(
    model_dir: Path, text: Path, sequences: int = 64, length: int = 512
) -> np.ndarray:
    """Ids int64 [sequences, length] for every method: BOS and length - 1 tokens a row."""
    return windows_of(model_dir, text, length - 1, sequences)


@functools.lru_cache(maxsize=1)
def loaded(model_dir: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def perplexity(
    model_dir: Path, text: Path, weights: Mapping[str, Any] | None = None, windows: int = 200
) -> float:
    """Perplexity of the checkpoint with `weights` in the place of its own tensors of those names.

    Raises ValueError for a name or a shape that the model does not have.
    """
    import torch

    model = loaded(model_dir)
    own = {name: parameter.shape for name, parameter in model.named_parameters()}
    given = {n: torch.from_numpy(np.array(w, np.float32)) for n, w in (weights or {}).items()}
    for name, value in given.items():
        if own.get(name) != value.shape:
            raise ValueError(f"{name}: {list(value.shape)}, the model has {own.get(name)}")
    ids = torch.from_numpy(windows_of(model_dir, text, WINDOW, windows))
    total = 0.0
    with torch.no_grad():
        for batch in ids.split(BATCH):
            output = torch.func.functional_call(model, given, (batch,), {"use_cache": False})
            scores = output.logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(
                scores, batch[:, 1:].flatten(), reduction="none"
            )
            total += float(loss.double().sum())
    return float(np.exp(total / (len(ids) * WINDOW)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--weights", type=Path, help="safetensors with tensors to put in")
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ids", type=Path, help="write calibration ids of TEXT here instead")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    if options.ids:
        ids = calibration_ids(options.model, options.text, options.sequences, options.length)
        np.save(options.ids, ids)
        print(f"{options.ids}: {ids.shape[0]} sequences of {ids.shape[1]}")
        return
    import torch
    from safetensors.numpy import load_file

    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    weights = load_file(options.weights) if options.weights else None
    found = perplexity(options.model, options.text, weights, options.windows)
    print(f"perplexity {found:.4f}, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
