"""The figures that gates may name, what each of them is computed from, and which way is better."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import UsageError

if TYPE_CHECKING:
    from compress.recipe import Gate

TEXT, PAIRS, IMAGES = "text", "pairs", "images"
LOW, HIGH = "low", "high"


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation.

    kinds      of data that it is computed on; none: it is a figure of the run's own report
    reference  whether it needs a model to compare with
    better     LOW, HIGH, or "" where neither is
    """

    kinds: frozenset[str] = frozenset()
    reference: bool = False
    better: str = ""


def _on(*kinds: str, reference: bool = False, better: str = "") -> Metric:
    return Metric(frozenset(kinds), reference, better)


# The one table: docs/evaluation.md defines each figure.
METRICS: dict[str, Metric] = {
    "relative_error": _on(better=LOW),
    "max_relative_error": _on(better=LOW),
    "bytes": _on(better=LOW),
    "bits_per_weight": _on(better=LOW),
    "bits_per_weight_total": _on(better=LOW),
    "sparsity": _on(better=HIGH),
    "perplexity": _on(TEXT, better=LOW),
    "perplexity_reference": _on(TEXT, reference=True),
    "perplexity_ratio": _on(TEXT, reference=True, better=LOW),
    "kl": _on(TEXT, IMAGES, reference=True, better=LOW),
    "top1_agreement": _on(TEXT, IMAGES, reference=True, better=HIGH),
    "tokens": _on(TEXT),
    "spearman": _on(PAIRS, better=HIGH),
    "spearman_reference": _on(PAIRS, reference=True),
    "spearman_drop": _on(PAIRS, reference=True, better=LOW),
    "cosine": _on(PAIRS, reference=True, better=HIGH),
    "pairs": _on(PAIRS),
    "accuracy": _on(IMAGES, better=HIGH),
    "accuracy_reference": _on(IMAGES, reference=True),
    "accuracy_drop": _on(IMAGES, reference=True, better=LOW),
    "accuracy_drop_error": _on(IMAGES, reference=True),
    "images": _on(IMAGES),
}
# What a sweep compares by, for each kind of data.
QUALITY = {TEXT: "kl", PAIRS: "cosine", IMAGES: "accuracy"}


def report_metrics() -> list[str]:
    """The figures that every run has, without data."""
    return [name for name, metric in METRICS.items() if not metric.kinds]


def evaluated(kind: str | None, *, reference: bool) -> list[str]:
    """The figures that an evaluation on `kind` of data computes; None: no data."""
    return [
        name
        for name, metric in METRICS.items()
        if kind in metric.kinds and (reference or not metric.reference)
    ]


def require(gates: Iterable[Gate], kind: str | None, *, reference: bool, report: bool) -> None:
    """Refuse (UsageError) a gate on a figure that will not be computed, before any work.

    report  whether there is a run's own report, with the figures that need no data
    """
    there = evaluated(kind, reference=reference)
    if report:
        there = [*report_metrics(), *there]
    for gate in gates:
        if gate.metric not in there:
            known = f"computed here: {', '.join(there)}" if there else "nothing is computed here"
            raise UsageError(
                f"gate {gate}: {gate.metric} is not computed: it needs"
                f" {_needs(gate.metric, kind, report=report)}",
                hint=known,
            )


def _needs(name: str, kind: str | None, *, report: bool) -> str:
    """What to give, so that the figure is computed."""
    metric = METRICS[name]
    if not metric.kinds:
        return "a run: it is a figure of the report of compress run"
    if kind in metric.kinds:
        return "--reference"
    prefix = "--eval-" if report else "--"
    order = (TEXT, PAIRS, IMAGES)
    return " or ".join(prefix + one for one in order if one in metric.kinds)
