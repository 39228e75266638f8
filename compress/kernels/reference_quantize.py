"""Quantization of groups and its search for scales; see `compress.kernels.reference`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from compress.kernels.reference import finite_index, pack_bits
from compress.kernels.reference_sums import F32, F64, TILE, U8, Array, Bool, lane_sum, padded

SCALE_DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
}
SMALLEST_NORMAL = {
    "F16": np.float32(2.0**-14),
    "BF16": np.float32(2.0**-126),
    "F32": np.float32(2.0**-126),
}

# Scale candidates of the search; the same tables stand in csrc/cpu/search_impl.h. They were
# chosen by the squared error left on a sentence encoder's weights: 24 candidates gain 0.1 % over
# 16.
CANDIDATES = 16
# Symmetric: scale = absmax / divisor, divisors evenly spaced between these bounds times
# 2^(bits-1). The first lies below 1: up to there the grid's longer side is not used up.
SYMMETRIC_BOUNDS = {
    2: (0.60, 2.40),
    3: (0.80, 1.90),
    4: (0.86, 1.50),
    5: (0.90, 1.25),
    6: (0.94, 1.12),
    7: (0.96, 1.06),
    8: (0.98, 1.03),
}
# Asymmetric: both ends shrink by one ratio, or one end alone, in even steps down to this ratio.
ASYMMETRIC_LAST = {2: 0.25, 3: 0.55, 4: 0.78, 5: 0.92, 6: 0.95, 7: 0.97, 8: 0.985}
BOTH_ENDS = 8
ONE_END = 4


class Groups(NamedTuple):
    """A tile of groups, padded with zeros; pruned entries are zero in `kept`."""

    kept: F32  # [groups, padded length]
    low: F32  # [groups], min(0, smallest kept)
    high: F32  # [groups], max(0, largest kept)
    absmax: F32  # [groups]
    importance: F32 | None  # [groups, padded length], weights of squared errors; None = all 1


class Fit(NamedTuple):
    """Scales, zero points and what they cost, one entry a group."""

    scale: F32  # after rounding to the stored dtype
    zero_point: F32
    integers: F32  # [groups, padded length], code - zero_point
    error: F64  # sum of (weighted) squared error over kept weights


def store_scale(scale: F32, scale_dtype: str) -> F32:
    """Round to the stored dtype; no magnitude below that dtype's smallest normal number."""
    with np.errstate(over="ignore"):
        rounded = scale.astype(SCALE_DTYPES[scale_dtype]).astype(np.float32)
    tiny = SMALLEST_NORMAL[scale_dtype]
    return np.where(np.abs(rounded) < tiny, np.copysign(tiny, rounded), rounded)


def store_scale_above(scale: F32, scale_dtype: str) -> F32:
    """Round up to the stored dtype: codes made to end at the largest weight still reach it."""
    rounded = store_scale(scale, scale_dtype)
    with np.errstate(over="ignore"):
        stored = rounded.astype(SCALE_DTYPES[scale_dtype])
        above = np.nextafter(stored, stored.dtype.type(np.inf)).astype(np.float32)
    return np.where(rounded < scale, above, rounded)


def symmetric_factors(bits: int) -> F32:
    """float32 [16]: candidate scale / absmax."""
    half = float(1 << (bits - 1))
    first, last = SYMMETRIC_BOUNDS[bits]
    step = (last - first) / (CANDIDATES - 1)
    return np.array([1.0 / (half * (first + step * k)) for k in range(CANDIDATES)], np.float32)


def asymmetric_factors(bits: int) -> F32:
    """float32 [16, 2]: the ratios by which the low and the high end shrink."""
    last = ASYMMETRIC_LAST[bits]
    both = [1.0 - (1.0 - last) * (k + 1) / BOTH_ENDS for k in range(BOTH_ENDS)]
    single = [1.0 - (1.0 - last) * (k + 1) / ONE_END for k in range(ONE_END)]
    pairs = [(r, r) for r in both] + [(r, 1.0) for r in single] + [(1.0, r) for r in single]
    return np.array(pairs, np.float32)


def _zero_point(low: F32, scale: F32, top: int) -> F32:
    nearest: F32 = np.clip(np.rint(-low / scale), 0, top).astype(np.float32)
    return nearest


def _measure(
    kept: F32, scale: F32, zero_point: F32, top: int, importance: F32 | None = None
) -> Fit:
    """Codes by the reciprocal of the scale, and the error that they leave."""
    integers = kept * (np.float32(1) / scale)[:, None]
    np.rint(integers, out=integers)
    np.maximum(integers, -zero_point[:, None], out=integers)
    np.minimum(integers, (np.float32(top) - zero_point)[:, None], out=integers)
    error = kept - integers * scale[:, None]
    error *= error
    return Fit(scale, zero_point, integers, _weighted_sum(error, importance))


