"""Columns of a down projection that hold a weight far out of every proportion.

With D, G, U the down, gate and up
matrices of a gated MLP, entry (j, k) carries at most

    s[j, k] = |D[j, k]| * f[k],      f[k] = ||G[k, :]|| * ||U[k, :]||,

which ranks published super weights first in their layers. But some entry is first in every layer,
so a rank is no evidence. The largest entry of column k is accepted when all of these hold:

    own layer's scores   A = s / rms(s over the matrix)                         >= 24
    own matrix           |D[j, k]| / rms(D)                                     >= 10
    own column and fan   Z = |D[j, k]| / rms(rest of its column) * sqrt(f[k] / median f),
                         over the 8th largest Z of any column in its layer      >= 2.25
    other layers         Z over the median of those 8th largest Z of all layers >= 3

The column's own scale is divided out because trained matrices have columns that are large as a
whole; the root weighs the neuron's reach and the entry's dominance alike. The 8th largest Z stands
for how far the tail of an ordinary layer of this size reaches, so nothing depends on the size of
the model, and up to seven super-weight columns in one layer do not hide each other. The rest of a
column's scale is taken to be at least half of rms(D), so that a nearly empty column proves nothing.

A column that is accepted brings its fan-out along: further entries with A >= 12, at least 7 times
the rms of the column without them and all larger ones, and a quarter of the largest. (Published
super weights in one column are mostly harmless one by one and lethal together: they are protected
as a group.)

The constants lie between the two groups in a trained 6.8 M Llama with known massive activations
(accepted: A 35, Z ratios 2.6 and 3.7; largest rejected, in the same layer: 19, 1.9 and 2.7; other
layers at most 11, 1.7), a trained 260 K Llama with none (10, 1.9), and synthetic Llamas of 3 M to
1 B shapes with planted single entries (A >= 29, ratio >= 5; without them the ratio is at most 2.0).
The rule was not fitted to models of billions of weights, where the published margins are far larger
(reach 27 to 38 times the median); on an already sparse model (above about 90 % zeros) columns hold
too few weights for it to mean much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from compress import kernels
from compress.tensor import Array

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Place = tuple[int, int]  # row and column of an entry

MIN_SCORE = 24.0
MIN_MAGNITUDE = 10.0
MIN_OWN_RATIO = 2.25
MIN_MODEL_RATIO = 3.0
MIN_COMPANION_SCORE = 12.0
MIN_COMPANION_DOMINANCE = 7.0
MIN_COMPANION_SHARE = 0.25  # of the column's largest
BACKGROUND_RANK = 8
COLUMN_FLOOR = 0.5

_TOP = 4096  # entries remembered by score and by magnitude, a layer
_BLOCK = 1 << 18  # weights looked at together: stays in the cache


@dataclass(frozen=True)
class _Top:
    """The `_TOP` largest entries of a matrix by some measure, largest first."""

    measure: F64
    rows: I64
    columns: I64
    values: F64

    def with_(self, other: _Top) -> _Top:
        """The largest of both; equal ones by row, then column."""
        joined = [
            np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("measure", "rows", "columns", "values")
        ]
        order = np.lexsort((joined[2], joined[1], -joined[0]))[:_TOP]
        return _Top(*(part[order] for part in joined))

    @property
    def least(self) -> float:
        """What an entry must exceed (or equal) to belong here."""
        return float(self.measure[-1]) if self.measure.size >= _TOP else 0.0

    def rank(self, row: int, column: int) -> int | None:
        """From 1, or None for an entry that is not among them."""
        found = np.flatnonzero((self.rows == row) & (self.columns == column))
        return int(found[0]) + 1 if found.size else None


@dataclass(frozen=True)
class Columns:
    """What is remembered of the rows of a down projection seen so far.

    squares, largest  float64 [columns]: sum of squares and largest magnitude
    largest_row       int64 [columns]
    named             values at places given by hand
    """

    rows: int
    squares: F64
    largest: F64
    largest_row: I64
    by_score: _Top
    by_magnitude: _Top
    named: Mapping[tuple[int, int], float]

    def with_(self, later: Columns) -> Columns:
        """This and rows further down."""
        larger = later.largest > self.largest
        return Columns(
            self.rows + later.rows,
            self.squares + later.squares,
            np.where(larger, later.largest, self.largest),
            np.where(larger, later.largest_row, self.largest_row),
            self.by_score.with_(later.by_score),
            self.by_magnitude.with_(later.by_magnitude),
            {**self.named, **later.named},
        )


@dataclass(frozen=True)
class Measured:
    """What is known of one entry. What was not measured is None."""

    value: float | None = None
    score: float | None = None  # A
    ratio: float | None = None  # Z over its own layer's 8th largest
    rank: int | None = None  # by score in its matrix, from 1


@dataclass(frozen=True)
class Layer:
    """A down projection with its columns' ratios. Arrays are float64 [columns]."""

    columns: Columns
    reach: F64
    typical_reach: float
    rms: float  # of the matrix
    score_rms: float
    ratios: F64  # Z over the background; 0 where the background is
    background: float

    @classmethod
    def of(cls, columns: Columns, reach: F64) -> Layer:
        """Statistics of the whole matrix against its own 8th largest Z."""
        size = max(1, columns.rows * reach.size)
        rms = float(np.sqrt(columns.squares.sum() / size))
        score_rms = float(np.sqrt((columns.squares * reach**2).sum() / size))
        live = reach[reach > 0]
        typical = float(np.median(live)) if live.size else 1.0
        layer = cls(columns, reach, typical, rms, score_rms, np.zeros_like(reach), 0.0)
        strength = np.array([], np.float64)
        if rms and score_rms:
            rest = columns.squares - columns.largest**2
            strength = layer._strength(columns.largest, rest, np.arange(reach.size), 1)
        if not strength.size:
            return layer
        place = min(BACKGROUND_RANK, strength.size)
        background = float(np.partition(strength, -place)[-place])
        ratios = strength / background if background else np.zeros_like(strength)
        return replace(layer, ratios=ratios, background=background)

    def _strength(self, magnitudes: F64, rest: F64, columns: I64, taken: int) -> F64:
        """Z of entries; `rest` is the sum of squares of their columns without `taken` entries."""
        dominance = magnitudes / self._rest_rms(rest, taken)
        return np.asarray(dominance * np.sqrt(self.reach[columns] / self.typical_reach))

    def _rest_rms(self, rest: F64, taken: int) -> F64:
        mean = np.maximum(rest, 0) / max(1, self.columns.rows - taken)
        return np.maximum(np.sqrt(mean), COLUMN_FLOOR * self.rms)

    def accepted(self, model_background: float, most: int) -> list[Place]:
        """The entries of the columns that pass, strongest column first, at most `most`."""
        if not self.background:
            return []
        largest = self.columns.largest
        passes = (
            (largest * self.reach >= MIN_SCORE * self.score_rms)
            & (largest >= MIN_MAGNITUDE * self.rms)
            & (self.ratios >= MIN_OWN_RATIO)
            & (self.ratios * self.background >= MIN_MODEL_RATIO * model_background)
        )
        chosen = np.flatnonzero(passes)
        chosen = chosen[np.argsort(-self.ratios[chosen], kind="stable")]
        found: list[Place] = []
        for column in chosen.tolist():
            rows = [int(self.columns.largest_row[column]), *self._companions(column)]
            found += [(row, column) for row in rows]
        return found[:most]

    def _companions(self, column: int) -> list[int]:
        """Further rows of an accepted column that stand out of what is left of it."""
        top = self.columns.by_score
        here = top.columns == column
        rows, sizes = top.rows[here], np.abs(top.values[here])
        rest = float(self.columns.squares[column])
        found: list[int] = []
        least = MIN_COMPANION_SHARE * float(self.columns.largest[column])
        for taken, (row, size) in enumerate(zip(rows.tolist(), sizes.tolist(), strict=True), 1):
            rest -= size**2
            if taken == 1:
                continue  # the largest entry itself
            dominance = size / float(self._rest_rms(np.array(rest), taken))
            score = size * float(self.reach[column]) / self.score_rms
            if size < least or dominance < MIN_COMPANION_DOMINANCE or score < MIN_COMPANION_SCORE:
                break
            found.append(row)
        return found

    def strongest(self) -> Place | None:
        """The entry of the largest ratio; None without columns."""
        if not self.ratios.size:
            return None
        column = int(self.ratios.argmax())
        return int(self.columns.largest_row[column]), column

    def among_largest(self, row: int, column: int, most: int) -> bool:
        """Whether an entry is one of the `most` largest by score or by magnitude."""
        ranks = (
            self.columns.by_score.rank(row, column),
            self.columns.by_magnitude.rank(row, column),
        )
        return any(rank is not None and rank <= most for rank in ranks)

    def measured(self, row: int, column: int) -> Measured:
        """What is known of an entry."""
        top = self.columns.by_score
        rank = top.rank(row, column)
        value = self.columns.named.get((row, column))
        if rank is not None:
            value = float(top.values[rank - 1])
        elif value is None:
            place = self.columns.by_magnitude.rank(row, column)
            value = None if place is None else float(self.columns.by_magnitude.values[place - 1])
        if value is None or not self.score_rms or not self.background:
            return Measured(value)
        size = np.array([abs(value)])
        rest = self.columns.squares[[column]] - size**2
        strength = self._strength(size, rest, np.array([column]), 1)
        return Measured(
            value,
            score=float(size[0] * self.reach[column] / self.score_rms),
            ratio=float(strength[0] / self.background),
            rank=rank,
        )


