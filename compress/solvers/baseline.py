"""What plain rounding would give for the same bytes: the figure that every mask and every
low-rank residual has to beat, measured on the tensor itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from compress.passes.base import CodesSpec
from compress.solvers.group_quantizer import CannotQuantize, quantize_matrix
from compress.tensor import Array

PER_CHANNEL = -1
F16_BITS = 16
_WIDTHS = range(2, 9)
_GROUPS = (32, 64, 128, PER_CHANNEL)
# Widths decide nearly everything, groups the rest: the largest few that fit are measured.
_MEASURED = 3
# Larger matrices are measured on evenly spaced rows that hold about this many weights.
_SAMPLE_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class Baseline:
    """The best plain quantization (searched scales, nothing else) within a budget.

    group_size       -1: one scale per row
    bits_per_weight  codes and scales, at most the budget
    squared_error    over the matrix; where `sampled`, of evenly spaced rows, scaled up to all
    squared_norm     likewise, of the same rows
    """

    bits: int
    group_size: int
    bits_per_weight: float
    squared_error: float
    squared_norm: float
    sampled: bool

    @property
    def relative_error(self) -> float:
        """sqrt(squared_error / squared_norm), exact for the rows that were measured."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


def same_bytes(
    source: Array,
    *,
    budget_bits_per_weight: float,
    group_size: int,
    scale_bits: int = F16_BITS,
) -> Baseline | None:
    """The best of symmetric codes with at most `budget_bits_per_weight` for a matrix.

    Tried are 2 to 8 bits with groups of 32, 64, 128, the tensor's own and whole rows. `source` is
    [rows, columns] before any pass; the budget counts codes, scales, mask, factors and outliers
    of what it is compared with. None where not even 2 bits fit, or a weight is not finite.
    """
    rows, columns = source.shape
    if rows == 0 or columns == 0:
        return None
    candidates = _candidates(columns, budget_bits_per_weight, group_size, scale_bits)
    sample = source
    stride = min(rows * columns // _SAMPLE_WEIGHTS, rows)
    if stride > 1:
        sample = source[::stride]
    factor = rows / sample.shape[0]
    best: Baseline | None = None
    for bits, group, cost in candidates[:_MEASURED]:
        group_columns = columns if group == PER_CHANNEL else group
        spec = CodesSpec(bits, group_columns, True, "F16" if scale_bits == F16_BITS else "F32")
        try:
            sums = quantize_matrix(sample, None, spec)[1]
        except CannotQuantize:
            continue
        found = Baseline(
            bits,
            group,
            cost,
            sums.squared_error * factor,
            sums.squared_norm * factor,
            sampled=sample is not source,
        )
        if best is None or found.squared_error < best.squared_error:
            best = found
    return best


def _candidates(
    columns: int, budget: float, group_size: int, scale_bits: int
) -> list[tuple[int, int, float]]:
    """(bits, group, bits per weight) within the budget, the most promising first."""
    own = PER_CHANNEL if group_size >= columns or group_size < 1 else group_size
    found = []
    for group in sorted({own, *_GROUPS}):
        if group != PER_CHANNEL and group >= columns:
            continue
        scales = 1 if group == PER_CHANNEL else -(-columns // group)
        for bits in _WIDTHS:
            cost = bits + scales * scale_bits / columns
            # A rounding of the budget's last digit must not lose the equal candidate.
            if cost <= budget * (1 + np.finfo(np.float32).eps):
                found.append((bits, group, cost))
    return sorted(found, key=lambda c: (c[0], c[2]), reverse=True)
