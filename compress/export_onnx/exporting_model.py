"""torch's exporter on a transformers model whose weights are nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from compress.errors import InputError, UsageError, show
from compress.export_onnx.tasks import Input
from compress.export_onnx.torch_exporter import quiet, reason
from compress.export_onnx.wrappers import Flat

OPSETS = range(18, 26)  # of the domain "", that torch's exporter writes
# What torch, transformers and the exporter raise about a model that they cannot trace.
FAILURES = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, AssertionError,
)  # fmt: skip


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
            f"{show(where)}: {type(model).__name__} cannot be captured as ONNX: {reason(error)}",
            hint="compress an .onnx file of it instead, or write another format",
        ) from error


def _zero_and_one_are_sizes() -> Any:
    """A context in which a free axis may have any size; torch's own exporter traces so."""
    from torch.fx.experimental import _config

    return _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def export(flat: Flat, inputs: Sequence[Input], opset: int) -> Any:
    """The ONNX model (ModelProto) of a wrapped model, as torch writes it.

    It is traced as Python runs (`strict=False`), with sizes of 0 and 1 allowed on every free axis.
    """
    free = [one.dynamic() for one in inputs]
    with quiet(), torch.no_grad(), _zero_and_one_are_sizes():
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
