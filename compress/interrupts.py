"""Holding SIGINT and SIGTERM back over the few steps that must happen together."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

_HELD = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let a signal wait until the block has ended; the first that came is then delivered.

    Handlers are swapped instead of masking the signals: a mask belongs to one thread, and another
    thread that takes the signal would still make Python run the handler in the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers never run in this thread
        return
    arrived: list[int] = []

    def note(number: int, _frame: object) -> None:
        arrived.append(number)

    usual = {number: signal.getsignal(number) for number in _HELD}
    try:
        for number in _HELD:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if arrived:
            signal.raise_signal(arrived[0])
