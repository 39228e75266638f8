"""What the kernels promise, checked against formulas written out here in plain numpy or Python."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import kernels
from compress.errors import CompressError, UsageError
from compress.kernels import dispatch

BF16 = np.dtype(ml_dtypes.bfloat16)
WEIGHT_DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]
TINY = {"F16": 2.0**-14, "BF16": 2.0**-126, "F32": 2.0**-126}


@pytest.fixture(autouse=True, params=["reference", "compiled"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every fact must hold for the numpy definition and for the compiled kernels alike."""
    if request.param == "compiled" and dispatch.load_extension() is None:
        pytest.skip("the compiled kernels are not built")
    before = dispatch.current()
    dispatch._set_isa("reference" if request.param == "reference" else "")
    yield
    if before.native is not None:
        before.native.set_isa(before.backend.isa)
    dispatch._State.resolution = before


class Result(NamedTuple):
    status: int
    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    sums: np.ndarray
    bits: int
    group_size: int

    def decode(self) -> np.ndarray:
        columns = self.codes.shape[1]
        group = np.arange(columns) // self.group_size
        zero: Any = 1 << (self.bits - 1)
        if self.zero_point is not None:
            zero = self.zero_point.astype(np.float32)[:, group]
        return (self.codes.astype(np.float32) - zero) * self.scale.astype(np.float32)[:, group]


