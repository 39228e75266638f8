"""One-pass commands, generated from the pass's dataclass: its fields become real options."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from compress.passes import pass_classes
from compress.passes.base import Pass, option_fields
from compress.recipe import build_pass, parse_value

CALIBRATION = ("stats", "text", "sentences", "ids", "images", "samples", "length", "documents")
EVALUATION = ("eval_text", "eval_pairs", "eval_images", "eval_window", "eval_samples")
EXPORT = (
    "onnx", "onnx_style", "onnx_accuracy_level", "onnx_opset", "onnx_tolerance",
    "onnx_activations", "self_contained", "image_shape",
)  # fmt: skip
_COMMON = (
    "format", "untouched", "jobs", "memory", "seed", "fail_if", "report", "overwrite", "resume",
    "allow_pickle", "no_fsync", "json", "module", *CALIBRATION, *EVALUATION, *EXPORT,
)  # fmt: skip


def make_command(
    name: str, run_one: Callable[[Path, Pass, dict[str, Any]], None]
) -> Callable[..., None]:
    """A function whose signature Typer turns into `compress NAME MODEL -o OUT --options`."""
    from compress import cli

    cls = pass_classes()[name]
    hints = typing.get_type_hints(cls)
    fields = option_fields(cls)
    run_hints = typing.get_type_hints(cli.run, include_extras=True)
    defaults = inspect.signature(cli.run).parameters

    def command(**given: Any) -> None:
        common = {key: given[key] for key in ("out", *_COMMON)}
        options = {}
        for field in fields:
            value = given[f"pass_{field.name}"]
            if value is None or value == []:
                continue
            as_text = _kind(hints[field.name]) is str and hints[field.name] is not str
            options[field.name] = parse_value(value, field.name) if as_text else value
        run_one(given["model"], build_pass(name, options), common)

    parameters = [_parameter("model", cli.Model), _parameter("out", cli.Out)]
    for field in fields:
        parameters.append(_option_parameter(field, hints[field.name]))
    for key in _COMMON:
        parameters.append(_parameter(key, run_hints[key], defaults[key].default))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameter(
    name: str, annotation: Any, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _option_parameter(field: Any, hint: Any) -> inspect.Parameter:
    """A field as an option; not given = None, so that the dataclass keeps its own default."""
    flags = ["--" + word.replace("_", "-") for word in (field.name, *field.metadata["aliases"])]
    kind = _kind(hint)
    if kind is bool:
        flags = [f"{flags[0]}/--no-{flags[0][2:]}"]
    choices = field.metadata["choices"]
    option = typer.Option(
        *flags,
        help=f"{field.metadata['help']}{_default_of(field)}",
        metavar="|".join(choices) or ("PATTERN" if kind is list else None),
        show_default=False,
    )
    annotation = list[str] if kind is list else kind
    return _parameter(f"pass_{field.name}", typing.Annotated[annotation | None, option], None)


def _kind(hint: Any) -> Any:
    """int, float, bool, str or list: what Typer parses; anything else is a YAML text."""
    if hint in (int, float, bool, str):
        return hint
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is tuple:
        return list if arguments[:1] == [str] else str
    return arguments[0] if len(arguments) == 1 and arguments[0] in (int, float, bool) else str


def _default_of(field: Any) -> str:
    import dataclasses

    if field.default is dataclasses.MISSING or field.default in (None, ()):
        return ""
    value = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return f" [default: {value}]"
