"""What a run cost: one JSON document, its metrics for gates, and a table for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress import __version__
from compress.calibrate.on_the_way import describe
from compress.checkpoint.writer import nbytes_of
from compress.errors import show
from compress.evaluate.show import print_figures
from compress.layout import Layout, specs_of
from compress.plan import Plan
from compress.recipe import Gate, failed_gates
from compress.tiles import TensorPlan
from compress.work import Sums

if TYPE_CHECKING:
    from compress.export_onnx.export import Exported

# A plain rounding whose error is lower by more than this share wins; less is a draw.
_MARGIN = 0.01


@dataclass(frozen=True)
class Report:
    """The document and the metrics that gates read."""

    body: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        """Metric name -> value: what the run itself tells, and what an evaluation computed."""
        totals = self.body["totals"]
        evaluation = self.body["evaluation"]
        evaluated: dict[str, float] = {} if evaluation is None else evaluation["metrics"]
        return evaluated | {
            "relative_error": totals["relative_error"],
            "max_relative_error": totals["max_relative_error"],
            "bytes": float(totals["bytes_after"]),
            "bits_per_weight": totals["bits_per_weight"],
            "bits_per_weight_total": totals["bits_per_weight_total"],
            "sparsity": totals["sparsity"],
        }

    def failed(self, gates: tuple[Gate, ...]) -> list[str]:
        """One line for every gate that fails."""
        return failed_gates(gates, self.metrics)

    def to_json(self) -> bytes:
        """The document as JSON (no NaN: a figure that does not exist is null)."""
        return (json.dumps(without_nan(self.body), indent=1) + "\n").encode()


def row(plan: Plan, tensor: TensorPlan, sums: Sums) -> dict[str, Any]:
    """One tensor's line: bytes, bits, sparsity, errors, seconds."""
    info = tensor.info
    after = sum(nbytes_of(s.dtype, s.shape) for s in specs_of(tensor, plan.format))
    plain = _ratio(sums.plain_squared_error, sums.plain_squared_norm)
    codes = tensor.terms.codes
    return {
        "name": info.name,
        "role": info.role.value,
        "dtype": info.dtype,
        "shape": list(info.shape),
        "passes": list(tensor.terms.passes),
        "changed": tensor.terms.changed,
        "estimated": tensor.terms.values,
        "cast": tensor.cast,
        "bits": codes.bits if codes is not None else None,
        "group_size": codes.group_size if codes is not None else None,
        "rank": tensor.terms.rank,
        "outliers": tensor.terms.outliers[1],
        "bytes_before": info.nbytes,
        "bytes_after": after,
        "bits_per_weight": 8 * after / info.size if info.size else 0.0,
        "sparsity": 1 - sums.nonzeros / info.size if info.size else 0.0,
        "relative_error": _ratio(sums.squared_error, sums.squared_norm),
        "plain_relative_error": plain if sums.plain else None,
        "plain": sums.plain or None,
        "output_error": _outputs(sums, sums.outputs.squared_error),
        "plain_output_error": _outputs(sums, sums.outputs.plain_squared_error)
        if sums.plain
        else None,
        "seconds": round(sums.seconds, 6),
        "cast_relative_error": _ratio(sums.cast_squared_error, sums.cast_squared_norm),
        "squared_error": sums.squared_error,
        "squared_norm": sums.squared_norm,
        "extra": sums.extra,
    }


def _outputs(sums: Sums, squared_error: float | None) -> float | None:
    """Relative error of the layer's outputs, where calibration knows its inputs."""
    norm = sums.outputs.squared_norm
    return _ratio(squared_error, norm) if norm > 0 and squared_error is not None else None


