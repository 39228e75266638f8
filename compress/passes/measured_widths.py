"""What widths cost as measured: the whole model is run, and its predictions are compared.

A unit's loss is the KL divergence from the source with this unit at a width and every other unit
at the widest. Searching on from the allocation that these losses give, by the measured divergence
of the whole, was tried and left out: within a few thousand tokens it finds what suits these tokens
(stories260k, 4 bits: 0.98 of the divergence there, 1.03 of it on other text).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from compress.errors import UsageError
from compress.tensor import Array
from compress.trial import RememberedTrial

if TYPE_CHECKING:
    from compress.passes.base import Outlook
    from compress.passes.quantize import Quantize
    from compress.passes.quantize_budget import Choice, Ledger

# Tokens that are scored in one measurement, at most (one sample at least).
TOKENS = 8192
# Multiplications that measuring each unit alone may take where nobody asked for it: minutes.
_CHEAP = 1e12
# Decoded tensors that are kept from one measurement to the next.
_MEMORY = 1 << 30


def tokens_of(outlook: Outlook) -> Array:
    """The first samples of the calibration, up to `TOKENS`; [samples, length], -1 beyond ends."""
    if outlook.statistics is None:
        raise UsageError("quantize: there are no tokens to measure on")
    ids = outlook.statistics.inputs()["input_ids"]
    counts = np.cumsum((ids >= 0).sum(axis=1))
    return ids[: max(1, int(np.searchsorted(counts, TOKENS, side="right")))]


def is_cheap(outlook: Outlook, trials: int) -> bool:
    """Whether so many measurements take minutes and not hours."""
    weights = sum(i.size for i in outlook.source.infos() if i.is_float)
    return trials * float((tokens_of(outlook) >= 0).sum()) * weights <= _CHEAP


class Measured:
    """Measures the divergence of the model with widths by tensor."""

    def __init__(self, one: Quantize, outlook: Outlook) -> None:
        from compress.evaluate.divergence import Source

        self._pass, self._outlook = one, outlook
        self._source = Source(outlook.source, tokens_of(outlook))
        self._memory: dict[tuple[str, object], Array] = {}
        self._known: dict[tuple[tuple[str, Choice], ...], float] = {}

    def kl(self, chosen: Mapping[str, Choice]) -> float:
        """Mean KL(source || model) in nats per token."""
        key = tuple(sorted(chosen.items()))
        if key not in self._known:
            made = dataclasses.replace(self._pass, chosen=chosen, outlook=None)
            trial = RememberedTrial(self._outlook.trial(made), chosen, self._memory, _MEMORY)
            self._known[key] = self._source.kl_to(trial)
        return self._known[key]

    def alone(self, ledger: Ledger) -> list[list[float]]:
        """By unit and option the divergence with that unit alone below its last option."""
        last = [len(row) - 1 for row in ledger.options]
        floor = self.kl(ledger.named(last))
        total = sum(last)
        done = 0
        table = []
        for unit, row in enumerate(ledger.options):
            losses = []
            for j in range(len(row) - 1):
                choice = [*last]
                choice[unit] = j
                losses.append(self.kl(ledger.named(choice)) - floor)
                done += 1
                self._outlook.progress("quantize: measuring widths", done, total)
            table.append([*losses, 0.0])
        return table
