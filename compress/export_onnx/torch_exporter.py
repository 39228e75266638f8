"""What both captures ask of torch's exporter: to be there, to be silent, to fail in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator

from compress.errors import UsageError, show


def require_exporter(*more: str) -> None:
    """Raises UsageError that says what to install where torch's exporter cannot run.

    more  further packages that are needed
    """
    wanted = ("onnx", "onnxscript", "onnx_ir", *more)
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"capturing a model as ONNX needs the package {missing[0]}",
            hint="pip install 'compress-checkpoints[onnx]'",
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is printed, logged or warned of inside."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
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


def reason(error: BaseException) -> str:
    """The first line of what went wrong first: torch wraps errors in advice to its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    first = next((line for line in lines if line), "no reason given")
    return f"{type(error).__name__}: {show(first, 200)}"
