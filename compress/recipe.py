"""Recipes: strict YAML 1.2 and `name:key=value` words, both turned into passes by one function."""

from __future__ import annotations

import difflib
import functools
import math
import operator
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from compress.errors import InputError, UsageError, show
from compress.evaluate.metrics import METRICS
from compress.passes import pass_classes
from compress.passes.base import Pass, option_fields

MAX_RECIPE_BYTES = 1_000_000
FORMATS = ("auto", "compressed-tensors", "native", "onnx", "dense")
UNTOUCHED = ("keep", "bf16", "fp16")
GATE_METRICS = tuple(METRICS)
_COMPARISONS = {">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Gate:
    """Fail the run when `metric comparison value` holds, e.g. relative_error > 0.1."""

    metric: str
    comparison: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """`metric>value`, as `--fail-if` takes it. Raises UsageError."""
        match = re.fullmatch(r"\s*([a-z][a-z0-9_]*)\s*([<>])\s*([^\s<>=]+)\s*", text)
        if match is None:
            raise UsageError(
                f"--fail-if {show(text)}: expected metric>value, e.g. relative_error>0.1"
            )
        name, comparison, number = match.groups()
        return cls(_known_metric(name), comparison, _finite(number, f"--fail-if {show(text)}"))

    @classmethod
    def from_mapping(cls, mapping: Any) -> Gate:
        """`{metric: bytes, max: 1e9}` (or `min:`), as a recipe has it. Raises UsageError."""
        if not isinstance(mapping, Mapping):
            raise UsageError(
                "gates: each gate is a mapping, e.g. {metric: relative_error, max: 0.1}"
            )
        _refuse_unknown(mapping, ("metric", "max", "min"), "gates")
        if "metric" not in mapping or ("max" in mapping) == ("min" in mapping):
            raise UsageError("gates: a gate needs `metric` and one of `max` and `min`")
        bound = "max" if "max" in mapping else "min"
        comparison = ">" if bound == "max" else "<"
        metric = _known_metric(str(mapping["metric"]))
        return cls(metric, comparison, _finite(mapping[bound], f"gates: {metric}"))

    def fails(self, metrics: Mapping[str, float]) -> bool:
        """Whether the measured metrics trip this gate; a NaN always does."""
        measured = metrics[self.metric]
        return math.isnan(measured) or bool(_COMPARISONS[self.comparison](measured, self.value))

    def __str__(self) -> str:
        return f"{self.metric}{self.comparison}{self.value:g}"


def failed_gates(gates: Iterable[Gate], metrics: Mapping[str, float]) -> list[str]:
    """One line for every gate that fails."""
    return [
        f"{gate.metric} is {metrics[gate.metric]:.6g}, the gate fails at {gate}"
        for gate in gates
        if gate.fails(metrics)
    ]


@dataclass(frozen=True)
class Output:
    """Where and how the result is written: the recipe's `output` block."""

    format: str = "auto"
    untouched: str = "keep"
    onnx: bool = False


@dataclass(frozen=True)
class Recipe:
    """An ordered list of passes, and what to do with the result."""

    passes: tuple[Pass, ...]
    model: str | None = None
    output: Output = field(default_factory=Output)
    gates: tuple[Gate, ...] = ()
    seed: int = 0

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out, as it is stored in OUT."""
        return {
            "version": 1,
            "seed": self.seed,
            "passes": [{p.name: _plain(p)} for p in self.passes],
            "output": {f.name: getattr(self.output, f.name) for f in fields(self.output)},
            "gates": [
                {"metric": g.metric, "max" if g.comparison == ">" else "min": g.value}
                for g in self.gates
            ],
        }


def read_recipe(path: str | Path) -> Recipe:
    """A recipe file. Raises UsageError for its content, InputError where it is not YAML 1.2."""
    from compress import strict_yaml

    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"recipe {show(str(path))}: {error.strerror}") from error
    if len(raw) > MAX_RECIPE_BYTES:
        raise InputError(f"recipe {show(str(path))}: larger than {MAX_RECIPE_BYTES} bytes")
    data = strict_yaml.loads(raw, f"recipe {show(str(path))}")
    try:
        return recipe_from_mapping(data)
    except UsageError as error:
        raise UsageError(f"recipe {show(str(path))}: {error.message}", hint=error.hint) from error


def recipe_from_mapping(data: Any) -> Recipe:
    """A recipe from parsed YAML. Raises UsageError that names the key."""
    if not isinstance(data, Mapping):
        raise UsageError("a recipe is a mapping with the key `passes`")
    _refuse_unknown(data, ("version", "model", "passes", "output", "gates", "seed"), "recipe")
    if data.get("version", 1) != 1 or isinstance(data.get("version"), bool):
        raise UsageError(
            f"version: {show(repr(data['version']))} is not known; this tool reads version 1"
        )
    listed = data.get("passes")
    if not isinstance(listed, list) or not listed:
        raise UsageError("passes: expected a list of passes, e.g. `- quantize: {bits: 4}`")
    model = data.get("model")
    if model is not None and not isinstance(model, str):
        raise UsageError("model: expected a path")
    seed = data.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UsageError(f"seed: expected a whole number from 0, got {show(repr(seed))}")
    return Recipe(
        passes=tuple(_pass_entry(entry) for entry in listed),
        model=model,
        output=_output(data.get("output", {})),
        gates=tuple(Gate.from_mapping(g) for g in _as_list(data.get("gates", []), "gates")),
        seed=seed,
    )


def parse_pass(word: str) -> Pass:
    """A pass as typed: `name` or `name:key=value,key=value`. Raises UsageError."""
    name, _, rest = word.partition(":")
    options: dict[str, Any] = {}
    for part in split_outside_brackets(rest):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(
                f"{show(word)}: expected key=value, got {show(part)}",
                hint=f"e.g. {show(name)}:key=value,key=value",
            )
        if key.strip() in options:
            raise UsageError(f"{show(word)}: {show(key.strip())} is given twice")
        options[key.strip()] = parse_value(value, f"{show(name)}: {show(key.strip())}")
    return build_pass(name.strip(), options)


def parse_value(text: str, where: str) -> Any:
    """A value as typed: YAML, or a glob. Raises UsageError: it is a flag, not a file."""
    from compress import strict_yaml

    try:
        raw = text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no UTF-8
        raise UsageError(f"{where}: not UTF-8: {show(text)}") from None
    # `*query*` is a glob to everyone but YAML, which would read an alias.
    if text.lstrip().startswith("*"):
        return text.strip()
    try:
        return strict_yaml.loads(raw, where)
    except InputError as error:
        hint = 'quote globs inside a list: targets=["*query", "*key"]'
        raise UsageError(error.message, hint=hint) from error


def build_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """A pass by name from a mapping of options, checked and converted. Raises UsageError."""
    classes = pass_classes()
    if name not in classes:
        hint = _nearest(name, classes) or f"known passes: {', '.join(classes)}"
        raise UsageError(f"unknown pass {show(name)}", hint=hint)
    cls = classes[name]
    spellings = {f.name: f for f in option_fields(cls)}
    for option_field in option_fields(cls):
        spellings |= dict.fromkeys(option_field.metadata["aliases"], option_field)
    hints = _type_hints(cls)
    values: dict[str, Any] = {}
    for raw_key, raw in options.items():
        key = str(raw_key).replace("-", "_")
        if key not in spellings:
            known = [f.name for f in option_fields(cls)]
            hint = _nearest(key, spellings) or f"known keys: {', '.join(known)}"
            raise UsageError(f"{name}: unknown key {show(str(raw_key))}", hint=hint)
        target = spellings[key]
        if target.name in values:
            raise UsageError(f"{name}: {target.name} is given twice")
        values[target.name] = _convert(raw, hints[target.name], target.metadata, name, key)
    built = cls(**values)
    built.validate()
    return built


@functools.cache
def _type_hints(cls: type[Pass]) -> dict[str, Any]:
    """The types of a pass's options; finding them takes longer than all else."""
    return typing.get_type_hints(cls)


def _pass_entry(entry: Any) -> Pass:
    """One item of `passes`: `quantize`, `{quantize: {bits: 4}}` or `{name: quantize, bits: 4}`."""
    if isinstance(entry, str):
        return build_pass(entry, {})
    if isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
        return build_pass(entry["name"], {k: v for k, v in entry.items() if k != "name"})
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, options = next(iter(entry.items()))
        if options is None:
            options = {}
        if isinstance(name, str) and isinstance(options, Mapping):
            return build_pass(name, options)
    raise UsageError("passes: each pass is one name with its options, e.g. `- quantize: {bits: 4}`")


def _output(mapping: Any) -> Output:
    if not isinstance(mapping, Mapping):
        raise UsageError("output: expected a mapping, e.g. {format: native}")
    _refuse_unknown(mapping, ("format", "untouched", "onnx"), "output")
    output = Output(**mapping)
    if not isinstance(output.onnx, bool):
        raise UsageError(f"output: onnx: expected true or false, got {show(repr(output.onnx))}")
    for key, value, allowed in (
        ("format", output.format, FORMATS),
        ("untouched", output.untouched, UNTOUCHED),
    ):
        if value not in allowed:
            raise UsageError(
                f"output: {key} {show(repr(value))} is not one of {', '.join(allowed)}"
            )
    return output


def _convert(raw: Any, hint: Any, metadata: Mapping[str, Any], name: str, key: str) -> Any:
    """One option's value as its field's type, in range. Raises UsageError."""
    import msgspec

    wants_list = typing.get_origin(hint) is tuple
    if wants_list and not isinstance(raw, list | tuple):
        raw = [raw]
    if isinstance(raw, bool) and "bool" not in str(hint):
        raise UsageError(f"{name}: {key}: expected {_describe(hint)}, got {str(raw).lower()}")
    try:
        value = msgspec.convert(raw, hint, strict=True)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{name}: {key}: expected {_describe(hint)}, got {show(repr(raw))}"
        ) from error
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name}: {key}: {value} is not a finite number")
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and ((low is not None and value < low) or (high is not None and value > high)):
        allowed = f"from {low:g}" if high is None else f"from {low:g} to {high:g}"
        raise UsageError(f"{name}: {key}={show(repr(value))} is out of range ({allowed})")
    if choices and value not in choices:
        best = _nearest(str(value), choices) or f"one of {', '.join(choices)}"
        raise UsageError(f"{name}: {key}: unknown value {show(str(value))}", hint=best)
    return value