def quantize(
    w: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = True,
    scale_dtype: str = "F16",
    search: str = "none",
    signed_scale: bool = True,
    column_weights: np.ndarray | None = None,
) -> Result:
    rows, columns = w.shape
    groups = -(-columns // group_size)
    codes = np.full(w.shape, 0xA5, np.uint8)
    scale = np.full((rows, groups), 1.5, kernels.SCALE_DTYPES[scale_dtype])
    zero_point = None if symmetric else np.full((rows, groups), 0xA5, np.uint8)
    sums = np.full((rows, 3), 7.0)
    status = kernels.quantize_groups(
        w,
        mask,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        search=search,
        signed_scale=signed_scale,
        codes=codes,
        scale=scale,
        zero_point=zero_point,
        sums=sums,
        column_weights=column_weights,
    )
    return Result(status, codes, scale, zero_point, sums, bits, group_size)


def normal(rows: int, columns: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return (values * np.float32(0.02)).astype(dtype)


# ---------------------------------------------------------------- quantization


def stored_above(scale: np.float32, scale_dtype: str) -> Any:
    """The smallest number of the type that is no smaller."""
    kind = kernels.SCALE_DTYPES[scale_dtype].type
    nearest = kind(scale)
    return nearest if np.float32(nearest) >= scale else np.nextafter(nearest, kind(np.inf))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale_dtype", ["F16", "BF16", "F32"])
def test_plain_symmetric_is_the_formula(bits: int, scale_dtype: str) -> None:
    w = normal(5, 96, bits)
    got = quantize(w, bits=bits, scale_dtype=scale_dtype)
    assert got.status == -1
    half = 1 << (bits - 1)
    for row in range(5):
        for g in range(3):
            group = w[row, 32 * g : 32 * g + 32]
            divisor = np.float32(1.5 if bits == 2 else half - 1)
            exact = np.abs(group).max() / divisor
            scale = exact.astype(kernels.SCALE_DTYPES[scale_dtype])
            if bits == 2:
                scale = stored_above(exact, scale_dtype)
            assert got.scale[row, g] == scale
            inverse = np.float32(1) / np.float32(scale)
            codes = np.clip(np.rint(group * inverse), -half, half - 1) + half
            np.testing.assert_array_equal(got.codes[row, 32 * g : 32 * g + 32], codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("search", ["none", "mse"])
def test_codes_may_be_packed_at_once(bits: int, search: str) -> None:
    w = normal(5, 101, bits)
    apart = quantize(w, bits=bits, search=search)
    width = (101 * bits + 7) // 8 + 2
    want, got = np.zeros((5, width), np.uint8), np.full((5, width), 0xA5, np.uint8)
    kernels.pack_bits(apart.codes, bits, want)
    scale, sums = np.zeros_like(apart.scale), np.zeros((5, 3))
    options: dict[str, Any] = {
        "bits": bits,
        "group_size": 32,
        "symmetric": True,
        "scale_dtype": "F16",
        "search": search,
        "signed_scale": True,
        "scale": scale,
        "zero_point": None,
        "sums": sums,
    }
    assert kernels.quantize_groups(w, None, codes=None, packed=got, **options) == -1
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(scale, apart.scale)
    np.testing.assert_array_equal(sums, apart.sums)
    for codes, packed in ((None, None), (apart.codes, got)):
        with pytest.raises(ValueError, match="codes or packed must be given, and not both"):
            kernels.quantize_groups(w, None, codes=codes, packed=packed, **options)
    with pytest.raises(ValueError, match="packed array must be"):
        kernels.quantize_groups(w, None, codes=None, packed=got[:, :3].copy(), **options)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale_dtype", ["F16", "BF16", "F32"])
def test_plain_asymmetric_is_the_formula(bits: int, scale_dtype: str) -> None:
    w = normal(4, 64, bits) + np.float32(0.01)
    got = quantize(w, bits=bits, symmetric=False, scale_dtype=scale_dtype)
    assert got.zero_point is not None
    top = (1 << bits) - 1
    for row in range(4):
        for g in range(2):
            group = w[row, 32 * g : 32 * g + 32]
            low, high = min(group.min(), np.float32(0)), max(group.max(), np.float32(0))
            stored = stored_above((high - low) / np.float32(top), scale_dtype)
            scale = np.float32(stored)
            zero = np.clip(np.rint(-low / scale), 0, top)
            assert got.scale[row, g] == stored
            assert got.zero_point[row, g] == zero
            codes = np.clip(np.rint(group * (np.float32(1) / scale)) + zero, 0, top)
            np.testing.assert_array_equal(got.codes[row, 32 * g : 32 * g + 32], codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale_dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e4, 3.3e38])
def test_weights_in_range_decode_to_half_a_scale(
    bits: int, scale_dtype: str, magnitude: float
) -> None:
    """Also where the reciprocal of the scale is subnormal, and for weights between two codes."""
    if magnitude > 1e5 and scale_dtype == "F16":
        magnitude = 65504.0
    rng = np.random.default_rng(bits)
    for symmetric in (True, False):
        w = rng.uniform(-1, 1, (64, 96)).astype(np.float32)
        w[1:] = np.round(w[1:] * (1 << bits)) / np.float32(1 << bits)
        w *= np.float32(magnitude if symmetric else magnitude / 2)
        w[::5] = w[::5].astype(BF16).astype(np.float32)
        for search in ("none", "mse"):
            got = quantize(
                w, bits=bits, scale_dtype=scale_dtype, symmetric=symmetric, search=search
            )
            assert got.status == -1
            # The search may cut off the ends of a range; plain rounding never does.
            bound = search == "none" or (got.codes > 0) & (got.codes < (1 << bits) - 1)
            scale = np.abs(got.scale.astype(np.float64)).repeat(32, axis=1)
            # With 2 bits the code -2 may lie beyond float32: a decode ends at the largest number.
            largest = float(np.finfo(np.float32).max)
            with np.errstate(over="ignore"):
                decoded = np.clip(got.decode().astype(np.float64), -largest, largest)
            error = np.abs(w.astype(np.float64) - decoded)
            assert (error <= scale / 2 * (1 + 2.0**-10))[bound].all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("signed_scale", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_search_never_loses_to_plain_on_any_group(
    bits: int, symmetric: bool, signed_scale: bool
) -> None:
    rng = np.random.default_rng(bits)
    w = (rng.standard_t(3, (64, 160)) * 0.02).astype(np.float32)
    w[:8] = np.abs(w[:8])
    w[8:12] = np.round(w[8:12] * 50) / 50
    options: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "group_size": 32}
    plain = quantize(w, **options)
    found = quantize(w, search="mse", signed_scale=signed_scale, **options)
    shape = (64, 5, 32)
    error = ((w - found.decode()).astype(np.float64) ** 2).reshape(shape).sum(axis=2)
    limit = ((w - plain.decode()).astype(np.float64) ** 2).reshape(shape).sum(axis=2)
    assert (error <= limit * (1 + 1e-5) + 1e-12).all()
    assert (found.sums[:, 0] <= found.sums[:, 1]).all()
    np.testing.assert_array_equal(found.sums[:, 1], plain.sums[:, 0])
    assert error.sum() < 0.99 * limit.sum()


def test_search_beats_a_plain_clip_grid() -> None:
    """A third of the candidates of an exhaustive unsigned clip search, and a lower error."""
    w = normal(64, 256, 3)
    groups = w.reshape(-1, 64)
    best = np.full(len(groups), np.inf)
    for ratio in np.linspace(1.0, 0.5, 48):
        scale = (np.abs(groups).max(axis=1, keepdims=True) * ratio / 7).astype(np.float16)
        scale32 = scale.astype(np.float32)
        q = np.clip(np.rint(groups / scale32), -8, 7)
        best = np.minimum(best, ((groups - q * scale32) ** 2).sum(axis=1))
    got = quantize(w, group_size=64, search="mse")
    assert got.sums[:, 0].sum() < 0.97 * best.sum()


def weighted_errors(w: np.ndarray, got: Result, weights: np.ndarray) -> np.ndarray:
    """float64 [rows, groups] of 32 columns."""
    error = (w.astype(np.float64) - got.decode()) ** 2 * weights.astype(np.float64)
    return error.reshape(len(w), -1, 32).sum(axis=2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_minimizes_the_weighted_error(bits: int, symmetric: bool) -> None:
    w = normal(64, 160, bits)
    weights = (10.0 ** np.random.default_rng(bits).uniform(-3, 1, 160)).astype(np.float32)
    weights[::7] = 0
    options: dict[str, Any] = {"bits": bits, "symmetric": symmetric}
    plain, alike = quantize(w, **options), quantize(w, search="mse", **options)
    found = quantize(w, search="mse", column_weights=weights, **options)
    assert found.status == -1
    error = weighted_errors(w, found, weights)
    assert (error <= weighted_errors(w, plain, weights) * (1 + 1e-5)).all()
    assert error.sum() < 0.9 * weighted_errors(w, alike, weights).sum()
    # The sums know no weights.
    unweighted = weighted_errors(w, found, np.ones(160)).sum(axis=1)
    np.testing.assert_allclose(found.sums[:, 0], unweighted, rtol=1e-5)
    np.testing.assert_array_equal(found.sums[:, 1:], alike.sums[:, 1:])


@pytest.mark.parametrize("symmetric", [True, False])
def test_equal_weights_change_nothing_and_zeros_leave_plain_rounding(symmetric: bool) -> None:
    w, mask = normal(8, 101), np.random.default_rng(2).random((8, 101)) < 0.7
    plain, alike, found, nothing = (
        quantize(w, mask, symmetric=symmetric, search=search, column_weights=weights)
        for search, weights in (
            ("none", None),
            ("mse", None),
            ("mse", np.full(101, 0.25, np.float32)),
            ("mse", np.zeros(101, np.float32)),
        )
    )
    for got, want in ((found, alike), (nothing, plain)):
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    ignored = quantize(
        w, mask, symmetric=symmetric, column_weights=np.arange(101, dtype=np.float32)
    )
    np.testing.assert_array_equal(ignored.codes, plain.codes)
    assert (alike.codes != plain.codes).any()


def test_columns_of_weight_zero_have_no_say() -> None:
    w = normal(16, 64)
    counted = np.arange(64) % 32 < 20
    found = quantize(w, search="mse", column_weights=counted.astype(np.float32))
    best = quantize(np.where(counted, w, np.float32(0)), search="mse")
    error = weighted_errors(w, found, counted)
    # Candidates are spread around the largest weight of the group, and that one may not count.
    assert error.sum() < 1.1 * weighted_errors(w, best, counted).sum()
    assert error.sum() < 0.9 * weighted_errors(w, quantize(w, search="mse"), counted).sum()


@pytest.mark.parametrize(
    "weights",
    [
        np.ones(63, np.float32),
        np.ones(64),
        np.ones(128, np.float32)[::2],
        np.where(np.arange(64) == 5, np.float32(-1), np.float32(1)),
        np.where(np.arange(64) == 5, np.float32(np.nan), np.float32(1)),
        np.where(np.arange(64) == 5, np.float32(np.inf), np.float32(1)),
    ],
    ids=["short", "float64", "strided", "negative", "nan", "infinite"],
)
def test_bad_column_weights_are_named(weights: np.ndarray) -> None:
    with pytest.raises(ValueError, match="column_weights must"):
        quantize(normal(2, 64), search="mse", column_weights=weights)


def test_signed_scale_gives_the_long_side_to_the_positive_extreme() -> None:
    w = np.zeros((1, 16), np.float32)
    w[0, :9] = [8, 7, -7, 6, -6, 5, 3, 1, -2]
    signed = quantize(w, group_size=16, search="mse")
    assert signed.scale[0, 0] == np.float16(-1)
    np.testing.assert_array_equal(signed.decode(), w)
    unsigned = quantize(w, group_size=16, search="mse", signed_scale=False)
    assert unsigned.scale[0, 0] > 0
    assert unsigned.sums[0, 0] > 0


def test_a_negative_extreme_uses_the_long_side_without_a_signed_scale() -> None:
    w = -np.array([[8, 7, -7, 6, -6, 5, 3, 1]], np.float32)
    got = quantize(w, group_size=8, search="mse", signed_scale=False)
    assert got.scale[0, 0] == np.float16(1)
    assert got.sums[0, 0] == 0


@pytest.mark.parametrize("search", ["none", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pruned_weights_decode_to_zero_and_leave_the_scale_alone(
    symmetric: bool, search: str
) -> None:
    w = normal(6, 128, 1)
    mask = np.random.default_rng(2).random(w.shape) < 0.5
    options: dict[str, Any] = {"symmetric": symmetric, "search": search}
    loud = np.where(mask, w, np.float32(1000))
    got, want = quantize(loud, mask, **options), quantize(np.where(mask, w, 0), **options)
    np.testing.assert_array_equal(got.codes, want.codes)
    np.testing.assert_array_equal(got.scale, want.scale)
    assert (got.decode()[~mask] == 0).all()
    pruned = (~mask).sum(axis=1) * 1e6
    np.testing.assert_allclose(got.sums[:, 0], want.sums[:, 0] + pruned, rtol=1e-6)
    np.testing.assert_allclose(got.sums[:, 1], want.sums[:, 1] + pruned, rtol=1e-6)


def test_a_group_without_kept_weights_has_scale_one() -> None:
    w = normal(1, 64, 5)
    mask = np.ones(w.shape, bool)
    mask[0, :32] = False
    for symmetric in (True, False):
        got = quantize(w, mask, symmetric=symmetric, search="mse")
        assert got.scale[0, 0] == 1
        assert (got.codes[0, :32] == (8 if symmetric else 0)).all()
        assert got.zero_point is None or got.zero_point[0, 0] == 0


@pytest.mark.parametrize("search", ["none", "mse"])
def test_asymmetric_zero_is_exact_in_one_sided_groups(search: str) -> None:
    w = np.abs(normal(3, 64, 7)) + np.float32(1)
    w[1] *= -1
    w[:, ::5] = 0
    got = quantize(w, symmetric=False, search=search)
    assert (got.decode()[:, ::5] == 0).all()


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda d: d.name)
def test_sums_are_the_squared_errors(dtype: np.dtype) -> None:
    w = normal(4, 9000, 9, dtype)
    for group_size in (64, 5000, 9000):
        got = quantize(w, group_size=group_size, search="mse")
        wide = w.astype(np.float64)
        error = ((wide - got.decode()) ** 2).sum(axis=1)
        np.testing.assert_allclose(got.sums[:, 0], error, rtol=1e-4)
        np.testing.assert_allclose(got.sums[:, 2], (wide**2).sum(axis=1), rtol=1e-5)


def test_a_short_last_group_is_a_group_of_its_own() -> None:
    w = normal(3, 75, 11)
    whole = quantize(w, search="mse")
    tail = quantize(np.ascontiguousarray(w[:, 64:]), search="mse")
    np.testing.assert_array_equal(whole.codes[:, 64:], tail.codes)
    np.testing.assert_array_equal(whole.scale[:, 2:], tail.scale)


def test_one_scale_for_a_tensor_longer_than_a_16_bit_index() -> None:
    w = normal(1, 100_000, 12)
    w[0, 99_999] = 1
    got = quantize(w, group_size=100_000)
    assert got.scale[0, 0] == np.float16(np.float32(1) / np.float32(7))
    assert got.codes[0, -1] == 15


@pytest.mark.parametrize("scale_dtype", ["F16", "BF16", "F32"])
def test_scales_stay_normal(scale_dtype: str) -> None:
    smallest = np.float32(1e-44)
    w = np.full((2, 32), smallest, np.float32)
    w[1] *= -1
    for search in ("none", "mse"):
        got = quantize(w, scale_dtype=scale_dtype, search=search)
        assert got.status == -1
        assert (np.abs(got.scale.astype(np.float64)) == TINY[scale_dtype]).all()


def test_fp16_subnormal_weights_are_read_exactly() -> None:
    w = (np.arange(1, 33, dtype=np.uint16)).view(np.float16).reshape(1, 32)
    got = quantize(w, bits=8, scale_dtype="F32")
    assert got.scale[0, 0] == np.float32(32 * 2.0**-24) / np.float32(127)


def test_a_scale_that_does_not_fit_is_reported_by_its_group() -> None:
    w = np.ones((2, 64), np.float32)
    w[1, 40] = 65504 * 7.1
    for search in ("none", "mse"):
        assert quantize(w, search=search).status == -2 - (64 + 32)
        assert quantize(w, scale_dtype="BF16", search=search).status == -1
    w[1, 40] = 65504 * 7
    assert quantize(w).status == -1


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_non_finite_weight_is_named(dtype: np.dtype, value: float) -> None:
    w = normal(3, 100, 13, dtype)
    assert kernels.finite_index(w) == -1
    w[2, 99] = value
    assert kernels.finite_index(w) == 299
    w[1, 37] = value
    mask = np.ones(w.shape, bool)
    mask[1, 37] = False
    assert kernels.finite_index(w) == 137
    assert quantize(w).status == 137
    assert quantize(w, mask, search="mse").status == 137
    assert quantize(w, symmetric=False, group_size=7).status == 137


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    got = quantize(np.empty(shape, np.float32))
    assert got.status == -1
    assert (got.sums == 0).all()
    kernels.pack_bits(got.codes, 4, np.empty((shape[0], 4), np.uint8))
    assert kernels.finite_index(np.empty(shape, np.float32)) == -1


# ---------------------------------------------------------------- magnitudes


def test_nothing_runs_over_the_rows_of_an_empty_matrix() -> None:
    rows = (1 << 48) - 1  # as many as a file's header may name; a loop over them takes days
    none, floats = np.empty((rows, 0), np.uint8), np.empty((rows, 0), np.float32)
    kernels.pack_bits(none, 4, none)
    kernels.unpack_bits(none, 4, none)
    kernels.dequantize(none, floats, None, 4, 32, floats)
    kernels.bitmask_expand(none, none[0], 0, none)
    assert kernels.bitmask_compress(none, none.view(np.bool_), none, none[0]) == 0
    with pytest.raises(ValueError, match="keeps 0 values, but 1"):
        kernels.bitmask_expand(none, np.zeros(1, np.uint8), 0, none)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("n", [1, 31, 1000, 70_001])
def test_histogram_and_mask_select_the_largest(dtype: np.dtype, n: int) -> None:
    w = normal(1, n, n, dtype)
    counts = np.ones(1 << 15, np.uint64)
    kernels.magnitude_histogram(w, counts)
    assert counts.sum() == (1 << 15) + n
    counts -= np.uint64(1)
    keep = n // 2
    magnitude = np.sort(np.abs(w.reshape(-1)).astype(np.float32))[::-1]
    # Walk down from the largest bin, then (float32) through the bin's own low bits.
    prefix, above = _cut(counts, keep)
    key, ties = prefix, keep - above
    if dtype == np.float32:
        low = np.zeros(1 << 16, np.uint64)
        kernels.magnitude_histogram_low(w, prefix, low)
        assert low.sum() == counts[prefix]
        tail, above_low = _cut(low, keep - above)
        key, ties = prefix << 16 | tail, keep - above - above_low
    mask = np.empty(w.shape, bool)
    assert kernels.threshold_mask(w, key, ties, mask) == ties
    assert mask.sum() == keep
    kept = np.sort(np.abs(w[mask]).astype(np.float32))[::-1]
    np.testing.assert_array_equal(kept, magnitude[:keep])


def _cut(counts: np.ndarray, keep: int) -> tuple[int, int]:
    """The bin that holds the keep-th largest entry, and how many lie above it."""
    above = 0
    for index in range(counts.size - 1, -1, -1):
        count = int(counts[index])
        if above + count >= keep and (count or keep == 0):
            return index, above
        above += count
    raise AssertionError("fewer entries than wanted")


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda d: d.name)
def test_ties_are_cut_in_flat_order(dtype: np.dtype) -> None:
    w = np.full((3, 50), 0.5, dtype)
    w[:, ::2] = -0.5
    w[2, 49] = 1
    bits = int(np.array([0.5], dtype).view(f"u{dtype.itemsize}")[0])
    for ties in (0, 1, 33, 64, 149, 1000):
        mask = np.empty(w.shape, bool)
        assert kernels.threshold_mask(w, bits, ties, mask) == min(ties, 149)
        want = np.arange(150) < ties
        want[149] = True
        np.testing.assert_array_equal(mask.reshape(-1), want)


def test_a_key_above_16_bit_floats_keeps_nothing() -> None:
    mask = np.empty((1, 40), bool)
    assert kernels.threshold_mask(normal(1, 40, 0, np.float16), 1 << 20, 9, mask) == 0
    assert not mask.any()


# ---------------------------------------------------------------- bits


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(0, 4),
    n=st.integers(0, 300),
    extra=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_packing_is_the_bit_stream(bits: int, rows: int, n: int, extra: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, n), dtype=np.uint8)
    width = (n * bits + 7) // 8 + extra
    packed = np.full((rows, width), 0xA5, np.uint8)
    kernels.pack_bits(codes, bits, packed)
    for row in range(rows):
        stream = 0
        for i, code in enumerate(codes[row].tolist()):
            stream |= code << (i * bits)
        assert packed[row].tobytes() == stream.to_bytes(width, "little")
    back = np.full((rows, n), 0xA5, np.uint8)
    kernels.unpack_bits(packed, bits, back)
    np.testing.assert_array_equal(back, codes)


def test_four_bit_packing_puts_the_first_code_low() -> None:
    packed = np.empty((1, 2), np.uint8)
    kernels.pack_bits(np.array([[1, 2, 15]], np.uint8), 4, packed)
    assert packed.tolist() == [[0x21, 0x0F]]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([np.uint8, np.float16, np.float32, np.float64]),
    rows=st.integers(0, 4),
    n=st.integers(0, 150),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_bitmask_round_trip(dtype: Any, rows: int, n: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 100, (rows, n)).astype(dtype)
    mask = rng.random((rows, n)) < density
    bits = np.full((rows, (n + 7) // 8), 0xA5, np.uint8)
    kept = np.empty(int(mask.sum()), dtype)
    assert kernels.bitmask_compress(values, mask, bits, kept) == kept.size
    np.testing.assert_array_equal(bits, np.packbits(mask, axis=1, bitorder="little"))
    np.testing.assert_array_equal(kept, values[mask])
    out = np.empty_like(values)
    kernels.bitmask_expand(bits, kept, 7, out)
    np.testing.assert_array_equal(out, np.where(mask, values, dtype(7)))


def test_a_bitmask_that_disagrees_with_its_values_is_refused() -> None:
    bits = np.array([[0b111]], np.uint8)
    out = np.empty((1, 2), np.float32)
    kernels.bitmask_expand(bits, np.ones(2, np.float32), 0, out)  # the third bit is padding
    for count in (1, 3):
        with pytest.raises(ValueError, match="keeps 2 values"):
            kernels.bitmask_expand(bits, np.ones(count, np.float32), 0, out)


# ---------------------------------------------------------------- float32 matrices


def test_dequantize_is_one_rounding_a_weight() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (3, 50), dtype=np.uint8)
    scale = rng.standard_normal((3, 3)).astype(np.float32)
    zero = rng.integers(0, 16, (3, 3), dtype=np.uint8)
    out = np.empty((3, 50), np.float32)
    for zero_point in (None, zero):
        kernels.dequantize(codes, scale, zero_point, 4, 20, out)
        for row, column in np.ndindex(3, 50):
            z = 8 if zero_point is None else int(zero_point[row, column // 20])
            want = np.float32(int(codes[row, column]) - z) * scale[row, column // 20]
            assert out[row, column] == want


def test_low_rank_is_sequential_rank_one_updates() -> None:
    rng = np.random.default_rng(1)
    for rows, columns, rank in ((3, 70, 5), (2, 64, 200), (1, 1, 1), (4, 9, 0)):
        matrix = rng.standard_normal((rows, columns)).astype(np.float32)
        b = rng.standard_normal((rows, rank)).astype(np.float32)
        a = rng.standard_normal((rank, columns)).astype(np.float32)
        want = matrix.copy()
        for k in range(rank):
            want = want + np.outer(b[:, k], a[k])
        kernels.add_low_rank(matrix, b, a)
        np.testing.assert_array_equal(matrix, want)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda d: d.name)
def test_error_sums_and_norms(dtype: np.dtype) -> None:
    w = normal(3, 5000, 21, dtype)
    decoded = w.astype(np.float32) + normal(3, 5000, 22)
    sums = np.array([1.0, 2.0])
    kernels.error_sums(w, decoded, sums)
    wide = w.astype(np.float64)
    np.testing.assert_allclose(sums[0], 1 + ((wide - decoded) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums[1], 2 + (wide**2).sum(), rtol=1e-5)
    norms = np.empty(3)
    kernels.squared_norms(w, norms)
    np.testing.assert_allclose(norms, (wide**2).sum(axis=1), rtol=1e-5)


# ---------------------------------------------------------------- refusals


def test_wrong_arrays_are_value_errors() -> None:
    w = normal(4, 64)
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        kernels.finite_index(w.astype(np.float64))
    with pytest.raises(ValueError, match="C-contiguous"):
        kernels.finite_index(w.T)
    with pytest.raises(ValueError, match="shape"):
        kernels.threshold_mask(w, 0, 0, np.empty((4, 63), bool))
    with pytest.raises(ValueError, match="bits must be"):
        quantize(w, bits=9)
    with pytest.raises(ValueError, match="search must be"):
        quantize(w, search="best")
    with pytest.raises(ValueError, match="at least 32"):
        kernels.pack_bits(np.zeros((4, 64), np.uint8), 4, np.empty((4, 31), np.uint8))
    with pytest.raises(ValueError, match="at least 256"):
        kept = np.empty(255, np.float32)
        kernels.bitmask_compress(w, np.ones(w.shape, bool), np.empty((4, 8), np.uint8), kept)
    frozen = np.empty((4, 64), bool)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        kernels.threshold_mask(w, 0, 0, frozen)


def test_unaligned_weights_are_read_in_place() -> None:
    raw = np.zeros(4 * 100 + 1, np.uint8)
    w = raw[1:].view(np.float32)
    w[:] = normal(1, 100, 3)[0]
    assert not w.flags.aligned
    norms = np.empty(1)
    kernels.squared_norms(w.reshape(1, 100), norms)
    np.testing.assert_allclose(norms[0], (w.astype(np.float64) ** 2).sum(), rtol=1e-5)


# ---------------------------------------------------------------- resolution


def test_an_unknown_instruction_set_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="COMPRESS_ISA=sse9"):
        dispatch.resolve("sse9")


def test_a_missing_extension_falls_back_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "load_extension", lambda: None)
    resolution = dispatch.resolve("")
    assert resolution.backend.name == "reference"
    assert "not installed" in resolution.backend.reason
    with pytest.raises(UsageError, match="not installed"):
        dispatch.resolve("base")


def test_a_broken_extension_is_not_mistaken_for_a_missing_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "_broken.cpython.so"
    path.write_bytes(b"\x7fELF truncated")

    def load(_name: str) -> Any:
        spec = importlib.util.spec_from_file_location("_broken", path)
        assert spec is not None
        return importlib.util.module_from_spec(spec)

    monkeypatch.setattr(dispatch.importlib, "import_module", load)
    with pytest.raises(CompressError, match="do not load") as caught:
        dispatch.resolve("")
    assert caught.value.exit_code == 1
