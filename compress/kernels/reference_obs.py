"""The definition of the optimal-brain-surgeon sweep, in numpy; see `compress.kernels.reference`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]


def obs_block(
    w: F32,
    first: int,
    upper: F32,
    *,
    mask: Bool | None,
    exact: F32 | None,
    scale: F32,
    zero_point: U8 | None,
    group: NDArray[np.int64],
    bits: int,
    codes: U8,
) -> None:
    """Code the columns [first, first + n) one by one, each error corrected in the later ones.

    The columns of w are replaced by their errors; see `compress.kernels.obs.obs_block`.
    """
    n = upper.shape[0]
    top = np.float32((1 << bits) - 1)
    with np.errstate(all="ignore"):
        for i in range(n):
            x = w[:, first + i].copy()
            s = scale[:, group[i]]
            zero: Any = np.float32(1 << (bits - 1))
            if zero_point is not None:
                zero = zero_point[:, group[i]].astype(np.float32)
            q = np.rint(x * (np.float32(1) / s))
            q = np.minimum(np.maximum(q, -zero), top - zero)
            if mask is not None:
                q = np.where(mask[:, first + i], q, np.float32(0))
            codes[:, first + i] = (q + zero).astype(np.uint8)
            value = q * s
            if exact is not None:
                value = np.where(np.isnan(exact[:, i]), value, exact[:, i])
            error = (x - (value + np.float32(0))) / upper[i, i]
            w[:, first + i] = error
            w[:, first + i + 1 : first + n] -= error[:, None] * upper[i, i + 1 :]
