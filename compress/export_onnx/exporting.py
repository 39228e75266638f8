"""torch's exporter, called so that it says nothing and fails with one line."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from compress.errors import InputError, UsageError, show
from compress.export_onnx.tasks import Input
from compress.export_onnx.wrappers import Flat

OPSETS = range(18, 26)  # of the domain "", that torch's exporter writes
# What torch, transformers and the exporter raise about a model that they cannot trace.
FAILURES = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, AssertionError,
)  # fmt: skip


def require_exporter() -> None:
    """Raises UsageError that says what to install where torch's exporter cannot run."""
    try:
        import onnxscript  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            f"capturing a model as ONNX needs the package {error.name}",
            hint="pip install 'compress-checkpoints[onnx]'",
        ) from None


def check_opset(opset: int) -> None:
    """Raises UsageError for an opset that the exporter does not write."""
    if opset not in OPSETS:
        raise UsageError(
            f"opset {opset}: a captured graph can have {OPSETS[0]} to {OPSETS[-1]}",
            hint="leave --opset out for 21",
        )


@contextlib.contextmanager
def failing_in_one_line(where: str, model: Any) -> Iterator[None]:
    """Turns what torch raises about a model into an InputError that names its class."""
    try:
        yield
    except FAILURES as error:
        raise InputError(
            f"{show(where)}: {type(model).__name__} cannot be captured as ONNX: {_reason(error)}",
            hint="compress an .onnx file of it instead, or write another format",
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first: torch wraps errors in advice to its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    first = next((line for line in lines if line), "no reason given")
    return f"{type(error).__name__}: {show(first, 200)}"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Neither warnings nor log lines nor anything printed."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _zero_and_one_are_sizes() -> Any:
    """A context in which a free axis may have any size; torch's own exporter traces so."""
    from torch.fx.experimental import _config

    return _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def export(flat: Flat, inputs: Sequence[Input], opset: int) -> Any:
    """The ONNX model (ModelProto) of a wrapped model, as torch writes it.

    It is traced as Python runs (`strict=False`), with sizes of 0 and 1 allowed on every free axis.
    """
    free = [one.dynamic() for one in inputs]
    with _silence(), torch.no_grad(), _zero_and_one_are_sizes():
        program = torch.export.export(
            flat, ([one.sample() for one in inputs],), dynamic_shapes=(free,), strict=False
        )
        made = torch.onnx.export(
            program, (), dynamo=True, opset_version=opset, optimize=True, verbose=False,
            input_names=[one.name for one in inputs], output_names=flat.seen.outputs,
        )  # fmt: skip
    if made is None:
        raise RuntimeError("the exporter gave nothing")
    return made.model_proto
