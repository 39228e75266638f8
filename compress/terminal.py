"""What the commands print: JSON or words on standard output, bars on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from compress.run import Progress


_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_limited: list[str] = []


def limit_threads() -> None:
    """One BLAS thread a tensor: the tool's own pool runs over tensors, and sums keep one order.

    numpy, which reads this, is imported later. What the user set stays.
    """
    _limited.extend(name for name in _THREADS if name not in os.environ)
    os.environ.update(dict.fromkeys(_limited, "1"))


def leave_threads_to_torch() -> None:
    """Undo the limit before torch is imported: a model runs on all of torch's threads."""
    for name in _limited:
        os.environ.pop(name, None)


def emit(
    body: Any, json: bool, show_it: Callable[[], None], raw: Callable[[], bytes] | None = None
) -> None:
    """JSON or words, on standard output; a reader that has gone away is no error.

    Raises ResourceError where it cannot be written: what the command was for is done by then.
    """
    import json as codec

    from compress.errors import ResourceError, from_os_error
    from compress.report import without_nan

    try:
        if not json:
            show_it()
        elif raw is not None:
            typer.echo(raw().decode(), nl=False)
        else:
            typer.echo(codec.dumps(without_nan(body), indent=1))
        sys.stdout.flush()
    except BrokenPipeError:
        _stop_writing()
    except OSError as error:
        _stop_writing()
        failed = from_os_error(error, doing="cannot write to standard output")
        hint = "the command itself is done; send its output elsewhere"
        raise ResourceError(failed.message, hint=hint) from error


def write_json(body: Any, path: Path) -> None:
    """The document that `emit` prints, in a file. Raises ResourceError."""
    import json as codec

    from compress.checkpoint.small_files import write_whole
    from compress.errors import from_os_error
    from compress.report import without_nan

    try:
        write_whole(path, (codec.dumps(without_nan(body), indent=1) + "\n").encode())
    except OSError as error:
        raise from_os_error(error, doing="cannot write the report") from error


def stream(text: str) -> None:
    """A piece of text, shown at once. The command ends where its reader has gone away."""
    try:
        typer.echo(text, nl=False)
        sys.stdout.flush()
    except BrokenPipeError:
        _stop_writing()
        raise typer.Exit from None


def _stop_writing() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> Any:
    """A rich console on standard output that folds no line of a pipe."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit 1; `| head` is no failure

    # Off a terminal rich would fold at 80 columns; a pipe or a log gets whole lines.
    wide = None if sys.stdout.isatty() else 160
    return Quiet(highlight=False, markup=False, emoji=False, width=wide)


class progress_bar:
    """A bar on standard error, and only where that is a terminal."""

    def __enter__(self) -> Progress:
        from compress.run import silent

        self._bar: Any = None
        if not sys.stderr.isatty():
            return silent
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            console=Console(stderr=True, markup=False),
            transient=True,
        )
        self._bar.start()
        task = self._bar.add_task("reading", total=None)

        def update(what: str, done: int, total: int) -> None:
            self._bar.update(task, description=what, completed=done, total=max(1, total))

        return update

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
