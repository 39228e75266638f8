"""What brings a layer's channels back to where the dense model has them: closed forms.

Everything is per channel, from rows [n, channels] in float32, with sums in float64. A layer whose
rows are the dense model's own gets back the very values that it had.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A channel whose variance fell below this share of the dense one carries nothing to scale up.
_DEAD = 1e-8


@dataclass(frozen=True)
class Moments:
    """Count, mean and variance (of the population) of rows, float64 [channels]."""

    count: int
    mean: torch.Tensor
    variance: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor) -> Moments:
        """Of rows [n, channels], in two passes."""
        count = len(rows)
        if not count:
            nothing = torch.zeros(rows.shape[1], dtype=torch.float64)
            return cls(0, nothing, nothing)
        mean = rows.sum(dim=0, dtype=torch.float64) / count
        variance = (rows - mean).square().sum(dim=0, dtype=torch.float64) / count
        return cls(count, mean, variance)

    def with_(self, more: Moments) -> Moments:
        """Of both groups of rows together (Chan, Golub and LeVeque 1979)."""
        if not self.count or not more.count:
            return more if not self.count else self
        count = self.count + more.count
        gap = more.mean - self.mean
        mean = self.mean + gap * (more.count / count)
        within = self.variance * self.count + more.variance * more.count
        between = gap.square() * (self.count * more.count / count)
        return Moments(count, mean, (within + between) / count)


def match_batch_norm(
    gain: torch.Tensor, bias: torch.Tensor, running_mean: torch.Tensor, deviation: torch.Tensor,
    dense: Moments, now: Moments,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gain and bias with which a BatchNorm makes of its input what it made of the dense one.

    deviation   sqrt(running_var + eps); all vectors float64 [channels]
    dense, now  of the layer's input in the dense model and in this one

    The input x stands for r x + shift, whose mean and deviation are the dense ones; the running
    statistics stay:  r = s_d / s_c,  shift = m_d - r m_c,  gain' = gain r,
    bias' = bias + gain / deviation * (shift + (r - 1) running_mean).
    Channels that are dead in this model are shifted alone.
    """
    alive = now.variance > _DEAD * dense.variance
    ratio = torch.where(alive, dense.variance / now.variance, 1.0).sqrt()
    shift = dense.mean - ratio * now.mean
    moved = gain / deviation * (shift + (ratio - 1) * running_mean)
    return gain * ratio, bias + moved


def least_squares_gain(dense: list[torch.Tensor], now: list[torch.Tensor]) -> torch.Tensor:
    """The factor a channel that brings rows `now` nearest to rows `dense`, float64 [channels]."""
    own = torch.zeros(now[0].shape[1], dtype=torch.float64)
    cross = torch.zeros_like(own)
    for wanted, rows in zip(dense, now, strict=True):
        own += rows.double().square().sum(dim=0)
        cross += (wanted.double() * rows.double()).sum(dim=0)
    return torch.where(own > 0, cross / own, 1.0)
