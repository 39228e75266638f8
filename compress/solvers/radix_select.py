"""Exact selection of the largest magnitudes of a whole model in bounded memory.

A float's bit pattern without its sign is an integer that grows with the magnitude. Counting the
top 15 bits of it (a histogram of 32,768 bins) therefore sorts weights as far as a bfloat16 can
tell them apart; a second count of the low 16 bits inside one bin tells float32 weights apart.
From counts alone follows what to keep of every tensor, and which of several equal weights: no
sort, no sample, and no weights in memory.

Counts are kept by tile in an unlinked temporary file, and replayed tensor by tensor, so that
memory does not grow with the number of tensors. Every selection ends as one `TensorCut` a
tensor: keep keys above `key`, and of the entries equal to it the first few of each tile.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]

BINS = 1 << 15
LOW_BINS = 1 << 16
BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2  # what a histogram's bins mean
# Keeps no weight at all: the largest key there is, with no ties.
KEEP_NONE = {BFLOAT16: 0x7FFF, FLOAT16: 0x7FFF, FLOAT32: 0x7FFFFFFF}


@cache
def keys_of_bins(kind: int) -> NDArray[np.uint32]:
    """uint32 [32768]: the float32 key of a bin; for float32 the smallest of the bin's keys."""
    bins = np.arange(BINS, dtype=np.uint32)
    if kind != FLOAT16:
        return np.left_shift(bins, 16, dtype=np.uint32)
    with np.errstate(invalid="ignore"):  # the bins of NaNs, which are never filled
        values = bins.astype(np.uint16).view(np.float16).astype(np.float32)
    return values.view(np.uint32)


@cache
def values_of_bins(kind: int) -> NDArray[np.float64]:
    """float64 [32768]: the magnitude that stands for a bin.

    Exact for the 16-bit types, whose bins hold one value; the middle of the bin for float32.
    """
    keys = keys_of_bins(kind)
    if kind == FLOAT32:
        keys = keys | np.uint32(0x8000)
    with np.errstate(invalid="ignore"):
        return keys.view(np.float32).astype(np.float64)


@dataclass(frozen=True)
class TileCounts:
    """A sparse histogram of the unprotected, non-zero weights of one tile.

    bins    uint16, ascending; counts int64, positive
    zeros and protected weights are counted apart, `size` counts all weights of the tile
    """

    name: str
    first_row: int
    rows: int
    kind: int
    size: int
    zeros: int
    protected: int
    bins: NDArray[np.uint16]
    counts: Int


def sparse(counts: NDArray[np.uint64]) -> tuple[NDArray[np.uint16], Int]:
    """The filled bins of a dense histogram and their counts."""
    bins = np.flatnonzero(counts)
    return bins.astype(np.uint16), counts[bins].astype(np.int64)


class Spill:
    """Tile histograms in the order they were added, held in an unlinked temporary file."""

    _HEAD = struct.Struct("<IBqqqqqI")

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the spill

    def add(self, tile: TileCounts) -> None:
        """Append one tile. Raises OSError where the disk is full."""
        name = tile.name.encode("utf-8", "surrogatepass")
        head = self._HEAD.pack(
            len(name),
            tile.kind,
            tile.first_row,
            tile.rows,
            tile.size,
            tile.zeros,
            tile.protected,
            tile.bins.size,
        )
        self._file.seek(0, 2)
        self._file.write(head + name + tile.bins.tobytes() + tile.counts.tobytes())

    def tiles(self) -> Iterator[TileCounts]:
        """Every tile in order, read back one at a time."""
        position = 0
        while True:
            self._file.seek(position)
            head = self._file.read(self._HEAD.size)
            if not head:
                return
            length, kind, first_row, rows, size, zeros, protected, n = self._HEAD.unpack(head)
            name = self._file.read(length).decode("utf-8", "surrogatepass")
            bins = np.frombuffer(self._file.read(2 * n), np.uint16)
            counts = np.frombuffer(self._file.read(8 * n), np.int64)
            position = self._file.tell()
            yield TileCounts(name, first_row, rows, kind, size, zeros, protected, bins, counts)

    def tensors(self) -> Iterator[TensorCounts]:
        """The tensors in order, each with the sum of its tiles."""
        for name, group in groupby(self.tiles(), key=lambda tile: tile.name):
            tiles = iter(group)
            first = next(tiles)
            size, zeros, protected = first.size, first.zeros, first.protected
            bins, counts = first.bins[::-1].astype(np.int64), first.counts[::-1]
            dense: Int | None = None
            for tile in tiles:
                if dense is None:
                    dense = np.zeros(LOW_BINS, np.int64)
                    dense[bins] = counts
                dense[tile.bins] += tile.counts
                size, zeros = size + tile.size, zeros + tile.zeros
                protected += tile.protected
            if dense is not None:
                bins = np.flatnonzero(dense)[::-1]
                counts = dense[bins]
            yield TensorCounts(name, first.kind, size, zeros, protected, bins, counts)

    def __len__(self) -> int:
        return sum(1 for _ in self.tiles())


