"""Whether a graph can be loaded: what is published is no file that every runtime refuses."""

from __future__ import annotations

import re
from pathlib import Path

from compress.errors import InputError, show

# What onnxruntime says of graphs that are newer than it is, or made for another build of it, and
# where the address space is too small for the weights: nothing of it is the graph's fault.
_NO_FAULT = ("is not a registered function", "No Op registered for", "ValidateOpsetForDomain",
             "model ir_version", "model IR version", "bad_alloc", "mmap")  # fmt: skip
_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : (\w+ : )(Load model from .* failed:)?")
_HINT = "the graph was changed, or no runtime loaded the source's either: see compress verify"


def require_loadable(path: Path, called: str) -> None:
    """Raises InputError, which names `called`, for a graph that onnxruntime does not load.

    path  an .onnx file; data of its initializers may lie beside it
    onnxruntime infers types and shapes and looks at where weights lie; nothing is optimized,
    packed or run, so that weights are mapped and not read. What it does not know (newer operators,
    or no onnxruntime at all), or has no room for, is left to onnx's own checker. Operators that are
    right and have no kernel on this machine (bfloat16, say) are taken.
    """
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError:
        _check(path, called)
        return
    own = [kind for kind in vars(state).values() if isinstance(kind, type)]
    errors: tuple[type[Exception], ...] = (
        RuntimeError,
        ValueError,
        MemoryError,
        *(kind for kind in own if issubclass(kind, Exception)),
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors come as exceptions, too
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except errors as error:
        if type(error).__name__ == "NotImplemented":
            return
        text = str(error)
        if isinstance(error, MemoryError) or any(words in text for words in _NO_FAULT):
            _check(path, called)
            return
        raise _refused(called, f"onnxruntime {onnxruntime.__version__}", text) from error


def _check(path: Path, called: str) -> None:
    """What onnx says of a graph, whatever the runtime. Raises InputError."""
    from onnx import checker, shape_inference

    try:
        checker.check_model(str(path), full_check=True)
    except (
        checker.ValidationError,
        shape_inference.InferenceError,
        RuntimeError,
        ValueError,
    ) as error:
        raise _refused(called, "the package onnx", str(error)) from error


def _refused(called: str, who: str, text: str) -> InputError:
    line = " ".join(_PREFIX.sub("", text).split())
    return InputError(f"{show(called)}: {who} does not load it: {show(line, 240)}", hint=_HINT)
