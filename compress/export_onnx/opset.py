"""A graph in a newer opset, for operators that its own does not have."""

from __future__ import annotations

from typing import Any

from compress.errors import InputError, show


def raised(model: Any, version: int) -> Any:
    """The model in the default domain's opset `version`. Raises InputError where onnx cannot."""
    from onnx import version_converter

    # onnx's own error of a conversion is neither of Python's.
    failures = (version_converter.ConvertError, RuntimeError, ValueError, KeyError, TypeError)
    try:
        return version_converter.convert_version(model, version)
    except failures as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"the graph cannot be raised to opset {version}, which these codes need:"
            f" {show(line, 200)}",
            hint="export it with a newer opset, or use bits=8 with whole rows (group=-1)",
        ) from error