@dataclass(frozen=True)
class TensorCounts:
    """A tensor's histogram, largest magnitudes first; see `TileCounts`."""

    name: str
    kind: int
    size: int
    zeros: int
    protected: int
    bins: Int
    counts: Int

    @property
    def nonzeros(self) -> int:
        """Weights that may be kept: the protected ones and those that are not zero."""
        return self.protected + int(self.counts.sum())


@dataclass(frozen=True)
class TensorCut:
    """What `kernels.threshold_mask` needs for any tile of one tensor.

    key      in the bits of the scored dtype; larger keys are kept
    starts   first rows of the tiles that keep ties, ascending; `ties` how many each keeps
    ends     one past the last rows of those tiles
    kept     weights kept of the whole tensor, protected ones included
    """

    key: int
    kept: int
    starts: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    ties: tuple[int, ...] = ()

    def ties_in(self, first_row: int, rows: int) -> int:
        """Ties kept by rows [first_row, first_row + rows), a union of surveyed tiles.

        Ties go to the earliest tiles, so those of neighbours add up. Raises ValueError for
        rows that cut a surveyed tile with ties in two.
        """
        total, stop = 0, first_row + rows
        for start, end, ties in zip(self.starts, self.ends, self.ties, strict=True):
            if first_row <= start and end <= stop:
                total += ties
            elif start < stop and first_row < end:
                raise ValueError(f"rows {first_row}..{stop} cut the surveyed rows {start}..{end}")
        return total


@dataclass(frozen=True)
class Plan:
    """A selection after the first sweep.

    kept      how many weights to keep of a tensor, where the first sweep tells
    prefixes  float32 tensors whose cut lies inside a bin: the bin to count in a second sweep
    bin       the bin of the global threshold (-1: there is none)
    budget    weights to keep in all
    floors    the least to keep of a tensor (existing zeros taken off)
    """

    kept: dict[str, int]
    prefixes: dict[str, int]
    bin: int = -1
    budget: int = 0
    floors: Mapping[str, int] = field(default_factory=dict)


def plan_counts(spill: Spill, kept: dict[str, int]) -> Plan:
    """A plan from known counts a tensor: what is left to find is where float32 cuts lie."""
    prefixes: dict[str, int] = {}
    for tensor in spill.tensors():
        if tensor.kind == FLOAT32:
            bin_, wanted, count = _locate(tensor, kept[tensor.name])
            if 0 < wanted < count:
                prefixes[tensor.name] = bin_
    return Plan(kept, prefixes, budget=sum(kept.values()))


