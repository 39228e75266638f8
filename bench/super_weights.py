"""Super weights by running the model: planted ones found, clean models left alone, what they carry.

    python bench/super_weights.py [--seeds 8] [--model DIR --tokens TEXT --text TEXT] [--json FILE]

Small random transformers of five architectures get super weights at known places, several in one
column or in one row, beside larger weights that do nothing. A found set is judged by the KL
divergence that zeroing it makes, against as many weights drawn from the 100 largest of the same
tensors. (KL is the logarithm of the perplexity ratio on text drawn from the model itself.)

With --model, a trained Llama with known ones: what is found by running it on the beginning of
--tokens, and the perplexity on the first 16,384 tokens of --text with those weights zeroed, against
as many of the largest weights of the same tensors.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from goals import Figure, save, show

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import planted

from compress.calibrate.peaks import Effect, Forward, causal_check, find_by_forward
from compress.checkpoint import open_checkpoint
from compress.related import down_projections
from compress.roles import assign_roles

TITLE = "Super weights by running the model"
GEOMETRIES = {"one column": planted.shared_column, "one row": planted.shared_row}
MOST = 8
KNOWN = {(1, 69, 339), (1, 206, 339)}  # of the trained Llama
WINDOW, WINDOWS = 256, 64

Place = tuple[int, int, int]


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, default=8)
    options.add_argument("--model", type=Path, help="a trained Llama with channel 69")
    options.add_argument("--tokens", type=Path, help="text to find them with")
    options.add_argument("--text", type=Path, help="text to judge by")
    options.add_argument("--json", type=Path, help="add the figures to this file")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    figures = planted_figures(arguments.seeds)
    if arguments.model:
        figures += trained_figures(arguments.model, arguments.tokens, arguments.text)
    show(TITLE, figures)
    if arguments.json:
        save(arguments.json, TITLE, figures)


def search(folder: Path, ids: Any) -> tuple[set[Place], Forward, Effect | None]:
    """Places that are found, all that is known of them, and the effect of zeroing them."""
    with open_checkpoint(folder) as checkpoint:
        infos = list(assign_roles(checkpoint.infos(), checkpoint.config))
        layers = down_projections(infos)
        downs = [info for info in infos if info.name in layers]
        inputs = {"input_ids": ids}
        found = find_by_forward(checkpoint, inputs, downs, MOST)
        places = found.places()
        effect = causal_check(checkpoint, inputs, downs, places) if places else None
    return {(layers[c.tensor], c.row, c.column) for c, _ in found.causes}, found, effect


def planted_figures(seeds: int) -> list[Figure]:
    """Recall, precision and effect on models with planted ones; silence on those without."""
    figures: list[Figure] = []
    ratios: list[float] = []
    right = everything = 0
    ids = planted.token_ids(7)
    for geometry, plant in GEOMETRIES.items():
        hits = wanted = 0
        for kind in planted.NAMES:
            for seed in range(seeds):
                neurons = plant(seed)
                with tempfile.TemporaryDirectory() as folder:
                    saved = planted.save(Path(folder), kind, seed, neurons)
                    places, _, effect = search(saved, ids)
                known = planted.places(neurons)
                hits, wanted = hits + len(places & known), wanted + len(known)
                right, everything = right + len(places & known), everything + len(places)
                if effect is not None:
                    ratios.append(effect.found / max(effect.drawn, 1e-12))
        note = f"{hits} of {wanted}; {len(planted.NAMES)} architectures, {seeds} seeds"
        figures.append(
            Figure(f"planted in {geometry}: found / planted", hits / wanted, 1, None, note)
        )
    note = f"{right} of {everything}"
    figures.append(Figure("planted / found", right / max(1, everything), 1, None, note))
    silent = models = 0
    for kind in planted.NAMES:
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                places, _, _ = search(planted.save(Path(folder), kind, seed), ids)
            silent, models = silent + (not places), models + 1
    figures.append(Figure("clean models: none found", silent / models, 1, None, f"of {models}"))
    note = f"least of {len(ratios)}; median {np.median(ratios):.3g}"
    figures.append(Figure("KL of zeroing: found / large ones", min(ratios), 1, 10, note))
    return figures


def trained_figures(model: Path, tokens: Path, text: Path) -> list[Figure]:
    """What is found in a trained model, where, and what perplexity says of it."""
    places, found, effect = search(model, windows(model, tokens, 128, 8))
    if effect is None:
        raise SystemExit(f"{model}: nothing was found")
    last = max(layer for layer, _, _ in places)
    note = ", ".join(f"{r}:{c}" for _, r, c in sorted(places))
    judged = windows(model, text, WINDOW, WINDOWS)
    zeroed = found.places()
    dense = perplexity(model, judged, {})
    ours = perplexity(model, judged, zeroed)
    theirs = perplexity(model, judged, largest(model, zeroed))
    shown = f"perplexity {dense:.3f} -> {ours:.3f}; {theirs:.3f} without the largest"
    return [
        Figure("trained: known ones found", len(places & KNOWN) / len(KNOWN), 1, None, note),
        Figure("trained: in layer 1", np.mean([p[0] == 1 for p in places]), 1, None,
               f"last layer with one: {last}; {found.rounds} rounds"),
        Figure("trained: KL, found / large ones", effect.found / effect.drawn, 1, 10,
               f"{effect.found:.2e} and {effect.drawn:.2e}"),
        Figure("trained: log-perplexity, found / largest",
               math.log(ours / dense) / max(math.log(theirs / dense), 1e-6), 1, None, shown),
    ]  # fmt: skip


def windows(model: Path, text: Path, length: int, count: int) -> np.ndarray:
    """int32 [count, length]: windows that each begin with the tokenizer's own first token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text()[: 12 * length * count]).ids
    body = np.array(ids[1 : 1 + count * (length - 1)], np.int32).reshape(count, length - 1)
    return np.concatenate([np.full((count, 1), ids[0], np.int32), body], 1)


def perplexity(model: Path, ids: np.ndarray, zeroed: dict[str, list[tuple[int, int]]]) -> float:
    """Of all tokens but each window's first, with some weights zeroed; float32."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    own = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    weights = dict(own.named_parameters())
    total = 0.0
    with torch.no_grad():
        for name, places in zeroed.items():
            for row, column in places:
                weights[name][row, column] = 0
        for window in torch.from_numpy(ids).long():
            total += float(own(input_ids=window[None], labels=window[None]).loss)
    return math.exp(total / len(ids))


def largest(
    model: Path, found: dict[str, list[tuple[int, int]]]
) -> dict[str, list[tuple[int, int]]]:
    """As many of the largest weights of each tensor, those found left out."""
    chosen: dict[str, list[tuple[int, int]]] = {}
    with open_checkpoint(model) as checkpoint:
        for name, places in found.items():
            sizes = np.abs(checkpoint.read(checkpoint.info(name)).astype(np.float32))
            for row, column in places:
                sizes[row, column] = 0
            order = np.argsort(-sizes, axis=None, kind="stable")[: len(places)]
            chosen[name] = [divmod(int(i), sizes.shape[1]) for i in order]
    return chosen


if __name__ == "__main__":
    main()