def _weighted_sum(terms: F32, importance: F32 | None) -> F64:
    """lane_sum of the terms, each weighed (and rounded once more) where there are weights."""
    return lane_sum(terms if importance is None else terms * importance)


def _plain(groups: Groups, bits: int, symmetric: bool, scale_dtype: str) -> tuple[F32, F32]:
    """Scale and zero point of plain rounding."""
    top = (1 << bits) - 1
    if symmetric:
        divisor = np.float32(1.5 if bits == 2 else (1 << (bits - 1)) - 1)
        # From 3 bits on the largest weight keeps the largest code, however its scale is rounded.
        store = store_scale_above if bits == 2 else store_scale
        scale = store(groups.absmax / divisor, scale_dtype)
        zero_point = np.full_like(scale, 1 << (bits - 1))
    else:
        with np.errstate(over="ignore"):
            scale = store_scale_above((groups.high - groups.low) / np.float32(top), scale_dtype)
        zero_point = _zero_point(groups.low, scale, top)
    scale[groups.absmax == 0] = 1
    return scale, zero_point


def _candidates(
    groups: Groups, bits: int, symmetric: bool, signed_scale: bool, scale_dtype: str
) -> Iterator[tuple[F32, F32]]:
    """(scale, zero point) of each candidate, in the order that breaks ties."""
    top = (1 << bits) - 1
    if symmetric:
        zero_point = np.full_like(groups.absmax, 1 << (bits - 1))
        extreme = groups.absmax
        if signed_scale:  # a negative scale turns the grid's longer side to positive weights
            extreme = np.where(groups.high >= -groups.low, -extreme, extreme)
        for factor in symmetric_factors(bits):
            yield store_scale(extreme * factor, scale_dtype), zero_point
        return
    for shrink_low, shrink_high in asymmetric_factors(bits):
        low, high = groups.low * shrink_low, groups.high * shrink_high
        with np.errstate(over="ignore"):
            scale = store_scale((high - low) / np.float32(top), scale_dtype)
        yield scale, _zero_point(low, scale, top)


def _search(
    groups: Groups, plain: Fit, bits: int, symmetric: bool, signed_scale: bool, scale_dtype: str
) -> Fit:
    """The candidate of least error, refitted by least squares, where it beats plain rounding.

    Candidates are ranked in units of their scale (fast); the winner is measured like the plain
    scale, so the result is never worse than plain on any group. Every error is weighted, that of
    `plain` and of the returned fit included.
    """
    kept, top, importance = groups.kept, np.float32((1 << bits) - 1), groups.importance
    best, best_scale = np.full(plain.error.shape, np.inf), plain.scale
    best_zero = plain.zero_point
    x, t = np.empty_like(kept), np.empty_like(kept)
    for scale, zero_point in _candidates(groups, bits, symmetric, signed_scale, scale_dtype):
        np.multiply(kept, (np.float32(1) / scale)[:, None], out=x)
        np.rint(x, out=t)
        np.maximum(t, -zero_point[:, None], out=t)
        np.minimum(t, (top - zero_point)[:, None], out=t)
        np.subtract(x, t, out=x)
        np.multiply(x, x, out=x)
        error = _weighted_sum(x, importance) * (scale.astype(np.float64) * scale.astype(np.float64))
        better = error < best
        best = np.where(better, error, best)
        best_scale = np.where(better, scale, best_scale)
        best_zero = np.where(better, zero_point, best_zero)

    found = _measure(kept, best_scale, best_zero, int(top), importance)
    squares = _weighted_sum(found.integers * found.integers, importance)
    products = _weighted_sum(kept * found.integers, importance)
    usable = squares > 0
    ratio = np.divide(products, squares, out=found.scale.astype(np.float64), where=usable)
    refit_scale = store_scale(ratio.astype(np.float32), scale_dtype)
    refit = _measure(kept, refit_scale, best_zero, int(top), importance)
    return _better(plain, _better(found, refit))


def _better(first: Fit, second: Fit) -> Fit:
    """Per group the second where its error is strictly lower."""
    take = second.error < first.error
    return Fit(
        np.where(take, second.scale, first.scale),
        np.where(take, second.zero_point, first.zero_point),
        np.where(take[:, None], second.integers, first.integers),
        np.where(take, second.error, first.error),
    )


