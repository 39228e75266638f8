"""`super-weights`: find the few weights a language model cannot lose, and keep them exactly.

A super weight (Yu et al., arXiv 2411.07191) sits in an early down projection: one intermediate
neuron fires on the first token and writes one enormous value into the residual stream, through
one or a few entries of one column. Detection needs no data. With D, G, U the down, gate and up
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

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from compress import kernels
from compress.errors import InputError, UsageError, show
from compress.passes.base import Pass, Terms, option
from compress.passes.published_super_weights import candidates
from compress.roles import GatedMlp, gated_mlps
from compress.tensor import Array, Outliers, Role, Tensor, TensorInfo

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

MIN_SCORE = 24.0
MIN_MAGNITUDE = 10.0
MIN_OWN_RATIO = 2.25
MIN_MODEL_RATIO = 3.0
MIN_COMPANION_SCORE = 12.0
MIN_COMPANION_DOMINANCE = 7.0
MIN_COMPANION_SHARE = 0.25  # of the column's largest
BACKGROUND_RANK = 8
COLUMN_FLOOR = 0.5
PUBLISHED_RANK = 64  # a published place must hold one of this many largest scores or weights

_TOP = 4096  # entries remembered by score and by magnitude, a layer
_BLOCK = 1 << 18  # weights looked at together: stays in the cache
# Last parts of the names a gated MLP's down projection goes by: for estimates before the headers
# were looked at together. What is searched is decided by `gated_mlps`.
_DOWN = re.compile(r"(?:^|.*\.)(?:down_proj|down|w2|wo|Wo)(?:\.weight)?")

SCORE, PUBLISHED, NAMED = "score", "published", "named"


@dataclass(frozen=True)
class Entry:
    """One accepted weight. What was not measured is None."""

    tensor: str
    layer: int
    row: int
    column: int
    confidence: str
    value: float | None = None
    score: float | None = None  # A
    ratio: float | None = None  # Z over its own layer's 8th largest
    rank: int | None = None  # by score in its matrix, from 1


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
class _Columns:
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

    def with_(self, later: _Columns) -> _Columns:
        """This and rows further down."""
        larger = later.largest > self.largest
        return _Columns(
            self.rows + later.rows,
            self.squares + later.squares,
            np.where(larger, later.largest, self.largest),
            np.where(larger, later.largest_row, self.largest_row),
            self.by_score.with_(later.by_score),
            self.by_magnitude.with_(later.by_magnitude),
            {**self.named, **later.named},
        )


@dataclass(frozen=True)
class _Search:
    """Where a search stands: the MLPs, the places named by hand, and f once it is known."""

    mlps: tuple[GatedMlp, ...]
    shapes: Mapping[str, tuple[int, int]]
    named: Mapping[str, tuple[tuple[int, int], ...]]
    reach: Mapping[str, F64] | None = None  # down projection -> f, float64 [columns]


@dataclass(frozen=True)
class SuperWeights(Pass):
    """Keep the few weights that cause massive activations exactly."""

    name: ClassVar[str] = "super-weights"
    writes: ClassVar[str] = "outliers"
    roles: ClassVar[frozenset[Role]] = frozenset({Role.LINEAR})

    method: str = option(
        "auto",
        "how to find them: score (from weights alone), named (only coordinates), auto (score)",
        choices=("auto", "score", "named"),
    )
    coordinates: tuple[str, ...] = option(
        (), "protect these as well: layer:row:column of a down projection, or tensor:row:column"
    )
    max_per_layer: int = option(8, "accept at most this many of a layer", low=1, high=64)
    published: bool = option(True, "also take published coordinates whose weight stands out")

    # Written by `bind` and `decide`.
    in_scale: bool = field(default=False, repr=False, compare=False)
    search: _Search | None = field(default=None, repr=False, compare=False)
    entries: tuple[Entry, ...] | None = field(default=None, repr=False, compare=False)
    found: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    # ------------------------------------------------------------ before any work

    def validate(self) -> None:
        """Raises UsageError for a malformed coordinate, or a method that needs some."""
        for text in self.coordinates:
            _parse(text)
        if self.method == "named" and not self.coordinates:
            raise UsageError(
                "super-weights: method=named needs coordinates",
                hint='e.g. coordinates=["2:3968:7003"]',
            )

    def check(self, info: TensorInfo) -> None:
        """Nothing to refuse: a matrix without super weights is left as it is."""

    def check_all(self, infos: list[TensorInfo]) -> None:
        """Raises UsageError for a coordinate outside its tensor, or in none of the targets."""
        self._resolve(infos, gated_mlps(infos))

    def _resolve(
        self, infos: Sequence[TensorInfo], mlps: Sequence[GatedMlp]
    ) -> dict[str, tuple[tuple[int, int], ...]]:
        """Places named by hand, by tensor, sorted."""
        shapes = {info.name: info.matrix_shape for info in infos}
        names = {info.module: info.name for info in infos} | {name: name for name in shapes}
        downs: dict[int, list[str]] = {}
        for mlp in mlps:
            downs.setdefault(mlp.layer, []).append(mlp.down)
        places: dict[str, set[tuple[int, int]]] = {}
        for text in self.coordinates:
            where, row, column = _parse(text)
            if isinstance(where, int):
                chosen = downs.get(where, [])
                if len(chosen) != 1:
                    problem = "no gated MLP" if not chosen else f"{len(chosen)} gated MLPs"
                    raise UsageError(
                        f"super-weights: coordinate {show(text)}: layer {where} has {problem} "
                        "among the targets",
                        hint="name the tensor instead: tensor.name:row:column",
                    )
                name = chosen[0]
            elif where in names:
                name = names[where]
            else:
                raise UsageError(
                    f"super-weights: coordinate {show(text)}: {show(where)} is not among the "
                    "targets",
                    hint="see `compress inspect` for names; targets= adds a tensor",
                )
            rows, columns = shapes[name]
            if row >= rows or column >= columns:
                raise UsageError(
                    f"super-weights: coordinate {show(text)} lies outside {show(name)}, "
                    f"which has {rows} rows and {columns} columns"
                )
            places.setdefault(name, set()).add((row, column))
        return {name: tuple(sorted(places[name])) for name in sorted(places)}

    def bind(
        self, info: TensorInfo, earlier: Sequence[Pass], *, base_stands_alone: bool
    ) -> SuperWeights:
        """Inside its group's scale where the base must be usable on its own."""
        return replace(self, in_scale=base_stands_alone)

    def predict(self, info: TensorInfo, terms: Terms) -> Terms:
        """Bounds of the entries of a tensor; exact once decided."""
        if self.entries is not None:
            here = [e for e in self.entries if e.tensor == info.name]
            count, columns = len(here), len({e.column for e in here})
            if not count:
                return terms
            return replace(
                terms,
                outliers=(count, count),
                outlier_columns=(columns, columns),
                passes=(*terms.passes, self.name),
            )
        most = len(self.coordinates)
        if self.method != "named" and _DOWN.fullmatch(info.name):
            most += self.max_per_layer
        most = min(most, info.size)
        if not most:
            return terms
        return replace(
            terms,
            outliers=(0, most),
            outlier_columns=(0, min(most, info.matrix_shape[1])),
            passes=(*terms.passes, self.name),
        )

    def row_wise(self, info: TensorInfo) -> bool:
        """A tensor with entries is stored whole, with its list."""
        return not any(entry.tensor == info.name for entry in self.entries or ())

    # ------------------------------------------------------------ surveys

    @property
    def wants_survey(self) -> bool:
        """Three sweeps: find the MLPs (nothing is read), norms of gate and up, scores of down."""
        return self.entries is None

    def survey_bytes(self, infos: list[TensorInfo]) -> int:
        """Every gate, up and down projection once."""
        names = {n for mlp in gated_mlps(infos) for n in (mlp.gate, mlp.up, mlp.down)}
        return sum(i.nbytes for i in infos if i.name in names) if self.wants_survey else 0

    def surveys(self, info: TensorInfo) -> bool:
        """Whether the next sweep has to read this tensor."""
        if self.search is None:
            return False
        if self.search.reach is None:
            return any(info.name in (mlp.gate, mlp.up) for mlp in self.search.mlps)
        return info.name in self.search.reach

    def survey(self, tensor: Tensor) -> dict[str, Any] | None:
        """Squared row norms of a gate or up tile, or `_Columns` of a down tile.

        Raises InputError for a NaN or an infinity.
        """
        search, name = self.search, tensor.info.name
        if search is None or not self.surveys(tensor.info):
            return None
        if search.reach is None:
            return {name: [(tensor.first_row, _squared_norms(tensor))]}
        return {name: _columns(tensor, search.reach[name], search.named.get(name, ()))}

    def merge(self, a: Any, b: Any) -> Any:
        """Join statistics of different tensors, and of rows of one tensor in order."""
        if a is None or b is None:
            return b if a is None else a
        joined = dict(a)
        for name, later in b.items():
            if name not in joined:
                joined[name] = later
            elif isinstance(later, _Columns):
                joined[name] = joined[name].with_(later)
            else:
                joined[name] = joined[name] + later
        return joined

    def decide(self, statistic: Any, infos: list[TensorInfo]) -> SuperWeights:
        """The pass for the next sweep, or with its entries."""
        if self.search is None:
            return self._start(infos)
        if self.search.reach is None:
            return replace(self, search=_with_reach(self.search, statistic or {}))
        return self._accept(self.search, statistic or {})

    def _start(self, infos: Sequence[TensorInfo]) -> SuperWeights:
        mlps = gated_mlps(infos)
        named = self._resolve(infos, mlps)
        searched = () if self.method == "named" else tuple(mlps)
        shapes = {mlp.down: _shape(infos, mlp.down) for mlp in searched}
        started = replace(self, search=_Search(searched, shapes, named))
        if searched:
            return started
        layers = {mlp.down: mlp.layer for mlp in mlps}
        entries = [
            Entry(name, layers.get(name, _layer_of(name)), row, column, NAMED)
            for name, places in named.items()
            for row, column in places
        ]
        reason = "only named coordinates" if self.method == "named" else "no gated MLP"
        return started._decided(entries, {"reason": reason, "layers_searched": 0})

    def _accept(self, search: _Search, statistic: Mapping[str, _Columns]) -> SuperWeights:
        """Judge every layer against itself and the others."""
        layers = [
            _Layer.of(mlp, statistic[mlp.down], search.reach[mlp.down])
            for mlp in search.mlps
            if search.reach is not None and mlp.down in statistic
        ]
        background = float(np.median([one.background for one in layers])) if layers else 0.0
        found: dict[tuple[str, int, int], Entry] = {}
        for one in layers:
            for entry in one.accepted(background, self.max_per_layer):
                found[entry.tensor, entry.row, entry.column] = entry
        if self.published:
            for entry in _published(layers):
                found[entry.tensor, entry.row, entry.column] = entry
        by_down = {one.mlp.down: one for one in layers}
        for name, places in search.named.items():
            for row, column in places:
                one_layer = by_down.get(name)
                found[name, row, column] = (
                    Entry(name, _layer_of(name), row, column, NAMED)
                    if one_layer is None
                    else one_layer.entry(row, column, NAMED)
                )
        report: dict[str, Any] = {"layers_searched": len(layers)}
        if not found:
            report["reason"] = "no weight stands out of its column, its layer and the other layers"
        strongest = max(layers, key=lambda one: one.ratios.max(initial=0.0), default=None)
        if strongest is not None and strongest.ratios.size:
            column = int(strongest.ratios.argmax())
            row = int(strongest.columns.largest_row[column])
            entry = strongest.entry(row, column, SCORE)
            report["strongest"] = _plain(replace(entry, confidence="not accepted")) | {
                "accepted": (entry.tensor, row, column) in found,
                "ratio_asked": MIN_OWN_RATIO,
                "score_asked": MIN_SCORE,
            }
            del report["strongest"]["confidence"]
        return self._decided(list(found.values()), report)

    def _decided(self, entries: Sequence[Entry], report: dict[str, Any]) -> SuperWeights:
        ordered = tuple(sorted(entries, key=lambda e: (e.layer, e.tensor, e.row, e.column)))
        report = {"found": len(ordered), **report, "entries": [_plain(e) for e in ordered]}
        return replace(self, search=None, entries=ordered, found=report)

    # ------------------------------------------------------------ work

    def apply(self, tensor: Tensor) -> Tensor:
        """The tile with its accepted entries and their exact values."""
        if self.entries is None:
            raise RuntimeError("super-weights: apply before decide")
        stop = tensor.first_row + tensor.source.shape[0]
        places = sorted(
            (e.row - tensor.first_row, e.column)
            for e in self.entries
            if e.tensor == tensor.info.name and tensor.first_row <= e.row < stop
        )
        if not places:
            return tensor
        rows = np.array([row for row, _ in places], np.int64)
        columns = np.array([column for _, column in places], np.int64)
        values = tensor.source[rows, columns]
        return tensor.with_(outliers=Outliers(rows, columns, values, in_scale=self.in_scale))

    def facts(self) -> dict[str, Any]:
        """How many were found and where, with confidence, or why none."""
        return dict(self.found or {})


