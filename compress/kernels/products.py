"""Products with packed matrices: y = x W^T with codes, factors, outliers and bias in one call.

    linear(x, packed, y, precision="exact", threads=2)

`exact` rounds activations to 16 bits a block of at most 128 columns (two int8 planes where the
processor multiplies bytes), `fast` to 8 bits. Weights that are no codes are multiplied in float32
either way. A row's result does not depend on the other rows of the batch or on the threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.kernels import dispatch, reference_products
from compress.kernels.packing import HEADER_WORDS, MAGIC

Array = NDArray[Any]
U8 = NDArray[np.uint8]

PRECISIONS = ("exact", "fast")
_KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}


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
    out_features, in_features = linear_shape(packed)
    if x.dtype.name not in _KINDS:
        raise TypeError(f"x must be float32, float16 or bfloat16, not {x.dtype}")
    if y.dtype.name not in _KINDS:
        raise TypeError(f"y must be float32, float16 or bfloat16, not {y.dtype}")
    if x.ndim != 2 or x.shape[1] != in_features:
        raise ValueError(f"x must be [batch, {in_features}], not {list(x.shape)}")
    if y.shape != (x.shape[0], out_features):
        raise ValueError(f"y must be [{x.shape[0]}, {out_features}], not {list(y.shape)}")
    if not x.flags.c_contiguous:
        raise ValueError("x must be C-contiguous")
    if not (y.flags.c_contiguous and y.flags.writeable):
        raise ValueError("y must be C-contiguous and writable")
    check_options(precision, threads)
    native = dispatch.current().native
    if native is None:
        reference_products.linear(x, packed, y, precision)
        return
    native.linear(
        packed,
        x.reshape(-1).view(np.uint8),
        _KINDS[x.dtype.name],
        x.shape[0],
        y.reshape(-1).view(np.uint8),
        _KINDS[y.dtype.name],
        precision == "exact",
        threads,
    )


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
