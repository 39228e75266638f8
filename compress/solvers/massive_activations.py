"""Which weights make the massive activations of a residual stream: the decision, from records.

A few channels of the residual stream of many trained transformers hold values hundreds of times
the usual, on the first token and on delimiters, from an early block to the last but one
(Sun et al., arXiv 2402.17762). A channel counts as massive in a block where its largest |h| is

    at least 10 % of the largest |h| in any block, and at least 50 times the median |h|

of the block, or of the token where that is less (a norm at the end of a block bounds every value,
and an entry can only press its own token's others down).

Both are relative: absolute bounds fail on small models. The last block is left out, because it
undoes the massive channels and makes large values of its own. The first block where a channel is
massive is its *onset*; the channel counts where it is also massive in at least half of the blocks
between there and the last. What makes it is then read off the onset block's down projection
(arXiv 2411.07191; decomposed as its replications do): at the token t where channel j is largest,

    Y[t, j] = sum_k X[t, k] W[j, k],

and the entries (j, k) of the largest parts are taken until they explain 80 %, of those that make
10 % or more each: below that it is a sum of many weights and none is special. An output Y[t, j]
that is not itself massive among the outputs says that something else, as the embeddings or the
attention, made the channel.

An entry's column is one neuron, and super weights in one column are mostly harmless one by one and
lethal together. So the rows of an accepted column whose channels stand out half as far (25 times
the median, with the same persistence) are taken along where the column makes 10 % of them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_PEAK_SHARE = 0.1  # of the largest |h| in any block
MIN_RATIO = 50.0  # to the block's median |h|
MIN_COMPANION_RATIO = 25.0
MIN_PERSISTENCE = 0.5  # of the later blocks, without the last
EXPLAINED = 0.8  # of an output, by the entries taken
MIN_PART = 0.1  # of an output, by each entry taken

MADE_ELSEWHERE = "not made by a down projection"
MADE_BY_MANY = "made by many weights together"
PASSING = "does not persist"


@dataclass(frozen=True)
class ChannelPeak:
    """One channel of a block's output where it is largest.

    ratio   its |h| over the median, of the block or of its own token
    tensor  the down projection whose output is massive there too; None where there is none
    parts   (column, share of the output) of the leading entries, largest first
    """

    channel: int
    size: float
    ratio: float
    tensor: str | None = None
    parts: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class BlockPeaks:
    """The channels of one block's output that may be massive."""

    peak: float  # largest |h|
    channels: tuple[ChannelPeak, ...]


@dataclass(frozen=True)
class Cause:
    """An entry of a down projection that makes a massive channel (its row).

    share        of the output at the channel's largest token
    persistence  share of the later blocks in which the channel is massive
    ratio        |h| over the median where the channel begins
    size         |h| there
    """

    tensor: str
    block: int
    row: int
    column: int
    share: float
    persistence: float
    ratio: float
    size: float


@dataclass(frozen=True)
class Unexplained:
    """A massive channel that no few weights make, and why it was left."""

    channel: int
    block: int
    ratio: float
    why: str


def leading_parts(products: NDArray[np.float64]) -> tuple[tuple[int, float], ...]:
    """The entries whose products X[t, k] W[j, k], float64 [columns], make up their sum.

    Largest first, as (column, share of the sum): until they explain it, small ones left out.
    """
    total = float(products.sum())
    if total == 0:
        return ()
    shares = products / total
    order = np.argsort(-shares, kind="stable")
    parts: list[tuple[int, float]] = []
    explained = 0.0
    for column in order.tolist():
        share = float(shares[column])
        if share < MIN_PART or explained >= EXPLAINED:
            break
        parts.append((column, share))
        explained += share
    return tuple(parts)


def global_peak(blocks: Sequence[BlockPeaks]) -> float:
    """The largest |h| in any block."""
    return max((block.peak for block in blocks), default=0.0)


def causes(blocks: Sequence[BlockPeaks], peak: float) -> tuple[list[Cause], list[Unexplained]]:
    """What makes the massive channels of all blocks but the last, strongest first.

    peak  the model's largest |h|, before anything was zeroed
    """
    strict = _places(blocks, peak, MIN_RATIO)
    loose = _places(blocks, peak, MIN_COMPANION_RATIO)
    found: dict[tuple[str, int, int], Cause] = {}
    left = []
    for channel, where in sorted(strict.items()):
        onset = min(where)
        one = where[onset]
        persistence = _persistence(where, onset, len(blocks))
        why = _objection(one, persistence)
        if why is not None:
            left.append(Unexplained(channel, onset, one.ratio, why))
            continue
        for column, share in one.parts:
            _add(found, one, onset, column, share, persistence)
    for cause in list(found.values()):
        for channel, where in sorted(loose.items()):
            here = where.get(cause.block)
            if here is None or here.tensor != cause.tensor or channel == cause.row:
                continue
            share = dict(here.parts).get(cause.column, 0.0)
            persistence = _persistence(where, cause.block, len(blocks))
            if share and persistence >= MIN_PERSISTENCE:
                _add(found, here, cause.block, cause.column, share, persistence)
    ordered = sorted(found.values(), key=lambda c: (-c.share * c.size, c.block, c.row, c.column))
    return ordered, left


def _places(
    blocks: Sequence[BlockPeaks], peak: float, ratio: float
) -> dict[int, dict[int, ChannelPeak]]:
    """Channel -> block -> its peak, where it is massive by this ratio."""
    found: dict[int, dict[int, ChannelPeak]] = {}
    for index, block in enumerate(blocks):
        for one in block.channels:
            if one.size >= MIN_PEAK_SHARE * peak and one.ratio >= ratio:
                found.setdefault(one.channel, {})[index] = one
    return found


def _persistence(where: dict[int, ChannelPeak], onset: int, blocks: int) -> float:
    """Share of the blocks after `onset`; 0 where there are none, so that nothing is concluded."""
    later = blocks - onset - 1
    return sum(index > onset for index in where) / later if later else 0.0


def _objection(one: ChannelPeak, persistence: float) -> str | None:
    if persistence < MIN_PERSISTENCE:
        return PASSING
    if one.tensor is None:
        return MADE_ELSEWHERE
    return None if one.parts else MADE_BY_MANY


def _add(
    found: dict[tuple[str, int, int], Cause],
    one: ChannelPeak,
    block: int,
    column: int,
    share: float,
    persistence: float,
) -> None:
    if one.tensor is not None:
        key = (one.tensor, one.channel, column)
        cause = Cause(
            one.tensor, block, one.channel, column, share, persistence, one.ratio, one.size
        )
        found.setdefault(key, cause)
