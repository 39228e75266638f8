"""What the commands print: JSON or words on standard output, bars on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from compress.run import Progress


def emit(
    body: Any, json: bool, show_it: Callable[[], None], raw: Callable[[], bytes] | None = None
) -> None:
    """JSON or words, on standard output; a reader that has gone away is no error."""
    import json as codec

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
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            console=Console(stderr=True),
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