def _describe(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in words:
        return words[hint]
    if typing.get_origin(hint) is tuple:
        return "a list"
    names = [words.get(a, getattr(a, "__name__", str(a))) for a in typing.get_args(hint)]
    return " or ".join(n for n in names if n != "NoneType") or str(hint)


def split_outside_brackets(text: str) -> list[str]:
    """Split at commas that stand outside brackets, braces and quotes."""
    parts, current, depth, quote = [], "", 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        if letter == "," and depth == 0 and not quote:
            parts.append(current)
            current = ""
        else:
            current += letter
    return [part for part in [*parts, current] if part.strip()]


def _refuse_unknown(mapping: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in mapping:
        if key not in known:
            hint = _nearest(str(key), known) or f"known keys: {', '.join(known)}"
            raise UsageError(f"{where}: unknown key {show(str(key))}", hint=hint)


def _nearest(word: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean `{close[0]}`?" if close else None


def _known_metric(name: str) -> str:
    if name not in GATE_METRICS:
        hint = _nearest(name, GATE_METRICS) or f"known metrics: {', '.join(GATE_METRICS)}"
        raise UsageError(f"gate: unknown metric {show(name)}", hint=hint)
    return name


def _finite(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {show(str(value))} is not a number") from error
    if isinstance(value, bool) or not math.isfinite(number):
        raise UsageError(f"{where}: {show(str(value))} is not a finite number")
    return number


def _as_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{where}: expected a list")
    return value


def _plain(p: Pass) -> dict[str, Any]:
    """A pass's options as JSON types."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return value

    return {f.name: plain(getattr(p, f.name)) for f in option_fields(type(p))}
