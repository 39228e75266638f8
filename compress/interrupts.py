"""SIGINT and SIGTERM: answered by an exception, and held back over steps that belong together."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from compress.errors import Interrupted

_HELD = (signal.SIGINT, signal.SIGTERM)
_arrived: list[int] = []


def catch() -> None:
    """From now on SIGINT and SIGTERM raise Interrupted in the main thread."""

    def stop(number: int, _frame: object) -> None:
        _arrived.append(number)
        raise Interrupted(number)

    for number in _HELD:
        signal.signal(number, stop)


def arrived() -> int | None:
    """The signal that came first, whatever became of its exception.

    Code that was interrupted may turn it into another: numpy's import makes an ImportError of it.
    """
    return _arrived[0] if _arrived else None


def ignore() -> None:
    """The process is ending: another signal must not change how."""
    for number in _HELD:
        signal.signal(number, signal.SIG_IGN)


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
