"""Arrays that show a kernel straying: guard bytes around outputs, a faulting page behind inputs."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

GUARD = 64
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """Output arrays between guard bytes, prefilled with 0xA5, at a chosen misalignment."""

    def __init__(self) -> None:
        self.buffers: list[tuple[np.ndarray, int, int]] = []

    def array(self, shape: tuple[int, ...], dtype: Any, shift: int = 0) -> np.ndarray:
        """An array `shift` items behind the first guard."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        start = GUARD + shift * dtype.itemsize
        buffer = np.full(start + size + GUARD, 0xA5, np.uint8)
        self.buffers.append((buffer, start, size))
        return buffer[start : start + size].view(dtype).reshape(shape)

    def check(self) -> list[bytes]:
        """The contents of all arrays; fails where a guard byte changed."""
        for buffer, start, size in self.buffers:
            assert (buffer[:start] == 0xA5).all(), "written before the array"
            assert (buffer[start + size :] == 0xA5).all(), "written behind the array"
        return [buffer[start : start + size].tobytes() for buffer, start, size in self.buffers]


def fenced(array: np.ndarray, shift: int = 0) -> np.ndarray:
    """A copy that ends `shift` bytes before a page that kills the process when it is touched.

    It sees what no sanitizer does: loads by instructions that the compiler does not instrument.
    """
    page = mmap.PAGESIZE
    room = -(-(array.nbytes + shift) // page) * page
    area = np.frombuffer(mmap.mmap(-1, room + page), np.uint8)
    if _libc.mprotect(area.ctypes.data + room, page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    end = room - shift
    copy = area[end - array.nbytes : end].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
