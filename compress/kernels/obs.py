"""The optimal brain surgeon's column sweep: checked here, then run as `compress.kernels` says."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compress.kernels import F32, U8, Bool, _bits, _check, _matrix, _raw, dispatch, reference_obs

MAX_SWEEP = 256  # columns of one call


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
    """Code n <= 256 columns of w one by one, correcting the later ones of them for each error.

    w float32 [rows, cols]: the columns [first, first + n) are replaced by their errors
    (w - value) / upper[i, i]. upper float32 [n, n]: the columns' block of the upper factor U of
    the inverse Hessian U^T U; only its upper triangle is read. mask bool [rows, cols] or None:
    False = the value is zero. exact float32 [rows, n] or None: an entry's value whatever its
    code, NaN where the code decides. scale float32 (normal numbers) and zero_point uint8
    [rows, groups], None = 2^(bits-1); group int64 [n]: the group of each column. codes uint8
    [rows, cols]. Weights must be finite. Source: GPTQ (arXiv:2210.17323), SparseGPT
    (arXiv:2301.00774).
    """
    rows, columns = _matrix("w", w)
    n, _ = _matrix("upper", upper)
    _bits(bits)
    if not 0 <= n <= MAX_SWEEP:
        raise ValueError(f"upper must have at most {MAX_SWEEP} columns, not {n}")
    if not 0 <= first <= columns - n:
        raise ValueError(f"first must be 0 to {columns - n}, not {first}")
    groups = _matrix("scale", scale)[1]
    _check("w", w, np.float32, writable=True)
    _check("upper", upper, np.float32, (n, n))
    if not (np.diagonal(upper) > 0).all():
        raise ValueError("upper must have a positive diagonal")
    if mask is not None:
        _check("mask", mask, np.bool_, w.shape)
    if exact is not None:
        _check("exact", exact, np.float32, (rows, n))
    _check("scale", scale, np.float32, (rows, groups))
    magnitudes = np.abs(scale)  # smaller ones have no reciprocal
    if not ((magnitudes >= np.finfo(np.float32).tiny) & np.isfinite(magnitudes)).all():
        raise ValueError("scale must hold normal numbers only")
    if zero_point is not None:
        _check("zero_point", zero_point, np.uint8, (rows, groups))
    _check("group", group, np.int64, (n,))
    if n and not 0 <= group.min() <= group.max() < groups:
        raise ValueError(f"group must hold indices below {groups}")
    _check("codes", codes, np.uint8, w.shape, writable=True)
    native = dispatch.current().native
    if native is None:
        reference_obs.obs_block(
            w,
            first,
            upper,
            mask=mask,
            exact=exact,
            scale=scale,
            zero_point=zero_point,
            group=group,
            bits=bits,
            codes=codes,
        )
        return
    native.obs_block(
        w.reshape(-1),
        rows,
        columns,
        first,
        n,
        upper.reshape(-1),
        None if mask is None else _raw(mask),
        None if exact is None else _raw(exact),
        _raw(scale),
        None if zero_point is None else _raw(zero_point),
        groups,
        group,
        bits,
        _raw(codes),
    )
