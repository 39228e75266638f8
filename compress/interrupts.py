"""SIGINT and SIGTERM: answered by an exception, and held back over steps that belong together."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from compress.errors import Interrupted

_HELD = (signal.SIGINT, signal.SIGTERM)
_MOMENT = 0.02  # seconds
PATIENCE = 10.0  # seconds that the clean-up after a signal has before another one cuts it off
_arrived: list[int] = []
_until = [0.0]  # when that time is over


def catch() -> None:
    """From now on SIGINT and SIGTERM raise Interrupted in the main thread.

    Another one soon after changes nothing: the clean-up would be cut off, or Python's wait for
    threads, which then run on in a process that is gone.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        _arrived.append(number)
        if _is_importing("numpy", frame):
            _send_again(number)
        elif time.monotonic() >= _until[0]:
            _until[0] = time.monotonic() + PATIENCE
            raise Interrupted(number)

    for number in _HELD:
        signal.signal(number, stop)


def _is_importing(package: str, frame: FrameType | None) -> bool:
    """Whether the package's modules are running: numpy prints what interrupts them."""
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if frame.f_code.co_name == "<module>" and module.partition(".")[0] == package:
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    """The signal once more, in a moment; through its handler, which may be a deferring one then."""
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, _MOMENT)


def arrived() -> int | None:
    """The signal that came first, whatever became of its exception.

    Code that was interrupted may turn it into another, an import that failed for example.
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
