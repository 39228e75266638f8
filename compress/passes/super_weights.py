"""`super-weights`: find the few weights a language model cannot lose, and keep them exactly.

A super weight (Yu et al., arXiv 2411.07191) sits in an early down projection: one intermediate
neuron fires on the first token and writes one enormous value into the residual stream, through
one or a few entries of one column. Detection needs no data: three sweeps over the weights find the
gated MLPs, the norms of the rows of gate and up, and what stands out in down. The rule and its
constants: `compress.solvers.massive_columns`. Published and named places are kept as well.

With a calibration's text they are found by running the model, in any MLP, gated or not:
`compress.solvers.massive_activations` decides by the massive activations themselves. `auto` keeps
what either finds; an entry's confidence says which did.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from compress import kernels
from compress.errors import InputError, UsageError, show
from compress.passes.base import Context, Outlook, Pass, Terms, option
from compress.passes.forward_super_weights import INPUTS, can_run, check_effect, find
from compress.passes.published_super_weights import candidates
from compress.passes.super_weight_entries import (
    FORWARD,
    NAMED,
    PUBLISHED,
    SCORE,
    Entry,
    layer_of,
    parse,
    plain,
)
from compress.roles import GatedMlp, gated_mlps
from compress.solvers import massive_columns
from compress.solvers.massive_columns import F64, Columns, Layer
from compress.tensor import Array, Outliers, Role, Tensor, TensorInfo

PUBLISHED_RANK = 64  # a published place must hold one of this many largest scores or weights

# Last parts of the names a gated MLP's down projection goes by: for estimates before the headers
# were looked at together. What is searched is decided by `gated_mlps`.
_DOWN = re.compile(r"(?:^|.*\.)(?:down_proj|down|w2|wo|Wo)(?:\.weight)?")
_PLAIN_DOWN = re.compile(
    r"(?:^|.*\.)(?:fc2|mlp\.c_proj|dense_4h_to_h|output\.dense|down_proj|fc_out|lin2|linear2"
    r"|ffn_output)(?:\.weight)?"
)


@dataclass(frozen=True)
class _Search:
    """Where a search stands: the MLPs, the places named by hand, and f once it is known."""

    mlps: tuple[GatedMlp, ...]
    named: Mapping[str, tuple[tuple[int, int], ...]]
    reach: Mapping[str, F64] | None = None  # down projection -> f, float64 [columns]
    forward: tuple[Entry, ...] = ()  # what running the model found
    report: Mapping[str, Any] = field(default_factory=dict)  # on running the model


@dataclass(frozen=True)
class SuperWeights(Pass):
    """Keep the few weights that cause massive activations exactly."""

    name: ClassVar[str] = "super-weights"
    writes: ClassVar[str] = "outliers"
    roles: ClassVar[frozenset[Role]] = frozenset({Role.LINEAR, Role.CONV1D})

    method: str = option(
        "auto",
        "how to find them: score (from weights alone), forward (by running the model on calibration"
        " text), named (only coordinates), auto (score, and forward where there is a calibration)",
        choices=("auto", "score", "forward", "named"),
    )
    coordinates: tuple[str, ...] = option(
        (), "protect these as well: layer:row:column of a down projection, or tensor:row:column"
    )
    max_per_layer: int = option(8, "accept at most this many of a layer", low=1, high=64)
    published: bool = option(
        True, "with score, also take published coordinates whose weight stands out"
    )
    causal: bool = option(
        False,
        "report what zeroing all that was found does to the output (KL), beside as many drawn from"
        " the 100 largest of the same tensors; needs a calibration",
    )

    # Written by `bind` and `decide`.
    in_scale: bool = field(default=False, repr=False, compare=False)
    search: _Search | None = field(default=None, repr=False, compare=False)
    entries: tuple[Entry, ...] | None = field(default=None, repr=False, compare=False)
    found: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)
    outlook: Outlook | None = field(default=None, repr=False, compare=False)

    # ------------------------------------------------------------ before any work

    def validate(self) -> None:
        """Raises UsageError for a malformed coordinate, or a method that needs some."""
        for text in self.coordinates:
            parse(text)
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
            where, row, column = parse(text)
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

    def bind(self, info: TensorInfo, earlier: Sequence[Pass], context: Context) -> SuperWeights:
        """Inside its group's scale where the base must be usable on its own."""
        return replace(self, in_scale=context.base_stands_alone)

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
        gated, plain_ = _DOWN.fullmatch(info.name), _PLAIN_DOWN.fullmatch(info.name)
        if (gated and self.method != "named") or (plain_ and self.method in ("auto", "forward")):
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
    def needs(self) -> frozenset[str]:
        """The text itself, to run the model on."""
        return frozenset({INPUTS}) if self.method == "forward" or self.causal else frozenset()

    @property
    def welcomes(self) -> frozenset[str]:
        """The text, where there is any."""
        return frozenset({INPUTS}) if self.method == "auto" else frozenset()

    @property
    def wants_survey(self) -> bool:
        """Three sweeps: find the MLPs (nothing is read), norms of gate and up, scores of down.

        By running the model, the first is all.
        """
        return self.entries is None

    def survey_bytes(self, infos: list[TensorInfo]) -> int:
        """Every gate, up and down projection once."""
        if self.method in ("forward", "named"):
            return 0
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
        """Squared row norms of a gate or up tile, or `Columns` of a down tile.

        Raises InputError for a NaN or an infinity.
        """
        search, name = self.search, tensor.info.name
        if search is None or not self.surveys(tensor.info):
            return None
        if search.reach is None:
            return {name: [(tensor.first_row, massive_columns.squared_norms(_working(tensor)))]}
        values, first = _working(tensor), tensor.first_row
        named = {
            (row, column): float(tensor.source[row - first, column])
            for row, column in search.named.get(name, ())
            if first <= row < first + values.shape[0]
        }
        return {name: massive_columns.tile_columns(values, first, search.reach[name], named)}

    def merge(self, a: Any, b: Any) -> Any:
        """Join statistics of different tensors, and of rows of one tensor in order."""
        if a is None or b is None:
            return b if a is None else a
        joined = dict(a)
        for name, later in b.items():
            if name not in joined:
                joined[name] = later
            elif isinstance(later, Columns):
                joined[name] = joined[name].with_(later)
            else:
                joined[name] = joined[name] + later
        return joined

    def foresee(self, outlook: Outlook) -> SuperWeights:
        """Keep the outlook where the model may be run."""
        return replace(self, outlook=outlook) if self.needs | self.welcomes else self

    def decide(self, statistic: Any, infos: list[TensorInfo]) -> SuperWeights:
        """The pass for the next sweep, or with its entries."""
        if self.search is None:
            return self._start(infos)
        if self.search.reach is None:
            norms, rows = statistic or {}, massive_columns.row_norms
            reach = {
                mlp.down: rows(norms[mlp.gate], mlp.gate_rows) * rows(norms[mlp.up], mlp.up_rows)
                for mlp in self.search.mlps
            }
            return replace(self, search=replace(self.search, reach=reach))
        return self._accept(self.search, statistic or {}, infos)

    def _start(self, infos: Sequence[TensorInfo]) -> SuperWeights:
        mlps = gated_mlps(infos)
        named = self._resolve(infos, mlps)
        forward: tuple[Entry, ...] = ()
        report: dict[str, Any] = {}
        if self.method == "forward":
            forward, report = find(self.outlook, infos, self.max_per_layer)
        elif self.method == "auto" and can_run(self.outlook):
            try:
                forward, report = find(self.outlook, infos, self.max_per_layer)
            except UsageError as error:  # no stack of blocks, or another engine's model
                report = {"not_run": error.message}
        searched = () if self.method in ("named", "forward") else tuple(mlps)
        started = replace(self, search=_Search(searched, named, forward=forward, report=report))
        if searched:
            return started
        layers = {mlp.down: mlp.layer for mlp in mlps}
        found = {entry.key: entry for entry in forward}
        for name, places in named.items():
            for row, column in places:
                one = Entry(name, layers.get(name, layer_of(name)), row, column, NAMED)
                known = found.get(one.key)
                found[one.key] = one if known is None else replace(known, confidence=NAMED)
        facts: dict[str, Any] = {"layers_searched": 0}
        if not forward:
            facts["reason"] = report.get("reason") or (
                "only named coordinates" if self.method == "named" else "no gated MLP"
            )
        return started._decided(list(found.values()), facts, infos)

    def _accept(
        self, search: _Search, statistic: Mapping[str, Columns], infos: Sequence[TensorInfo]
    ) -> SuperWeights:
        """Judge every layer against itself and the others."""
        layers = [
            _Judged(mlp, Layer.of(statistic[mlp.down], search.reach[mlp.down]))
            for mlp in search.mlps
            if search.reach is not None and mlp.down in statistic
        ]
        background = float(np.median([one.layer.background for one in layers])) if layers else 0.0
        by_down = {one.mlp.down: one for one in layers}
        by_forward = {entry.key: entry for entry in search.forward}
        found = dict(by_forward)
        for entry in search.forward:
            if entry.tensor in by_down:
                known = by_down[entry.tensor].entry(entry.row, entry.column, FORWARD)
                found[entry.key] = replace(known, value=entry.value).with_forward(entry)
        counts = Counter(entry.tensor for entry in search.forward)
        for one in layers:
            for row, column in one.layer.accepted(background, self.max_per_layer):
                entry = one.entry(row, column, SCORE)
                if entry.key in by_forward:
                    found[entry.key] = entry.with_forward(by_forward[entry.key])
                elif counts[entry.tensor] < self.max_per_layer:
                    counts[entry.tensor] += 1
                    found[entry.key] = entry
        if self.published:
            for entry in _published(layers):
                if entry.key not in by_forward:
                    found[entry.key] = entry
        for name, places in search.named.items():
            for row, column in places:
                one_layer = by_down.get(name)
                found[name, row, column] = (
                    Entry(name, layer_of(name), row, column, NAMED)
                    if one_layer is None
                    else one_layer.entry(row, column, NAMED)
                )
        report: dict[str, Any] = {"layers_searched": len(layers)}
        if not found:
            report["reason"] = "no weight stands out of its column, its layer and the other layers"
        strongest = max(layers, key=lambda one: one.layer.ratios.max(initial=0.0), default=None)
        place = None if strongest is None else strongest.layer.strongest()
        if strongest is not None and place is not None:
            entry = strongest.entry(*place, SCORE)
            report["strongest"] = plain(replace(entry, confidence="not accepted")) | {
                "accepted": (entry.tensor, *place) in found,
                "ratio_asked": massive_columns.MIN_OWN_RATIO,
                "score_asked": massive_columns.MIN_SCORE,
            }
            del report["strongest"]["confidence"]
        return self._decided(list(found.values()), report, infos)

    def _decided(
        self, entries: Sequence[Entry], report: dict[str, Any], infos: Sequence[TensorInfo]
    ) -> SuperWeights:
        ordered = tuple(sorted(entries, key=lambda e: (e.layer, e.tensor, e.row, e.column)))
        report = {"found": len(ordered), **report, "entries": [plain(e) for e in ordered]}
        if self.search is not None and self.search.report:
            report["forward"] = dict(self.search.report)
        if self.causal and ordered:
            report["causal"] = check_effect(self.outlook, infos, ordered)
        return replace(self, search=None, outlook=None, entries=ordered, found=report)

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
class _Judged:
    """A gated MLP and what was measured of its down projection."""

    mlp: GatedMlp
    layer: Layer

    def entry(self, row: int, column: int, confidence: str) -> Entry:
        """An entry with what is known of it."""
        known = vars(self.layer.measured(row, column))
        return Entry(self.mlp.down, self.mlp.layer, row, column, confidence, **known)


def _published(layers: Sequence[_Judged]) -> list[Entry]:
    """Published places of models of this shape that hold one of their layer's largest weights."""
    shapes = {(one.layer.columns.rows, one.layer.reach.size) for one in layers}
    if len(shapes) != 1:
        return []
    by_layer = {one.mlp.layer: one for one in layers}
    found = []
    for number, row, column in candidates(len(layers), *shapes.pop()):
        one = by_layer.get(number)
        if one is not None and one.layer.among_largest(row, column, PUBLISHED_RANK):
            found.append(one.entry(row, column, PUBLISHED))
    return found


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
