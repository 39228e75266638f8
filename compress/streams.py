"""Standard input, output and error, where whoever started the program closed one of them."""

from __future__ import annotations

import os
import sys


def open_closed() -> None:
    """Let every closed one of the three lead to the null device.

    Otherwise the next file that is opened would take its number, and what a library prints would
    be written into a weight file; Python would have None in its place.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def complain(*lines: str) -> None:
    """Lines on standard error; that they cannot be written changes no exit code."""
    try:
        print(*lines, sep="\n", file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
