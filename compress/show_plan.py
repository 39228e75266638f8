"""The plan as JSON and as a page of text."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.errors import show
from compress.plan import Plan, alternatives
from compress.report import human


def plan_body(plan: Plan) -> dict[str, Any]:
    """Everything the plan knows, as JSON types."""
    low, high = plan.layout(0), plan.layout(1)
    every = sum(t.info.size for t in plan.tensors if t.info.is_float)
    return {
        "plan_version": 1,
        "model": str(plan.checkpoint.path),
        "format": plan.format.name,
        "format_reason": plan.format_reason,
        "formats": {
            name: {"refused": weight} if isinstance(weight, str) else list(weight)
            for name, weight in alternatives(plan).items()
        },
        "passes": [
            {"name": p.name, "tensors": len(members), "surveys": p.wants_survey, "facts": p.facts()}
            for p, members in zip(plan.passes, plan.members, strict=True)
        ],
        "bytes_before": plan.bytes_before,
        "bytes": [plan.bytes_range[0], plan.most_bytes],
        "exact": plan.exact,
        "bits_per_weight_total": [
            8 * low.weight_bytes / max(1, every),
            8 * high.weight_bytes / max(1, every),
        ],
        "files": {n: [low.sizes().get(n, 0), b] for n, b in high.sizes().items()},
        "peak_memory": plan.peak_memory,
        "disk": plan.most_bytes,
        "reads": plan.reads,
        "threads": plan.options.workers,
        "tensors": [
            {
                "name": t.info.name,
                "role": t.info.role.value,
                "dtype": t.info.dtype,
                "shape": list(t.info.shape),
                "passes": list(t.terms.passes),
                "bits": t.terms.codes.bits if t.terms.codes else None,
                "group_size": t.terms.codes.group_size if t.terms.codes else None,
                "rank": t.terms.rank,
            }
            for t in plan.tensors
        ],
        "left_alone": [
            {"name": i.name, "role": i.role.value, "bytes": i.nbytes} for i in plan.left_alone
        ],
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
    }


def print_plan(body: dict[str, Any], console: Console) -> None:
    """The plan for people: passes, formats side by side, bytes, memory, what is left alone."""
    for one in body["passes"]:
        sweep = ", after a survey of the weights" if one["surveys"] else ""
        console.print(Text(f"{one['name']}: {one['tensors']} tensors{sweep}", style="bold"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("format")
    table.add_column("bytes", justify="right")
    table.add_column("", overflow="fold")
    for name, weight in body["formats"].items():
        chosen = name == body["format"]
        if isinstance(weight, dict):
            table.add_row(name, "-", Text(f"cannot hold it: {weight['refused']}"))
        else:
            why = Text(f"chosen: {body['format_reason']}") if chosen else Text("")
            table.add_row(name, _range(weight), why, style="bold" if chosen else None)
    console.print(table)
    total = body["bits_per_weight_total"]
    bits = f"{total[0]:.3f}" if total[0] == total[1] else f"{total[0]:.3f} to {total[1]:.3f}"
    how = "exactly" if body["exact"] else "a range; --survey makes it exact"
    console.print(
        Text(
            f"size {human(body['bytes_before'])} -> {_range(body['bytes'])} bytes ({how}; the "
            f"manifest and the report come on top), {bits} bits a weight over all",
            style="bold",
        )
    )
    if body.get("onnx_bytes") is not None:
        console.print(Text(f"model.onnx and its data: {_range(body['onnx_bytes'])} bytes more"))
    console.print(
        Text(
            f"peak memory at most {human(body['peak_memory'])}, disk {human(body['disk'])}, "
            f"reads {human(body['reads'])}, {body['threads']} threads"
        )
    )
    _print_left_alone(body, console)
    for note in body["notes"]:
        console.print(Text(f"note: {note}"))
    for warning in body["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"))


def _print_left_alone(body: dict[str, Any], console: Console) -> None:
    alone = body["left_alone"]
    if not alone:
        return
    nbytes = sum(a["bytes"] for a in alone)
    kinds = ", ".join(f"{n} {role}" for role, n in Counter(a["role"] for a in alone).most_common())
    share = nbytes / max(1, body["bytes_before"])
    console.print(
        Text(f"left alone: {len(alone)} matrices ({kinds}), {human(nbytes)}, {share:.0%} of it all")
    )
    for one in sorted(alone, key=lambda a: -a["bytes"])[:5]:
        console.print(Text(f"  {show(one['name'], 60)}  {one['role']}  {human(one['bytes'])}"))


def _range(pair: list[int]) -> str:
    low, high = pair
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