@dataclass(frozen=True)
class _Layer:
    """A down projection with its columns' ratios. Arrays are float64 [columns]."""

    mlp: GatedMlp
    columns: _Columns
    reach: F64
    typical_reach: float
    rms: float  # of the matrix
    score_rms: float
    ratios: F64  # Z over the background; 0 where the background is
    background: float

    @classmethod
    def of(cls, mlp: GatedMlp, columns: _Columns, reach: F64) -> _Layer:
        size = max(1, columns.rows * reach.size)
        rms = float(np.sqrt(columns.squares.sum() / size))
        score_rms = float(np.sqrt((columns.squares * reach**2).sum() / size))
        live = reach[reach > 0]
        typical = float(np.median(live)) if live.size else 1.0
        layer = cls(mlp, columns, reach, typical, rms, score_rms, np.zeros_like(reach), 0.0)
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

    def accepted(self, model_background: float, most: int) -> list[Entry]:
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
        found: list[Entry] = []
        for column in chosen.tolist():
            rows = [int(self.columns.largest_row[column]), *self._companions(column)]
            found += [self.entry(row, column, SCORE) for row in rows]
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

    def entry(self, row: int, column: int, confidence: str) -> Entry:
        """An entry with what is known of it."""
        top = self.columns.by_score
        rank = top.rank(row, column)
        value = self.columns.named.get((row, column))
        if rank is not None:
            value = float(top.values[rank - 1])
        elif value is None:
            place = self.columns.by_magnitude.rank(row, column)
            value = None if place is None else float(self.columns.by_magnitude.values[place - 1])
        if value is None or not self.score_rms or not self.background:
            return Entry(self.mlp.down, self.mlp.layer, row, column, confidence, value)
        size = np.array([abs(value)])
        rest = self.columns.squares[[column]] - size**2
        strength = self._strength(size, rest, np.array([column]), 1)
        return Entry(
            self.mlp.down,
            self.mlp.layer,
            row,
            column,
            confidence,
            value,
            score=float(size[0] * self.reach[column] / self.score_rms),
            ratio=float(strength[0] / self.background),
            rank=rank,
        )


