"""Perplexity: exp of the mean negative log-likelihood of the scored tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Values of a chunk of logits that are worked on at once (16 MB in float32).
CHUNK_VALUES = 1 << 22


@dataclass
class Likelihood:
    """Negative log-likelihood, summed over tokens, so that every token weighs the same."""

    total: float = 0.0
    tokens: int = 0

    def add(self, logits: torch.Tensor, ids: torch.Tensor, scored: int) -> None:
        """One sequence: logits [length, vocabulary], ids [length]; its last `scored` tokens.

        The log-softmax is in float32, its sums over tokens in float64.
        """
        for first, last in chunks(logits, scored):
            log_p = torch.log_softmax(logits[first:last].float(), dim=-1)
            own = log_p.gather(1, ids[first + 1 : last + 1, None])
            self.total -= float(own.double().sum())
        self.tokens += scored

    @property
    def perplexity(self) -> float:
        """Exp of the mean, in nats; infinite where it is too large for a float."""
        mean = self.total / self.tokens
        try:
            return math.exp(mean)
        except OverflowError:
            return math.inf


def chunks(logits: torch.Tensor, scored: int) -> list[tuple[int, int]]:
    """Ranges of rows that predict the last `scored` tokens, few enough to be worked on at once."""
    stop = logits.shape[0] - 1  # the last row predicts a token that is not there
    size = max(1, CHUNK_VALUES // logits.shape[1])
    return [(i, min(i + size, stop)) for i in range(stop - scored, stop, size)]
