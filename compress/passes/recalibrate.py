"""`recalibrate`: norms and biases set so that a compressed model's channels are as they were.

Pruned and rounded weights move the mean and the spread of what a layer gives. BatchNorm's gain and
bias, the biases of layers and the gains of norms can undo that, in closed form and at no cost in
bytes. Corrections go from the first layer to the last, each made with those before it in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from compress.calibrate.statistics import INPUTS
from compress.errors import UsageError, show
from compress.passes.base import Outlook, Pass, Terms, option
from compress.tensor import Array, Role, Tensor, TensorInfo

_KINDS = {
    "bn": "BatchNorm with gain and bias",
    "bias": "layer with a bias",
    "scale": "norm with a gain and no bias",
}
_LISTED = 12


@dataclass(frozen=True)
class Recalibrate(Pass):
    """Correct norms and biases, layer by layer, against the dense model's outputs."""

    name: ClassVar[str] = "recalibrate"
    writes: ClassVar[str] = "values"
    roles: ClassVar[frozenset[Role]] = frozenset({Role.NORM, Role.BIAS, Role.STATE})

    what: tuple[str, ...] = option(
        ("bn", "bias", "scale"),
        "of BatchNorms, biases of layers, gains of norms without a bias: those that there are",
    )
    bn: str = option(
        "match",
        "match: the dense model's mean and deviation; estimate: running statistics anew",
        choices=("match", "estimate"),
    )
    samples: int = option(
        200, "inputs at most, from all over them; a fifth is kept apart to judge by", low=2
    )
    gate: bool = option(True, "keep only what lowers the output error on the inputs kept apart")

    outlook: Outlook | None = field(default=None, repr=False, compare=False)
    made: Mapping[str, Array] | None = field(default=None, repr=False, compare=False)
    found: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    def validate(self) -> None:
        """Raises UsageError for an unknown or missing word of `what`."""
        for word in self.what:
            if word not in _KINDS:
                raise UsageError(
                    f"recalibrate: what: unknown value {show(word)}",
                    hint=f"of {', '.join(_KINDS)}, e.g. what=[bn,bias]",
                )
        if not self.what:
            raise UsageError("recalibrate: what: nothing named", hint=f"of {', '.join(_KINDS)}")

    @property
    def needs(self) -> frozenset[str]:
        """The inputs themselves: the model is run on them."""
        return frozenset({INPUTS})

    def predict(self, info: TensorInfo, terms: Terms) -> Terms:
        """Other values, no other bytes; once decided, only where something changed."""
        return replace(terms, values=self.made is None or info.name in self.made)

    @property
    def wants_survey(self) -> bool:
        """Until it has decided."""
        return self.made is None

    def surveys(self, info: TensorInfo) -> bool:
        """It reads the model whole, as its engine does, and no tile."""
        return False

    def survey_bytes(self, infos: list[TensorInfo]) -> int:
        """None of the targets' own."""
        return 0

    def foresee(self, outlook: Outlook) -> Recalibrate:
        """Keep what the model is run with."""
        return replace(self, outlook=outlook)

    def decide(self, statistic: Any, infos: list[TensorInfo]) -> Recalibrate:
        """The pass with its vectors. Raises UsageError where no engine runs the model."""
        outlook = self.outlook
        if outlook is None or outlook.statistics is None:
            raise RuntimeError("recalibrate: decide before foresee")
        idle = replace(self, outlook=None, made={}, found={})
        outcome = _run(self, outlook, idle, {info.name: info for info in infos})
        if outcome is None:
            return replace(idle, found=_nothing("the weights are the dense model's own"))
        values, facts = outcome
        return replace(idle, made=values, found=facts)

    def apply(self, tensor: Tensor) -> Tensor:
        """The tensor with its new values, where it has some."""
        if self.made is None:
            raise RuntimeError("recalibrate: apply before decide")
        values = self.made.get(tensor.info.name)
        return tensor if values is None else tensor.with_(values=tensor.info.to_matrix(values))

    def facts(self) -> dict[str, Any]:
        """Layers and tensors corrected, errors before and after, what was turned down."""
        return dict(self.found or {})


def _run(
    one: Recalibrate, outlook: Outlook, idle: Recalibrate, allowed: Mapping[str, TensorInfo]
) -> tuple[dict[str, Array], dict[str, Any]] | None:
    """New values and facts; None where the trial equals the source."""
    from compress.engines.corrections import Settings
    from compress.engines.side_by_side import correct_blocks, correct_module

    if outlook.statistics is None:
        return None
    trial = outlook.trial(idle)
    if all(
        np.array_equal(_bits(trial.read(info)), _bits(outlook.source.read(info)))
        for info in outlook.source.infos()
        if info.is_float
    ):
        return None
    settings = Settings(frozenset(one.what), one.bn == "estimate", one.gate)
    inputs = _spread(outlook.statistics.inputs(), one.samples)
    if outlook.module is not None:
        outcome = correct_module(outlook.module, outlook.source, trial, inputs, allowed, settings)
    else:
        outcome = correct_blocks(outlook.source, trial, inputs, allowed, settings)
    values = outcome.values
    worse = not outcome.after < outcome.before
    if worse and one.gate:
        values = {}
    kept = [j for j in outcome.judged if j.kept]
    rejected = [j for j in outcome.judged if not j.kept]
    notes = []
    if not outcome.units:
        names = ", no ".join(_KINDS[word] for word in one.what)
        notes.append(f"nothing to correct: the model has no {names}")
    elif not outcome.judged:
        notes.append("nothing to correct: no layer differs from the dense model's")
    elif worse and one.gate:
        notes.append("all corrections dropped: together they do not help the model's output")
    facts = {
        "layers": outcome.units,
        "corrected": len(kept) if values else 0,
        "rejected": len(rejected),
        "tensors_changed": len(values),
        "output_error_before": outcome.before,
        "output_error_after": outcome.after if values else outcome.before,
        "samples": outcome.learned,
        "held_out": outcome.held,
        "turned_down": [
            {"layer": j.unit, "before": j.before, "after": j.after} for j in rejected[:_LISTED]
        ],
        "notes": notes,
    }
    return values, facts


def _spread(inputs: Mapping[str, Array], samples: int) -> dict[str, Array]:
    """At most that many samples from all over the inputs, which may be sorted by class."""
    total = len(next(iter(inputs.values())))
    taken = min(samples, total)
    numbers = np.arange(taken) * total // taken
    return {name: values[numbers] for name, values in inputs.items() if name != "labels"}


def _bits(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _nothing(why: str) -> dict[str, Any]:
    return {"tensors_changed": 0, "notes": [f"nothing to correct: {why}"]}