def _published(layers: Sequence[_Layer]) -> list[Entry]:
    """Published places of models of this shape that hold one of their layer's largest weights."""
    shapes = {(one.columns.rows, one.reach.size) for one in layers}
    if len(shapes) != 1:
        return []
    by_layer = {one.mlp.layer: one for one in layers}
    found = []
    for number, row, column in candidates(len(layers), *shapes.pop()):
        one = by_layer.get(number)
        if one is None:
            continue
        ranks = (one.columns.by_score.rank(row, column), one.columns.by_magnitude.rank(row, column))
        if any(rank is not None and rank <= PUBLISHED_RANK for rank in ranks):
            found.append(one.entry(row, column, PUBLISHED))
    return found


def _with_reach(search: _Search, norms: Mapping[str, list[tuple[int, F64]]]) -> _Search:
    """f of every MLP from the squared row norms of its gate and up."""

    def rows(name: str, part: slice | None) -> F64:
        parts = sorted(norms[name], key=lambda item: item[0])
        squares = np.concatenate([values for _, values in parts])
        lengths: F64 = np.sqrt(squares if part is None else squares[part])
        return lengths

    reach = {
        mlp.down: rows(mlp.gate, mlp.gate_rows) * rows(mlp.up, mlp.up_rows) for mlp in search.mlps
    }
    return replace(search, reach=reach)