def plan_global(spill: Spill, budget: int, floors: Mapping[str, int]) -> Plan:
    """Keep the `budget` largest magnitudes of all, and of each tensor at least its floor.

    The count is exact: the threshold t solves sum over tensors of max(count(t), floor) = budget.
    A tensor's weights that its floor already pays for add nothing to the histogram, so one
    histogram of what exceeds the floors gives t directly.
    """
    excess = np.zeros(BINS, np.int64)
    spent = 0
    for tensor in spill.tensors():
        steps, minimum = _excess(tensor.counts, tensor.protected, floors[tensor.name])
        tops = keys_of_bins(tensor.kind)[tensor.bins] >> 16
        if tensor.kind == FLOAT16:  # several float16 values share a top
            np.add.at(excess, tops, steps)
        else:
            excess[tops] += steps
        spent += minimum
    bin_, left = _threshold(excess, budget - spent)
    kept: dict[str, int] = {}
    prefixes: dict[str, int] = {}
    for tensor in spill.tensors():
        name, tops = tensor.name, keys_of_bins(tensor.kind)[tensor.bins] >> 16
        floor = floors[name]
        above = max(tensor.protected + int(tensor.counts[tops > bin_].sum()), floor)
        upto = max(tensor.protected + int(tensor.counts[tops >= bin_].sum()), floor)
        if above == upto or left == 0:
            kept[name] = above
        elif tensor.kind == FLOAT32:
            prefixes[name] = bin_
        if tensor.kind == FLOAT32 and name in kept:
            own, wanted, count = _locate(tensor, kept[name])
            if 0 < wanted < count:
                prefixes[name] = own
    return Plan(kept, prefixes, bin_ if left else -1, budget, floors)


def cuts(plan: Plan, spill: Spill, low: Spill | None) -> dict[str, TensorCut]:
    """The cut of every tensor. `low` holds the second sweep's counts where the plan asks."""
    kept = dict(plan.kept)
    if plan.bin >= 0:
        kept |= _finish_global(plan, spill, low)
    found: dict[str, TensorCut] = {}
    ties: dict[str, int] = {}
    for tensor, fine in _paired(spill, low):
        key, ties_kept = _cut(tensor, fine, kept[tensor.name])
        found[tensor.name] = TensorCut(key, max(kept[tensor.name], tensor.protected))
        if ties_kept:
            ties[tensor.name] = ties_kept
    return found | _share_ties(found, ties, spill, low)


def _cut(tensor: TensorCounts, fine: TensorCounts | None, kept: int) -> tuple[int, int]:
    """(key, ties) that keep `kept` weights of a tensor; no ties where a whole bin is kept."""
    bin_, wanted, count = _locate(tensor, kept)
    if wanted == 0:
        return KEEP_NONE[tensor.kind], 0
    if wanted == count:
        edge = bin_ << 16 if tensor.kind == FLOAT32 else bin_
        return max(edge - 1, 0), 0
    if tensor.kind != FLOAT32:
        return bin_, wanted
    if fine is None:
        raise RuntimeError(f"the second sweep skipped {tensor.name}")
    place = int(np.searchsorted(np.cumsum(fine.counts), wanted))
    ties = wanted - int(fine.counts[:place].sum())
    key = (bin_ << 16) | int(fine.bins[place])
    return (key - 1, 0) if ties == int(fine.counts[place]) else (key, ties)


def _share_ties(
    found: Mapping[str, TensorCut], left: dict[str, int], spill: Spill, low: Spill | None
) -> dict[str, TensorCut]:
    """The cuts that keep ties, which go to a tensor's tiles first rows first."""
    shares: dict[str, list[tuple[int, int, int]]] = {name: [] for name in left}
    for source in (spill, low):
        for tile in source.tiles() if source is not None else ():
            name = tile.name
            if name not in left or (source is spill and tile.kind == FLOAT32):
                continue  # float32 ties are told apart by the second sweep only
            bin_ = found[name].key & (0xFFFF if tile.kind == FLOAT32 else 0x7FFF)
            here = int(tile.counts[tile.bins == bin_].sum())
            given = min(here, left[name])
            left[name] -= given
            if here:
                shares[name].append((tile.first_row, tile.first_row + tile.rows, given))
    return {
        name: replace(
            found[name],
            starts=tuple(start for start, _, _ in share),
            ends=tuple(end for _, end, _ in share),
            ties=tuple(given for _, _, given in share),
        )
        for name, share in shares.items()
    }


