"""Products with packed matrices: y = x W^T with codes, factors, outliers and bias in one call.

    linear(x, packed, y, precision="exact", threads=2)
    dense_linear(x, w, y, threads=2)            (a weight where it lies, nothing packed)

Activations that meet codes are rounded, a block of at most 128 columns at a time: `exact` to 16
bits, `fast` to 8. Up to four that are more than four times as large as all others of their block
are multiplied alone, in float32, so that massive activations cost their neighbours nothing. Weights
that are no codes are multiplied in float32 either way. A row's result does not depend on the other
rows of the batch or on the threads. See docs/products.md.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from compress.kernels import dispatch, reference_products
from compress.kernels.packing import HEADER_WORDS, MAGIC

Array = NDArray[Any]
U8 = NDArray[np.uint8]

PRECISIONS = ("exact", "fast")
_KINDS = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}


def linear_shape(packed: U8) -> tuple[int, int]:
    """(out_features, in_features) of a packed matrix. Raises ValueError where it is none."""
    _check_packed(packed)
    words = packed[: 8 * HEADER_WORDS].view(np.int64)
    return int(words[2]), int(words[3])


def linear(x: Array, packed: U8, y: Array, *, precision: str = "exact", threads: int = 1) -> None:
    """y [batch, out_features] = x [batch, in_features] times the packed matrix, transposed.

    x, y       float32, float16 or bfloat16, C-contiguous; accumulation is in float32
    packed     uint8 [bytes], of `compress.kernels.packing.pack_linear`
    precision  "exact" or "fast": see the module
    threads    at most so many threads take part, the calling one included

    Raises TypeError for wrong dtypes, ValueError for wrong shapes and values; each names the
    argument.
    """
    kinds = _KINDS.get(x.dtype), _KINDS.get(y.dtype)
    check_options(precision, threads)
    native = dispatch.current().native
    ready = None not in kinds and _dense(x) and _dense(y) and y.flags.writeable
    if native is None or not ready:
        _check(x, packed, y)
        reference_products.linear(x, packed, y, precision)
        return
    try:
        native.linear(
            packed,
            x.reshape(-1).view(np.uint8),
            kinds[0],
            x.shape[0],
            y.reshape(-1).view(np.uint8),
            kinds[1],
            precision == "exact",
            threads,
        )
    except (TypeError, ValueError):  # nanobind's TypeError speaks of its own signature
        _check(x, packed, y)  # the same in better words
        raise


def dense_linear(x: Array, w: Array, y: Array, *, threads: int = 1) -> None:
    """y [batch, out_features] = x [batch, in_features] times w, transposed, read where it lies.

    For a weight that others use, too: a language-model head that is also the embedding table.

    x, y     float32, float16 or bfloat16, C-contiguous; accumulation is in float32
    w        [out_features, in_features] of the same dtypes, C-contiguous, at any address
    threads  at most so many threads take part, the calling one included

    Raises TypeError for wrong dtypes, ValueError for wrong shapes and values; each names the
    argument.
    """
    if w.dtype not in _KINDS:
        raise TypeError(f"w must be float32, float16 or bfloat16, not {w.dtype}")
    if w.ndim != 2:
        raise ValueError(f"w must be [out_features, in_features], not {list(w.shape)}")
    if not w.flags.c_contiguous:
        raise ValueError("w must be C-contiguous")
    out_features, in_features = w.shape
    _check_activations(x, y, in_features, out_features)
    check_options("exact", threads)
    native = dispatch.current().native
    if native is None:
        reference_products.dense_linear(x, w, y)
        return
    native.dense_linear(
        w.reshape(-1).view(np.uint8),
        _KINDS[w.dtype],
        out_features,
        in_features,
        x.reshape(-1).view(np.uint8),
        _KINDS[x.dtype],
        x.shape[0],
        y.reshape(-1).view(np.uint8),
        _KINDS[y.dtype],
        threads,
    )


def _dense(array: Array) -> bool:
    return array.ndim == 2 and array.flags.c_contiguous


def _check(x: Array, packed: U8, y: Array) -> None:
    """Raises TypeError or ValueError that names the argument that does not fit."""
    out_features, in_features = linear_shape(packed)
    _check_activations(x, y, in_features, out_features)


def _check_activations(x: Array, y: Array, in_features: int, out_features: int) -> None:
    for name, array in (("x", x), ("y", y)):
        if array.dtype not in _KINDS:
            raise TypeError(f"{name} must be float32, float16 or bfloat16, not {array.dtype}")
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} must be C-contiguous")
    if not y.flags.writeable:
        raise ValueError("y must be writable")
    if x.ndim != 2 or x.shape[1] != in_features:
        raise ValueError(f"x must be [batch, {in_features}], not {list(x.shape)}")
    if y.shape != (x.shape[0], out_features):
        raise ValueError(f"y must be [{x.shape[0]}, {out_features}], not {list(y.shape)}")


def check_options(precision: str, threads: int) -> None:
    """Raises ValueError for an unknown precision or a number of threads below one."""
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be "exact" or "fast", not {precision!r}')
    if threads < 1:
        raise ValueError(f"threads must be positive, not {threads}")


def _check_packed(packed: U8) -> None:
    if packed.dtype != np.uint8:
        raise TypeError(f"packed must be uint8, not {packed.dtype}")
    if packed.ndim != 1 or not packed.flags.c_contiguous:
        raise ValueError("packed must be a contiguous vector")
    if packed.size < 8 * HEADER_WORDS or int(packed[:8].view(np.int64)[0]) != MAGIC:
        raise ValueError("packed is not a packed matrix: use pack_linear")