def build(
    plan: Plan,
    layout: Layout,
    rows: list[dict[str, Any]],
    *,
    seconds: float,
    peak_memory: int,
    evaluation: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
    exported: Exported | None = None,
) -> Report:
    """The whole document of a finished run; `warnings` beside those of the plan."""
    changed = [r for r in rows if r["changed"]]
    size = {t.info.name: t.info.size for t in plan.tensors}
    targeted = sum(size[r["name"]] for r in changed)
    every = sum(t.info.size for t in plan.tensors if t.info.is_float)
    source_files = sum(t.info.nbytes for t in plan.tensors)
    error = sum(r["squared_error"] for r in changed)
    norm = sum(r["squared_norm"] for r in changed)
    zeros = sum(r["sparsity"] * size[r["name"]] for r in changed)
    totals = {
        "bytes_before": plan.bytes_before,
        "bytes_after": layout.nbytes + (0 if exported is None else exported.nbytes),
        "weight_bytes_before": source_files,
        "weight_bytes_after": layout.weight_bytes,
        "bits_per_weight": 8 * sum(r["bytes_after"] for r in changed) / max(1, targeted),
        "bits_per_weight_total": 8 * layout.weight_bytes / max(1, every),
        "weights_targeted": targeted,
        "weights": every,
        "sparsity": zeros / max(1, targeted),
        "relative_error": _ratio(error, norm),
        "max_relative_error": max((r["relative_error"] for r in changed), default=0.0),
        "cast_relative_error": max((r["cast_relative_error"] for r in rows), default=0.0),
        "plain_relative_error": _plain_total(changed),
        "output_error": _output_total(changed),
        "seconds": round(seconds, 3),
        "peak_memory": peak_memory,
    }
    return Report(
        {
            "report_version": 1,
            "tool": {"name": "compress-checkpoints", "version": __version__},
            "format": plan.format.name,
            "format_reason": plan.format_reason,
            "calibration": None if plan.statistics is None else describe(plan.statistics),
            "passes": [{"name": p.name, "facts": p.facts()} for p in plan.passes],
            "totals": totals,
            "verdict": _verdict(plan, totals, changed),
            "notes": [*plan.notes, *_format_notes(plan)],
            "warnings": [*plan.warnings, *warnings],
            "evaluation": evaluation,
            "onnx": None if exported is None else dict(exported.section),
            "left_alone": [_left_alone(i) for i in plan.left_alone],
            "files": layout.sizes() | ({} if exported is None else exported.sizes),
            "tensors": rows,
        }
    )


def print_report(report: Report, console: Console, *, limit: int = 12) -> None:
    """The report as a table: the tensors with the largest error, the totals, the verdict."""
    body, totals = report.body, report.body["totals"]
    changed = [r for r in body["tensors"] if r["changed"]]
    # Where calibration knows the inputs, what happens to the outputs is what counts.
    by_outputs = bool(changed) and all(r["output_error"] is not None for r in changed)
    error, plain = (
        ("output_error", "plain_output_error")
        if by_outputs
        else ("relative_error", "plain_relative_error")
    )
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="ellipsis", no_wrap=True, ratio=1)
    for heading in ("bytes", "bits/w", "zeros", "out err" if by_outputs else "error", "plain"):
        table.add_column(heading, justify="right", no_wrap=True)
    worst = sorted(changed, key=lambda r: (not math.isnan(r[error]), -r[error]))[:limit]
    for r in worst:
        table.add_row(
            Text(show(r["name"], 48)),
            human(r["bytes_after"]),
            f"{r['bits_per_weight']:.2f}",
            f"{r['sparsity']:.0%}",
            _error(r[error]),
            _error(r[plain]),
        )
    if changed:
        shown = "all" if len(worst) == len(changed) else f"the {len(worst)} largest errors of"
        console.print(Text(f"{shown} {len(changed)} changed tensors", style="bold"))
        console.print(table)
    for one in body["passes"]:
        _print_facts(one["name"], one["facts"], console)
    ratio = totals["bytes_before"] / max(1, totals["bytes_after"])
    console.print(
        Text(
            f"size {human(totals['bytes_before'])} -> {human(totals['bytes_after'])} "
            f"({ratio:.2f}x smaller), {totals['bits_per_weight']:.2f} bits a targeted weight, "
            f"{totals['bits_per_weight_total']:.2f} over all, format {body['format']}",
            style="bold",
        )
    )
    console.print(
        Text(
            f"relative error {_error(totals['relative_error'])}, largest in one tensor "
            f"{_error(totals['max_relative_error'])}, zeros {totals['sparsity']:.1%}, "
            f"{totals['seconds']:.1f} s, peak memory {human(totals['peak_memory'])}"
        )
    )
    if body["evaluation"] is not None:
        print_figures(body["evaluation"], console)
    if body["onnx"] is not None:
        from compress.export_onnx.show import lines_of

        for line in lines_of(body["onnx"]):
            console.print(Text(line))
    console.print(Text(body["verdict"]))
    for note in body["notes"]:
        console.print(Text(f"note: {note}"))
    for warning in body["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"))