# ---------------------------------------------------------------- one tile


def squared_norms(values: Array) -> F64:
    """float64 [rows]: squared norms of the rows of a tile [rows, columns]."""
    norms = np.empty(values.shape[0], np.float64)
    with np.errstate(over="ignore"):
        kernels.squared_norms(values, norms)
    if not np.isfinite(norms).all():  # squares beyond float32
        norms = (values.astype(np.float64) ** 2).sum(1)
    return norms


def row_norms(parts: Sequence[tuple[int, F64]], part: slice | None = None) -> F64:
    """float64 [rows]: norms of all rows or a part, from (first row, squared norms) of tiles."""
    ordered = sorted(parts, key=lambda item: item[0])
    squares = np.concatenate([values for _, values in ordered])
    return np.asarray(np.sqrt(squares if part is None else squares[part]))


def tile_columns(
    values: Array, first_row: int, reach: F64, named: Mapping[tuple[int, int], float]
) -> Columns:
    """What a tile [rows, columns] of a down projection adds; `reach` is f, float64 [columns]."""
    rows, width = values.shape
    squares, largest = np.zeros(width), np.zeros(width)
    largest_row = np.full(width, first_row, np.int64)
    none = np.empty(0, np.float64)
    empty = _Top(none, none.astype(np.int64), none.astype(np.int64), none)
    by_score, by_magnitude = empty, empty
    step = max(1, _BLOCK // max(1, width))
    for start in range(0, rows, step):
        block = values[start : start + step].astype(np.float32)
        sizes = np.abs(block)
        peaks = sizes.max(0).astype(np.float64)
        squares += _column_squares(block)
        first = first_row + start
        larger = np.flatnonzero(peaks > largest)
        largest_row[larger] = first + sizes[:, larger].argmax(0)
        largest[larger] = peaks[larger]
        by_score = _enter(by_score, block, sizes, peaks, reach, first)
        by_magnitude = _enter(by_magnitude, block, sizes, peaks, np.ones_like(reach), first)
    return Columns(rows, squares, largest, largest_row, by_score, by_magnitude, named)


def _column_squares(block: NDArray[np.float32]) -> F64:
    """float64 [columns]: sums down the rows, one after another, so the same on every machine."""
    with np.errstate(over="ignore"):
        total = np.add.reduce(block * block, axis=0)
    if not np.isfinite(total).all():  # squares beyond float32
        total = np.add.reduce(block.astype(np.float64) ** 2, axis=0)
    return np.asarray(total, np.float64)


def _enter(
    top: _Top,
    block: NDArray[np.float32],
    sizes: NDArray[np.float32],
    peaks: F64,
    weight: F64,
    first_row: int,
) -> _Top:
    """`top` with the entries of a block whose size times their column's weight is large enough.

    Only columns whose peak is large enough are looked into: after the first blocks, few are.
    """
    least = top.least
    candidates_ = np.flatnonzero(peaks * weight > least)
    if not candidates_.size:
        return top
    measure = sizes[:, candidates_] * weight[candidates_]
    if not top.measure.size and measure.size > _TOP:
        least = float(np.partition(measure, -_TOP, axis=None)[-_TOP])
        rows, columns = np.nonzero(measure >= least)
    else:
        rows, columns = np.nonzero(measure > least)
    places = candidates_[columns].astype(np.int64)
    values = block[rows, places].astype(np.float64)
    return top.with_(_Top(measure[rows, columns], rows + first_row, places, values))