def quantize_groups(
    w: Array,
    mask: Bool | None,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: str,
    search: str,
    signed_scale: bool,
    codes: U8 | None,
    scale: Array,
    zero_point: U8 | None,
    sums: F64,
    packed: U8 | None = None,
    column_weights: F32 | None = None,
) -> int:
    """Codes, scales and zero points of groups of columns; see docs/kernels.md.

    w, mask, codes [rows, cols], or packed in place of codes; scale, zero_point [rows, groups];
    sums float64 [rows, 3]; column_weights [cols] weigh the search's squared errors.
    Returns -1; the flat index i of the first non-finite weight; or -2 - i where the scale of
    the group that starts at flat index i does not fit `scale_dtype`. Outputs are then undefined.
    """
    rows, columns = w.shape
    sums[...] = 0
    if codes is None:
        codes = np.zeros(w.shape, np.uint8)
    if packed is not None:
        packed[...] = 0
    if rows == 0 or columns == 0:
        return -1
    whole = columns // group_size
    totals = np.zeros((rows, scale.shape[1], 3), np.float64)
    overflow = w.size
    bad = finite_index(w)
    last_row = rows if bad < 0 else bad // columns + 1
    for first_group, count, length in (
        (0, whole, group_size),
        (whole, 1, columns - whole * group_size),
    ):
        if count == 0 or length == 0:
            continue
        begin = first_group * group_size
        per_row = count * length
        step = max(1, TILE // per_row)
        for row in range(0, last_row, step):
            block = slice(row, min(row + step, last_row))
            area = (block, slice(begin, begin + per_row))
            shape = (-1, length)
            values = w[area].astype(np.float32).reshape(shape)
            keep = None if mask is None else mask[area].reshape(shape)
            importance = None
            if column_weights is not None:
                of_row = column_weights[begin : begin + per_row].reshape(shape)
                importance = np.tile(of_row, (len(values) // count, 1))
            with np.errstate(all="ignore"):
                fit, errors = _quantize_tile(
                    values, keep, importance, bits, symmetric, scale_dtype, search, signed_scale
                )
                shifted = (fit.integers + fit.zero_point[:, None])[:, :length]
                codes[area] = shifted.astype(np.uint8).reshape(-1, per_row)
                target = (block, slice(first_group, first_group + count))
                scale[target] = fit.scale.reshape(-1, count).astype(scale.dtype)
                if zero_point is not None:
                    zero_point[target] = fit.zero_point.reshape(-1, count).astype(np.uint8)
            totals[target] = errors.reshape(-1, count, 3)
            lost = np.flatnonzero(~np.isfinite(fit.scale))
            if lost.size:
                r, g = divmod(int(lost[0]), count)
                overflow = min(overflow, (row + r) * columns + begin + g * length)
                break
    sums[...] = np.cumsum(totals, axis=1)[:, -1]
    if packed is not None:
        pack_bits(codes, bits, packed)
    if bad >= 0:  # the first offending group decides; inside one, the non-finite weight
        r, c = divmod(bad, columns)
        group_start = r * columns + c // group_size * group_size
        if group_start <= overflow:
            return bad
    return -2 - overflow if overflow < w.size else -1


def _quantize_tile(
    values: F32,
    keep: Bool | None,
    importance: F32 | None,
    bits: int,
    symmetric: bool,
    scale_dtype: str,
    search: str,
    signed_scale: bool,
) -> tuple[Fit, F64]:
    """values, keep, importance [groups, length] -> the fit and float64 [groups, 3] (error, plain
    rounding's error, sum w^2), errors unweighted.
    """
    kept = values if keep is None else np.where(keep, values, np.float32(0))
    low = np.minimum(kept.min(axis=1), np.float32(0))
    high = np.maximum(kept.max(axis=1), np.float32(0))
    if importance is not None:
        importance = padded(importance)
    groups = Groups(padded(kept), low, high, np.maximum(high, -low), importance)
    scale, zero = _plain(groups, bits, symmetric, scale_dtype)
    top = (1 << bits) - 1
    plain = _measure(groups.kept, scale, zero, top)
    fit = plain
    if search == "mse":
        start = plain
        if importance is not None:
            start = _measure(groups.kept, scale, zero, top, importance)
        fit = _search(groups, start, bits, symmetric, signed_scale, scale_dtype)
        if importance is not None:
            fit = _measure(groups.kept, fit.scale, fit.zero_point, top)
        overflow = ~np.isfinite(plain.scale)
        fit = fit._replace(scale=np.where(overflow, plain.scale, fit.scale))
    energy = lane_sum(padded(values * values))
    pruned = np.zeros_like(energy)
    if keep is not None:
        pruned = lane_sum(padded(np.where(keep, np.float32(0), values * values)))
    return fit, np.stack([fit.error + pruned, plain.error + pruned, energy], axis=-1)