def _error(value: float | None) -> str:
    """Four places, or a dash: nothing to compare with, or squares beyond float32."""
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def human(nbytes: float) -> str:
    """Bytes in decimal units with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    raise AssertionError  # the loop always returns


def _verdict(plan: Plan, totals: Mapping[str, Any], changed: list[dict[str, Any]]) -> str:
    """Did the result beat plain rounding at the same bytes? In one sentence."""
    if not changed and any(t.terms.values for t in plan.tensors):
        return "verdict: vectors were estimated anew, which saves no bytes"
    if not changed:
        return "verdict: nothing to change: the weights are as they were"
    compared = [r for r in changed if r["plain_relative_error"] is not None]
    if not compared:
        return "no plain rounding has the same bytes: nothing to compare with"
    # Where calibration knows the inputs, the outputs are what counts.
    by_outputs = all(r["plain_output_error"] is not None for r in compared)
    own, other = (
        ("output_error", "plain_output_error")
        if by_outputs
        else ("relative_error", "plain_relative_error")
    )
    weights = [1.0 if by_outputs else r["squared_norm"] for r in compared]
    ours, plain = (
        _ratio(sum(w * r[key] ** 2 for w, r in zip(weights, compared, strict=True)), sum(weights))
        for key in (own, other)
    )
    if math.isnan(ours) or math.isnan(plain):
        return "verdict: squares of these weights lie beyond float32: no error can be compared"
    loses = sum(r[own] > (1 + _MARGIN) * r[other] for r in compared)
    what = "relative error of the outputs" if by_outputs else "relative error"
    figures = f"{what} {ours:.4f} against {plain:.4f} of plain rounding at the same bytes"
    if ours <= plain * (1 + _MARGIN):
        better = (
            f", {1 - ours / plain:.1%} lower" if plain > 0 and ours < plain * (1 - _MARGIN) else ""
        )
        return f"verdict: {figures}{better}"
    blame = "the low-rank residual loses to" if any(r["rank"] for r in compared) else "loses to"
    zeros = any(t.terms.nonzeros is not None for t in plan.tensors)
    why = " (pruning costs more than it saves here)" if zeros else ""
    return (
        f"verdict: {blame} spending the bytes on bits: {figures}, worse in {loses} of "
        f"{len(compared)} tensors{why}"
    )


def _plain_total(changed: list[dict[str, Any]]) -> float | None:
    """Plain rounding's relative error over the tensors that could be compared."""
    compared = [r for r in changed if r["plain_relative_error"] is not None]
    if not compared:
        return None
    error = sum(r["plain_relative_error"] ** 2 * r["squared_norm"] for r in compared)
    return _ratio(error, sum(r["squared_norm"] for r in compared))


def _output_total(changed: list[dict[str, Any]]) -> float | None:
    """Root mean square of the layers' relative output errors; None without a calibration."""
    known = [r["output_error"] for r in changed if r["output_error"] is not None]
    return math.sqrt(sum(e * e for e in known) / len(known)) if known else None


def _format_notes(plan: Plan) -> list[str]:
    notes = [f"format {plan.format.name}: {plan.format_reason}"]
    notes += plan.format.notes([t.terms for t in plan.tensors], [t.info for t in plan.tensors])
    return notes


def _left_alone(info: Any) -> dict[str, Any]:
    return {"name": info.name, "role": info.role.value, "bytes": info.nbytes}


def _ratio(error: float, norm: float) -> float:
    if norm > 0:
        return math.sqrt(error / norm)
    return 0.0 if error == 0 else math.inf


def _print_facts(name: str, facts: Mapping[str, Any], console: Console) -> None:
    """What a pass found: its figures on one line, each entry of a list on a line of its own."""
    plain = {k: v for k, v in facts.items() if isinstance(v, int | float | str)}
    if plain:
        console.print(Text(f"{name}: " + ", ".join(f"{k} {_fact(v)}" for k, v in plain.items())))
    for key, value in facts.items():
        for item in value if isinstance(value, list) else []:
            words = item.items() if isinstance(item, dict) else [(key, item)]
            console.print(Text(f"{name}:   " + ", ".join(f"{k} {_fact(v)}" for k, v in words)))


def _fact(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else show(str(value), 120)


def without_nan(value: Any) -> Any:
    """JSON types with null for every number that JSON cannot write."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return value