def _finish_global(plan: Plan, spill: Spill, low: Spill | None) -> dict[str, int]:
    """The counts of tensors whose weights share the threshold's bin, by the low 16 bits."""
    excess = np.zeros(LOW_BINS, np.int64)
    spent = sum(plan.kept.values())
    for inside in _inside(plan, spill, low):
        steps, minimum = _excess(inside.counts, inside.above, inside.floor)
        excess[inside.low] += steps
        spent += minimum
    low_key, left = _threshold(excess, plan.budget - spent)
    kept = {}
    for inside in _inside(plan, spill, low):
        least = inside.kept_when(inside.low > low_key)
        extra = min(left, inside.kept_when(inside.low >= low_key) - least)
        left -= extra  # earlier tensors win ties
        kept[inside.name] = least + extra
    return kept


@dataclass(frozen=True)
class _Inside:
    """A tensor's weights inside the bin of the global threshold, largest first."""

    name: str
    low: Int
    counts: Int
    above: int  # weights kept whatever happens inside the bin
    floor: int

    def kept_when(self, taken: NDArray[np.bool_]) -> int:
        return max(self.above + int(self.counts[taken].sum()), self.floor)


def _inside(plan: Plan, spill: Spill, low: Spill | None) -> Iterator[_Inside]:
    """The tensors whose count the first sweep left open, in order."""
    for tensor, fine in _paired(spill, low):
        name = tensor.name
        if name in plan.kept:
            continue
        keys = keys_of_bins(tensor.kind)[tensor.bins]
        above = tensor.protected + int(tensor.counts[keys >> 16 > plan.bin].sum())
        if tensor.kind != FLOAT32:
            here = keys >> 16 == plan.bin
            bits = (keys[here] & 0xFFFF).astype(np.int64)
            yield _Inside(name, bits, tensor.counts[here], above, plan.floors[name])
        elif fine is not None:
            yield _Inside(name, fine.bins, fine.counts, above, plan.floors[name])
        else:
            raise RuntimeError(f"the second sweep skipped {name}")


def _paired(spill: Spill, low: Spill | None) -> Iterator[tuple[TensorCounts, TensorCounts | None]]:
    """The tensors in order, each with its counts of the second sweep, which skips some."""
    finer = low.tensors() if low is not None else iter(())
    fine = next(finer, None)
    for tensor in spill.tensors():
        if fine is not None and fine.name == tensor.name:
            yield tensor, fine
            fine = next(finer, None)
        else:
            yield tensor, None


def _excess(counts: Int, base: int, floor: int) -> tuple[Int, int]:
    """(what each bin, largest first, adds beyond the floor; what is kept at least)."""
    minimum = max(base, floor)
    kept = np.maximum(base + np.cumsum(counts), minimum)
    return np.diff(kept, prepend=minimum), minimum


def _threshold(histogram: Int, budget: int) -> tuple[int, int]:
    """(bin, left): the bins above it are kept whole, and `left` more come out of the bin."""
    if budget <= 0:
        return histogram.size - 1, 0
    cumulative = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(cumulative, budget))
    if place == histogram.size or cumulative[place] == budget:
        return histogram.size - 2 - min(place, histogram.size - 1), 0
    before = int(cumulative[place - 1]) if place else 0
    return histogram.size - 1 - place, budget - before


def _locate(tensor: TensorCounts, kept: int) -> tuple[int, int, int]:
    """Where a tensor's cut falls: (bin, entries wanted of that bin, entries in it)."""
    wanted = kept - tensor.protected
    if wanted <= 0:
        return 0, 0, 0
    cumulative = np.cumsum(tensor.counts)
    place = int(np.searchsorted(cumulative, wanted))
    before = int(cumulative[place - 1]) if place else 0
    return int(tensor.bins[place]), wanted - before, int(tensor.counts[place])


def float_of_key(key: int, kind: int) -> float:
    """The magnitude whose key this is."""
    bits: Any = {BFLOAT16: np.uint16, FLOAT16: np.uint16, FLOAT32: np.uint32}[kind]
    dtype: Any = {BFLOAT16: ml_dtypes.bfloat16, FLOAT16: np.float16, FLOAT32: np.float32}[kind]
    return float(np.array([key], bits).view(dtype).astype(np.float64)[0])
