"""How far a model's predictions are from those of a reference: KL divergence, top-1 agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compress.checkpoint import Checkpoint
from compress.errors import InputError
from compress.evaluate.outputs import Decoded, Inputs
from compress.evaluate.perplexity import chunks
from compress.tensor import Array


@dataclass
class Divergence:
    """Sums over predictions (tokens or images) of KL(reference || model), and of agreements."""

    total: float = 0.0
    agreeing: int = 0
    count: int = 0

    def add(self, reference: torch.Tensor, logits: torch.Tensor) -> None:
        """Logits of both, [predictions, classes]; log-softmax in float32, sums in float64."""
        if reference.shape != logits.shape:
            raise InputError(
                f"the model's predictions are {list(logits.shape)}, the reference's"
                f" {list(reference.shape)}",
                hint="the two must share vocabulary or classes",
            )
        log_p = torch.log_softmax(reference.float(), dim=-1)
        log_q = torch.log_softmax(logits.float(), dim=-1)
        terms = log_p.exp().mul_(log_p - log_q)
        # 0 * -inf of a class that the reference rules out is 0, as the limit is.
        terms[log_p == -torch.inf] = 0.0
        self.total += float(terms.sum(dim=-1, dtype=torch.float64).sum())
        self.agreeing += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        self.count += logits.shape[0]

    def add_sequence(self, reference: torch.Tensor, logits: torch.Tensor, scored: int) -> None:
        """One sequence of a language model, [length, vocabulary]: its last `scored` tokens."""
        if reference.shape != logits.shape:
            self.add(reference, logits)  # says what does not fit
        for first, last in chunks(logits, scored):
            self.add(reference[first:last], logits[first:last])

    @property
    def kl(self) -> float:
        """Mean KL divergence of one prediction, in nats; rounding below 0 is 0."""
        mean = self.total / self.count
        return mean if not mean < 0 else 0.0

    @property
    def top1_agreement(self) -> float:
        """Share of predictions whose likeliest class is the same."""
        return self.agreeing / self.count


def kl_of(source: Checkpoint, candidate: Checkpoint, ids: Array) -> float:
    """Mean KL(source || candidate) in nats over the tokens of `ids` [samples, length] but the
    first of each: what a pass asks for that measures its own trial (`Outlook.trial`).
    """
    return Source(source, ids).kl_to(candidate)


class Source:
    """A model's predictions, ready to be compared with more than one candidate.

    ids  [samples, length], where -1 stands beyond the end of a shorter sample
    The hidden states before the head are kept where they are few, never the logits.
    """

    def __init__(self, source: Checkpoint, ids: Array) -> None:
        self._inputs: Sequence[Inputs] = [
            {"input_ids": row[row >= 0][None].astype(np.int64)} for row in np.asarray(ids)
        ]
        self._runner = Decoded(source)
        self._runner.remember = True

    def kl_to(self, candidate: Checkpoint) -> float:
        """Mean KL divergence of a candidate from the source, in nats a token."""
        found = Divergence()
        pairs = zip(
            self._inputs,
            self._runner.run(self._inputs),
            Decoded(candidate).run(self._inputs),
            strict=True,
        )
        for one, reference, logits in pairs:
            found.add_sequence(reference[0], logits[0], one["input_ids"].shape[1] - 1)
        return found.kl
