"""`super-weights` by running the model: between the pass and `compress.calibrate.peaks`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError
from compress.passes.super_weight_entries import FORWARD, Entry
from compress.related import down_projections
from compress.tensor import Array, Role, TensorInfo

if TYPE_CHECKING:
    from compress.checkpoint import Checkpoint
    from compress.passes.base import Outlook

INPUTS = "inputs"  # the kind of statistics; its module is slow to import
_IDS = "inputs/input_ids"


def can_run(outlook: Outlook | None) -> bool:
    """Whether there are token ids to run a model of this checkpoint on."""
    return (
        outlook is not None
        and outlook.statistics is not None
        and outlook.statistics.has_array(_IDS)
        and outlook.module is None
    )


def find(
    outlook: Outlook | None, infos: Sequence[TensorInfo], most: int
) -> tuple[tuple[Entry, ...], dict[str, Any]]:
    """Entries of the down projections among `infos`, at most `most` of one, and a report.

    Raises UsageError where the model cannot be run (no inputs, no single stack of blocks).
    """
    layers = down_projections(infos)
    downs = [info for info in infos if info.name in layers]
    if not downs:
        return (), {"reason": "no MLP's second matrix among the targets"}
    source, inputs = _given(outlook)
    from compress.calibrate.peaks import find_by_forward

    found = find_by_forward(source, inputs, downs, most)
    by_name = {info.name: info for info in downs}
    entries = tuple(
        Entry(
            cause.tensor, layers[cause.tensor], cause.row, cause.column, FORWARD,
            value=_value(source, by_name[cause.tensor], cause.row, cause.column),
            share=cause.share, persistence=cause.persistence, activation_ratio=cause.ratio,
            round=number,
        )
        for cause, number in found.causes
    )  # fmt: skip
    report: dict[str, Any] = {"rounds": found.rounds, "tokens": found.tokens}
    if found.unexplained:
        report["other_channels"] = [
            {**asdict(one), "ratio": round(one.ratio, 1)} for one in found.unexplained[:8]
        ]
    if not entries:
        report["reason"] = (
            "no few weights make its massive activations"
            if found.unexplained
            else "no channel is massive through the model"
        )
    return entries, report


def check_effect(
    outlook: Outlook | None, infos: Sequence[TensorInfo], entries: Sequence[Entry]
) -> dict[str, Any]:
    """What zeroing all entries does, beside as many large weights. Raises like `find`."""
    source, inputs = _given(outlook)
    from compress.calibrate.peaks import causal_check

    places: dict[str, list[tuple[int, int]]] = {}
    for entry in entries:
        places.setdefault(entry.tensor, []).append((entry.row, entry.column))
    effect = causal_check(source, inputs, [i for i in infos if i.name in places], places)
    return asdict(effect)


def _given(outlook: Outlook | None) -> tuple[Checkpoint, Mapping[str, Array]]:
    if outlook is None or outlook.statistics is None:
        raise UsageError(
            "super-weights: running the model needs the inputs of a calibration",
            hint="give --text F, or --stats F from compress calibrate; or use method=score",
        )
    if outlook.module is not None:
        raise UsageError(
            "super-weights: a module of your own has no blocks that could be run one by one",
            hint="leave --module out where transformers has the model, or use method=score",
        )
    return outlook.source, outlook.statistics.inputs()


def _value(source: Checkpoint, info: TensorInfo, row: int, column: int) -> float:
    """One weight as stored."""
    first, second = (column, row) if info.role is Role.CONV1D else (row, column)
    return float(source.read(info, first, first + 1)[0, second])
