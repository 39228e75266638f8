"""Sentence pairs: mean-pooled, normalised embeddings, their cosine, its Spearman correlation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from compress.evaluate.outputs import EMBEDDINGS, Inputs, Runner, Step, no_step

Vector = NDArray[np.float64]
# Sentences of one length that run together.
BATCH = 64


def embed(runner: Runner, sentences: Sequence[Inputs], step: Step = no_step) -> Vector:
    """Embeddings float64 [sentences, hidden] of length 1: the mean over a sentence's tokens.

    sentences  input_ids (and attention_mask, token_type_ids) of one sentence each, [length]
    Sentences of one length run together, so that no padding takes part. A sentence whose hidden
    state is not finite or zero has an embedding of NaN.
    """
    groups = _groups(sentences)
    batches = [_stacked([sentences[i] for i in group]) for group in groups]
    rows: list[Vector | None] = [None] * len(sentences)
    for group, hidden in zip(groups, runner.run(batches, EMBEDDINGS, step), strict=True):
        mean = hidden.double().mean(dim=1)
        unit = (mean / torch.linalg.vector_norm(mean, dim=1, keepdim=True)).numpy()
        for i, row in zip(group, unit, strict=True):
            rows[i] = row
    return np.stack([row for row in rows if row is not None])


def batches_of(sentences: Sequence[Inputs]) -> int:
    """How many batches `embed` runs."""
    return len(_groups(sentences))


def cosines(a: Vector, b: Vector) -> Vector:
    """Row by row, of vectors of length 1."""
    found: Vector = np.einsum("ij,ij->i", a, b)
    return found


def spearman(a: Vector, b: Vector) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, ties sharing their mean rank.

    NaN where either side is constant or not finite: ranks say nothing there.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    x, y = (ranks(v) - (len(v) + 1) / 2 for v in (a, b))
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 else float("nan")


def ranks(values: Vector) -> Vector:
    """Ranks from 1; equal values share the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean = last - (counts - 1) / 2
    found: Vector = mean[group.reshape(-1)]
    return found


def _groups(sentences: Sequence[Inputs]) -> list[list[int]]:
    """Indices of sentences of one length each, at most `BATCH` together."""
    by_length: Mapping[int, list[int]] = {}
    by_length = {}
    for i, one in enumerate(sentences):
        by_length.setdefault(len(one["input_ids"]), []).append(i)
    return list(_cut(by_length))


def _cut(by_length: Mapping[int, list[int]]) -> Iterator[list[int]]:
    for _, members in sorted(by_length.items()):
        for first in range(0, len(members), BATCH):
            yield members[first : first + BATCH]


def _stacked(sentences: Sequence[Inputs]) -> Inputs:
    return {name: np.stack([one[name] for one in sentences]) for name in sentences[0]}
