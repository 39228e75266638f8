"""Overrides of `quantize`: other options for some targets, checked as the recipe is read."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from compress.errors import UsageError, show
from compress.passes.base import Pass

_OVERRIDABLE = (
    "bits",
    "group",
    "symmetric",
    "solver",
    "search",
    "signed_scale",
    "scale_dtype",
    "on_indivisible",
    "damping",
    "act_order",
    "follow",
)


def patterns(override: Mapping[str, Any]) -> list[str]:
    """The patterns of an override's targets."""
    targets = override["targets"]
    return [targets] if isinstance(targets, str) else list(targets)


def _options(cls: type[Pass]) -> dict[str, dataclasses.Field[Any]]:
    """Overridable options by every spelling."""
    found = {f.name: f for f in dataclasses.fields(cls) if f.name in _OVERRIDABLE}
    aliases = {a: f for f in found.values() for a in f.metadata["aliases"]}
    return found | aliases


def changes(cls: type[Pass], override: Mapping[str, Any]) -> dict[str, Any]:
    """The options that an override sets, by field."""
    options = _options(cls)
    return {options[k].name: v for k, v in override.items() if k != "targets"}


def check(cls: type[Pass], where: str, override: Any) -> None:
    """Refuse (UsageError) an override with missing targets, unknown keys or illegal values."""
    if not isinstance(override, Mapping):
        raise UsageError(f"{where} is not a mapping", hint="write {targets: [...], bits: 8}")
    targets = override.get("targets")
    listed = [targets] if isinstance(targets, str) else targets
    if not isinstance(listed, (list, tuple)) or not listed:
        raise UsageError(f"{where} has no targets", hint="write {targets: [...], bits: 8}")
    if not all(isinstance(pattern, str) for pattern in listed):
        raise UsageError(f"{where}: targets must be patterns", hint="quote them as strings")
    options = _options(cls)
    seen: set[str] = set()
    for key, value in override.items():
        if key == "targets":
            continue
        if key not in options:
            near = difflib.get_close_matches(str(key), options, n=1)
            known = "the keys are targets, " + ", ".join(_OVERRIDABLE)
            hint = f"did you mean '{near[0]}'? {known}" if near else known
            raise UsageError(f"{where}: unknown key '{show(str(key))}'", hint=hint)
        name = options[key].name
        if name in seen:
            raise UsageError(f"{where}: {name} is given twice", hint="keep one of the spellings")
        seen.add(name)
        _check_value(f"{where}: {key}", value, options[key])
    if not seen:
        raise UsageError(f"{where} changes nothing", hint="add an option, e.g. bits: 8")


def _check_value(where: str, value: Any, field: dataclasses.Field[Any]) -> None:
    """Refuse (UsageError) a value of the wrong type, out of range, or not among the choices."""
    kind = type(field.default)
    if type(value) is not kind:
        raise UsageError(f"{where} is {show(repr(value))}, not {kind.__name__}", hint=None)
    low, high, choices = (field.metadata[k] for k in ("low", "high", "choices"))
    if choices and value not in choices:
        raise UsageError(
            f"{where} is {show(repr(value))}", hint="the choices are " + ", ".join(choices)
        )
    if (low is not None and value < low) or (high is not None and value > high):
        limits = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise UsageError(f"{where} is {value}", hint=f"it must be {limits}")
