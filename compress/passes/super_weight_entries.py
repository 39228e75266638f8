"""One accepted super weight, the ways to write its place, and how a report shows it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from compress.errors import UsageError, show

# How an entry came to be accepted: by the weights' score, by running the model, by both, ...
SCORE, FORWARD, BOTH, PUBLISHED, NAMED = "score", "forward", "both", "published", "named"


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
    # Measured by running the model, see `compress.solvers.massive_activations.Cause`:
    share: float | None = None
    persistence: float | None = None
    activation_ratio: float | None = None
    round: int | None = None  # that found it, from 1

    @property
    def key(self) -> tuple[str, int, int]:
        """Where it is."""
        return self.tensor, self.row, self.column

    def with_forward(self, other: Entry) -> Entry:
        """This entry with what running the model told of it."""
        return replace(
            self,
            confidence=BOTH if self.confidence == SCORE else self.confidence,
            share=other.share,
            persistence=other.persistence,
            activation_ratio=other.activation_ratio,
            round=other.round,
        )


def parse(text: str) -> tuple[int | str, int, int]:
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


def layer_of(name: str) -> int:
    """The first number in a name, -1 without one."""
    match = re.search(r"(?:^|\.)([0-9]+)\.", name)
    return int(match[1]) if match else -1


def plain(entry: Entry) -> dict[str, Any]:
    """An entry as JSON types, measurements rounded for reading; without those not made."""
    names = ["tensor", "layer", "row", "column", "value", "score", "ratio", "rank", "confidence"]
    if entry.round is not None:
        names += ["share", "persistence", "activation_ratio", "round"]
    shown = {name: getattr(entry, name) for name in names}
    for name in ("score", "ratio", "share", "persistence", "activation_ratio"):
        if shown.get(name) is not None:
            shown[name] = round(shown[name], 3)
    return shown