# ---------------------------------------------------------------- one tile


def _working(tensor: Tensor) -> Array:
    """[rows, columns] in a dtype the kernels take. Raises InputError for a NaN or an infinity."""
    values = np.ascontiguousarray(tensor.source)
    if values.dtype.name not in ("float32", "float16", "bfloat16"):
        values = values.astype(np.float32)
    bad = kernels.finite_index(values)
    if bad >= 0:
        row, column = divmod(bad, values.shape[1])
        raise InputError(
            f"tensor {show(tensor.info.name)}: the weight at row {tensor.first_row + row}, column "
            f"{column} is {float(tensor.source[row, column])}",
            hint="such weights cannot be ranked: repair the checkpoint, or ignore this tensor",
        )
    return values


def _squared_norms(tensor: Tensor) -> F64:
    """float64 [rows]: squared norms of the rows of a tile."""
    values = _working(tensor)
    norms = np.empty(values.shape[0], np.float64)
    with np.errstate(over="ignore"):
        kernels.squared_norms(values, norms)
    if not np.isfinite(norms).all():  # squares beyond float32
        norms = (values.astype(np.float64) ** 2).sum(1)
    return norms


def _columns(tensor: Tensor, reach: F64, places: Sequence[tuple[int, int]]) -> _Columns:
    """What a tile of a down projection adds."""
    values = _working(tensor)
    rows, width = values.shape
    squares, largest = np.zeros(width), np.zeros(width)
    largest_row = np.full(width, tensor.first_row, np.int64)
    none = np.empty(0, np.float64)
    empty = _Top(none, none.astype(np.int64), none.astype(np.int64), none)
    by_score, by_magnitude = empty, empty
    step = max(1, _BLOCK // max(1, width))
    for start in range(0, rows, step):
        block = values[start : start + step].astype(np.float32)
        sizes = np.abs(block)
        peaks = sizes.max(0).astype(np.float64)
        squares += _column_squares(block)
        first = tensor.first_row + start
        larger = np.flatnonzero(peaks > largest)
        largest_row[larger] = first + sizes[:, larger].argmax(0)
        largest[larger] = peaks[larger]
        by_score = _enter(by_score, block, sizes, peaks, reach, first)
        by_magnitude = _enter(by_magnitude, block, sizes, peaks, np.ones_like(reach), first)
    stop = tensor.first_row + rows
    named = {
        (row, column): float(tensor.source[row - tensor.first_row, column])
        for row, column in places
        if tensor.first_row <= row < stop
    }
    return _Columns(rows, squares, largest, largest_row, by_score, by_magnitude, named)


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


# ---------------------------------------------------------------- small things


def _parse(text: str) -> tuple[int | str, int, int]:
    """`layer:row:column` or `tensor:row:column`. Raises UsageError."""
    match = re.fullmatch(r"(.+):([0-9]{1,12}):([0-9]{1,12})", str(text).strip())
    if match is None:
        raise UsageError(
            f"super-weights: coordinate {show(str(text))} is not layer:row:column "
            "or tensor:row:column",
            hint="e.g. 2:3968:7003 or model.layers.2.mlp.down_proj.weight:3968:7003",
        )
    where = match[1].strip()
    layer = int(where) if re.fullmatch(r"[0-9]{1,6}", where) else where
    return layer, int(match[2]), int(match[3])


def _layer_of(name: str) -> int:
    """The first number in a name, -1 without one."""
    match = re.search(r"(?:^|\.)([0-9]+)\.", name)
    return int(match[1]) if match else -1


def _shape(infos: Sequence[TensorInfo], name: str) -> tuple[int, int]:
    return next(info.matrix_shape for info in infos if info.name == name)


def _plain(entry: Entry) -> dict[str, Any]:
    """An entry as JSON types, measurements rounded for reading."""
    return {
        "tensor": entry.tensor,
        "layer": entry.layer,
        "row": entry.row,
        "column": entry.column,
        "value": entry.value,
        "score": None if entry.score is None else round(entry.score, 3),
        "ratio": None if entry.ratio is None else round(entry.ratio, 3),
        "rank": entry.rank,
        "confidence": entry.confidence,
    }
