"""Arrays of gigabytes in some megabytes: zeros nobody wrote, outputs folded onto themselves."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import numpy as np

WINDOW = 16 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # Linux; older Pythons do not name them
_FAILED = ctypes.c_void_p(-1).value


def _reserve(size: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return mmap.mmap(-1, -(-size // WINDOW) * WINDOW, flags=flags)


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros: all of its pages are the kernel's page of zeros until they are written to."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    area = _reserve(size)
    area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, np.uint8)[:size].view(dtype).reshape(shape)


def folded(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An output whose first and last 16 to 32 MB are memory of their own, prefilled with 0xA5.

    What lies between is one stretch of 16 MB, seen again and again: a kernel may write there, and
    its results there mean nothing.
    """
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    area = _reserve(size)
    raw = np.frombuffer(area, np.uint8)
    ends = max(WINDOW, len(area) - 2 * WINDOW)
    stretch = os.memfd_create("folded")
    try:
        os.ftruncate(stretch, WINDOW)
        for start in range(WINDOW, ends, WINDOW):
            where = _libc.mmap(
                raw.ctypes.data + start,
                WINDOW,
                mmap.PROT_READ | mmap.PROT_WRITE,
                mmap.MAP_SHARED | _MAP_FIXED,
                stretch,
                0,
            )
            if where == _FAILED:
                raise OSError(ctypes.get_errno(), "mmap")
    finally:
        os.close(stretch)
    raw[:WINDOW] = raw[ends:] = 0xA5
    return raw[:size].view(dtype).reshape(shape)
