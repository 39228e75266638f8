"""The sweep that corrects for its errors: its definition, its kernels, and what it is good for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from compress.kernels import dispatch
from compress.kernels.obs import MAX_SWEEP, obs_block
from compress.passes.base import CodesSpec
from compress.solvers.group_quantizer import CannotQuantize, quantize_matrix
from compress.solvers.obs_sweep import obs_sweep
from compress.solvers.triangular import inverse_factor

_EXTENSION = dispatch.load_extension()
ISAS: list[str] = _EXTENSION.available_isas() if _EXTENSION else []
GUARD = 64


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    before = dispatch.current()
    yield
    if before.native is not None:
        before.native.set_isa(before.backend.isa)
    dispatch._State.resolution = before


def correlated(columns: int, seed: int = 0, rank: int = 8) -> np.ndarray:
    """A float32 Hessian [columns, columns] of inputs that share a few directions."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((4 * columns, rank)) @ rng.standard_normal((rank, columns))
    x = mixed / np.sqrt(rank) + 0.3 * rng.standard_normal((4 * columns, columns))
    return (x.T @ x / len(x)).astype(np.float32)


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns)) * 0.02
    return values.astype(np.float32)


def hessian_error(difference: np.ndarray, hessian: np.ndarray) -> float:
    d = difference.astype(np.float64)
    return float(np.einsum("ij,jk,ik->", d, hessian.astype(np.float64), d, optimize=True))


def naive(
    w: np.ndarray,
    hessian: np.ndarray,
    scale: np.ndarray,
    group_size: int,
    bits: int,
    mask: np.ndarray,
    fixed: np.ndarray,
    damping: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and decoded weights by the published loop, in float64, without blocks."""
    damped = hessian.astype(np.float64)
    damped[np.diag_indices_from(damped)] += damping * np.diagonal(damped).mean()
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    work, codes = w.astype(np.float64), np.zeros(w.shape, np.int64)
    decoded, half = np.zeros(w.shape), 1 << (bits - 1)
    for i in range(w.shape[1]):
        s = scale[:, i // group_size].astype(np.float64)
        q = np.clip(np.rint(work[:, i] / s), -half, half - 1) * mask[:, i]
        codes[:, i] = q + half
        decoded[:, i] = np.where(fixed[:, i], w[:, i], q * s)
        error = (work[:, i] - decoded[:, i]) / upper[i, i]
        work[:, i + 1 :] -= np.outer(error, upper[i, i + 1 :])
    return codes, decoded


# ---------------------------------------------------------------- the kernel


class Case:
    """One call with random arguments; outputs lie between guard bytes."""

    def __init__(self, seed: int, n: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.n = int(rng.integers(0, 140)) if n is None else n
        self.rows, columns = int(rng.integers(0, 40)), self.n + int(rng.integers(0, 40))
        self.first = int(rng.integers(0, columns - self.n + 1))
        self.shape = (self.rows, columns)
        self.bits, groups = int(rng.integers(2, 9)), int(rng.integers(1, 5))
        self.w = rng.standard_normal(self.shape).astype(np.float32)
        upper = rng.standard_normal((self.n, self.n)) * 0.2  # below the diagonal, too: not read
        upper[np.diag_indices(self.n)] = 1 + rng.random(self.n)
        scale = (0.1 + rng.random((self.rows, groups))) * rng.choice([-0.3, 0.3])
        exact = np.where(rng.random((self.rows, self.n)) < 0.1, self.w[:, : self.n], np.nan)
        zero = rng.integers(0, 1 << self.bits, scale.shape, dtype=np.uint8)
        self.arguments: dict[str, Any] = {
            "upper": upper.astype(np.float32),
            "mask": rng.random(self.shape) < 0.5 if rng.random() < 0.5 else None,
            "exact": exact.astype(np.float32) if rng.random() < 0.5 else None,
            "scale": scale.astype(np.float32),
            "zero_point": zero if rng.random() < 0.5 else None,
            "group": np.sort(rng.integers(0, groups, self.n)),
            "bits": self.bits,
        }

    def run(self, isa: str) -> tuple[bytes, bytes]:
        dispatch._set_isa(isa)
        w_bytes = np.full(4 * self.w.size + 2 * GUARD, 0xA5, np.uint8)
        code_bytes = np.full(self.w.size + 2 * GUARD, 0xA5, np.uint8)
        w = w_bytes[GUARD:-GUARD].view(np.float32).reshape(self.shape)
        codes = code_bytes[GUARD:-GUARD].reshape(self.shape)
        w[...] = self.w
        arguments = dict(self.arguments)
        obs_block(w, self.first, arguments.pop("upper"), codes=codes, **arguments)
        return w_bytes.tobytes(), code_bytes.tobytes()


@pytest.mark.skipif(not ISAS, reason="the compiled kernels are not built")
@pytest.mark.parametrize("seed", range(60))
def test_every_instruction_set_gives_the_references_bytes(seed: int) -> None:
    case = Case(seed, MAX_SWEEP if seed == 0 else None)
    want = case.run("reference")
    for isa in ISAS:
        assert case.run(isa) == want, isa


@pytest.mark.parametrize("isa", ["reference", *ISAS])
def test_only_the_named_columns_change(isa: str) -> None:
    case = Case(3, 33)
    case.rows, case.first = 5, 4
    w = normal(5, 50)
    codes = np.full(w.shape, 0xA5, np.uint8)
    dispatch._set_isa(isa)
    before = w.copy()
    obs_block(
        w,
        4,
        np.eye(33, dtype=np.float32),
        mask=None,
        exact=None,
        scale=np.full((5, 1), 0.01, np.float32),
        zero_point=None,
        group=np.zeros(33, np.int64),
        bits=4,
        codes=codes,
    )
    inside = slice(4, 37)
    outside = [*range(4), *range(37, 50)]
    assert (w[:, outside] == before[:, outside]).all()
    assert (codes[:, outside] == 0xA5).all()
    assert codes[:, inside].max() < 16
    # Nothing correlated: codes are plain rounding's, errors what it leaves.
    rounded = np.clip(np.rint(before[:, inside] * np.float32(100)), -8, 7)
    np.testing.assert_array_equal(codes[:, inside], rounded + 8)
    np.testing.assert_allclose(w[:, inside], before[:, inside] - rounded * 0.01, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("w", np.zeros((4, 8))),
        ("w", np.zeros((4, 16), np.float32)[:, ::2]),
        ("first", 5),
        ("first", -1),
        ("upper", np.eye(4)),
        ("upper", np.zeros((4, 4), np.float32)),
        ("upper", np.ones((4, 5), np.float32)),
        ("upper", np.eye(MAX_SWEEP + 1, dtype=np.float32)),
        ("mask", np.ones((4, 7), np.bool_)),
        ("mask", np.ones((4, 8), np.uint8)),
        ("exact", np.ones((4, 8), np.float32)),
        ("scale", np.ones((3, 1), np.float32)),
        ("scale", np.full((4, 1), 1e-40, np.float32)),
        ("scale", np.full((4, 1), np.inf, np.float32)),
        ("zero_point", np.ones((4, 2), np.uint8)),
        ("group", np.full(4, 1, np.int64)),
        ("group", np.zeros(4, np.int32)),
        ("bits", 9),
        ("codes", np.zeros((4, 8), np.int8)),
    ],
)
def test_bad_arguments_are_named(name: str, value: Any) -> None:
    arguments: dict[str, Any] = {
        "w": np.zeros((4, 8), np.float32),
        "first": 0,
        "upper": np.eye(4, dtype=np.float32),
        "mask": None,
        "exact": None,
        "scale": np.ones((4, 1), np.float32),
        "zero_point": None,
        "group": np.zeros(4, np.int64),
        "bits": 4,
        "codes": np.zeros((4, 8), np.uint8),
    }
    obs_block(**arguments)
    with pytest.raises(ValueError, match=name):
        obs_block(**(arguments | {name: value}))


# ---------------------------------------------------------------- the factor


@pytest.mark.parametrize("columns", [1, 5, 128, 129, 300])
@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_is_the_inverses_cholesky_factor(columns: int, act_order: bool) -> None:
    hessian = correlated(columns)
    factor = inverse_factor(hessian, act_order=act_order)
    damped = hessian[np.ix_(factor.order, factor.order)].astype(np.float64)
    damped[np.diag_indices(columns)] += 0.01 * np.diagonal(hessian).mean()
    want = np.linalg.cholesky(np.linalg.inv(damped)).T
    np.testing.assert_allclose(factor.upper, want, atol=2e-4 * np.abs(want).max())
    assert (np.tril(factor.upper, -1) == 0).all()
    if act_order:
        assert (np.diff(np.diagonal(hessian)[factor.order]) <= 0).all()


def test_dead_columns_stand_alone() -> None:
    hessian = correlated(40)
    hessian[7] = hessian[:, 7] = 0
    factor = inverse_factor(hessian)
    assert factor.dead.tolist() == [i == 7 for i in range(40)]
    row, column = factor.upper[7].copy(), factor.upper[:, 7].copy()
    row[7] = column[7] = 0
    assert not row.any()
    assert not column.any()
    assert inverse_factor(np.zeros((3, 3))).dead.all()


def test_a_hessian_without_an_inverse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hessian is not positive definite.*raise damping"):
        inverse_factor(np.array([[1.0, 2.0], [2.0, 1.0]]))
    singular = np.ones((3, 3), np.float32)
    with pytest.raises(ValueError, match="raise damping"):
        inverse_factor(singular, damping=0)
    assert np.isfinite(inverse_factor(singular, damping=0.01).upper).all()
    for bad, words in (
        (np.ones((2, 3)), "square"),
        (np.array([[np.nan]]), "finite"),
        (np.array([[-1.0]]), "negative diagonal"),
    ):
        with pytest.raises(ValueError, match=words):
            inverse_factor(bad)
    with pytest.raises(ValueError, match="damping"):
        inverse_factor(np.eye(2), damping=-0.1)


# ---------------------------------------------------------------- the sweep


def spec(bits: int = 4, group_size: int = 32, **options: Any) -> CodesSpec:
    return CodesSpec(bits, group_size, options.pop("symmetric", True), "F16", **options)


@pytest.mark.parametrize("block_size", [1, 32, 100, 128])
def test_it_is_the_published_loop(block_size: int) -> None:
    w, hessian = normal(24, 160), correlated(160)
    rng = np.random.default_rng(5)
    mask, fixed = rng.random(w.shape) < 0.6, rng.random(w.shape) < 0.02
    swept = obs_sweep(
        w, hessian, spec(), mask=mask, protected=fixed, static=True, block_size=block_size
    )
    scale = swept.codes.scale.astype(np.float32)
    codes, decoded = naive(w, hessian, scale, 32, 4, mask & ~fixed, fixed)
    # A rounding of the other's last bit may tip a weight that lies between two codes.
    assert (swept.codes.values != codes).mean() < 2e-3
    ours = np.where(fixed, w, swept.codes.dequantize())
    error, theirs = hessian_error(w - ours, hessian), hessian_error(w - decoded, hessian)
    assert error == pytest.approx(theirs, rel=5e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["none", "mse"])
def test_it_beats_rounding_by_far(bits: int, symmetric: bool, search: str) -> None:
    w, hessian = normal(32, 128), correlated(128)
    target = spec(bits, symmetric=symmetric)
    rounded, _ = quantize_matrix(w, None, target, search=search)
    swept = obs_sweep(w, hessian, target, search=search)
    before = hessian_error(w - rounded.dequantize(), hessian)
    after = hessian_error(w - swept.codes.dequantize(), hessian)
    assert after < 0.5 * before


def test_the_error_is_that_of_the_damped_hessian() -> None:
    w, hessian = normal(20, 96), correlated(96)
    hessian[11] = hessian[:, 11] = 0
    swept = obs_sweep(w, hessian, spec(3), damping=0.05)
    live = np.arange(96) != 11
    damped = hessian.astype(np.float64)
    damped[np.diag_indices(96)] += 0.05 * np.diagonal(hessian)[live].mean()
    difference = (w - swept.codes.dequantize()) * live
    assert swept.squared_error == pytest.approx(hessian_error(difference, damped), rel=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("options", [{}, {"static": True}, {"act_order": True}], ids=str)
def test_weighted_searches_leave_less(options: dict[str, bool], symmetric: bool) -> None:
    ratios = []
    for bits in (2, 3):
        for seed in range(3):
            w = normal(32, 96, seed)
            gains = np.exp(0.4 * np.random.default_rng(seed).standard_normal(96))
            hessian = (correlated(96, seed, rank=64) * np.outer(gains, gains)).astype(np.float32)
            weighted, alike = (
                obs_sweep(w, hessian, spec(bits, symmetric=symmetric), weighted=flag, **options)
                for flag in (True, False)
            )
            ratios.append(weighted.squared_error / alike.squared_error)
    assert np.mean(ratios) < 0.99
    assert max(ratios) < 1.1


def test_weights_do_not_matter_without_a_search_or_correlation() -> None:
    w, hessian = normal(16, 96), correlated(96)
    for matrix, search in ((hessian, "none"), (np.eye(96, dtype=np.float32), "mse")):
        for options in ({}, {"act_order": True}):
            weighted, alike = (
                obs_sweep(w, matrix, spec(3), search=search, weighted=flag, **options)
                for flag in (True, False)
            )
            np.testing.assert_array_equal(weighted.codes.values, alike.codes.values)
            np.testing.assert_array_equal(weighted.codes.scale, alike.codes.scale)


def test_weights_follow_their_columns_in_any_order() -> None:
    """One column counts for nearly everything: its group's scale fits it, wherever it is."""
    w = normal(32, 96)
    gains = np.where(np.arange(96) == 70, 1e3, 1.0)
    hessian = np.diag(gains**2).astype(np.float32)
    for options in ({}, {"static": True}, {"act_order": True}):
        swept, alike = (
            obs_sweep(w, hessian, spec(2), weighted=flag, **options) for flag in (True, False)
        )
        error, limit = (
            float(((w - s.codes.dequantize())[:, 70] ** 2).sum()) for s in (swept, alike)
        )
        assert error < 0.25 * limit
        np.testing.assert_array_equal(swept.codes.scale[:, :2], alike.codes.scale[:, :2])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_pruned_entries_stay_zero(act_order: bool, symmetric: bool) -> None:
    w, hessian = normal(16, 96), correlated(96)
    mask = np.random.default_rng(1).random(w.shape) < 0.5
    target = spec(symmetric=symmetric)
    swept = obs_sweep(w, hessian, target, mask=mask, act_order=act_order)
    decoded = swept.codes.dequantize()
    assert (decoded[~mask] == 0).all()
    rounded, _ = quantize_matrix(w, mask, target)
    assert hessian_error(w - decoded, hessian) < 0.6 * hessian_error(
        w - rounded.dequantize(), hessian
    )


def test_protected_entries_are_exact_and_leave_the_scales_alone() -> None:
    w, hessian = normal(16, 96), correlated(96)
    fixed = np.zeros(w.shape, np.bool_)
    fixed[3, 10] = fixed[9, 70] = True
    w[3, 10], w[9, 70] = 5.0, -7.0
    swept = obs_sweep(w, hessian, spec(), protected=fixed)
    assert np.abs(swept.codes.scale.astype(np.float32)).max() < 0.1
    decoded = swept.codes.dequantize()
    assert (decoded[fixed] == 0).all()  # the code of zero: its value is kept elsewhere
    decoded[fixed] = w[fixed]
    exempt = hessian_error(w - decoded, hessian)
    plain = w.copy()
    plain[fixed] = 0
    baseline = obs_sweep(plain, hessian, spec())
    assert exempt < 1.2 * hessian_error(plain - baseline.codes.dequantize(), hessian)


def test_act_order_helps_where_few_columns_matter() -> None:
    w = normal(32, 128)
    loud = np.where(np.arange(128) >= 120, 20.0, 1.0)  # the last ones: too late without it
    hessian = (correlated(128, rank=64) * np.outer(loud, loud)).astype(np.float32)
    plain = obs_sweep(w, hessian, spec(3), static=True, weighted=False)
    ordered = obs_sweep(w, hessian, spec(3), act_order=True, weighted=False)
    np.testing.assert_array_equal(plain.codes.scale, ordered.codes.scale)
    before = hessian_error(w - plain.codes.dequantize(), hessian)
    assert hessian_error(w - ordered.codes.dequantize(), hessian) < 0.9 * before


@pytest.mark.parametrize("group_size", [7, 32, 48, 150, 200, 1000])
@pytest.mark.parametrize("columns", [1, 31, 150])
def test_any_size_and_group(columns: int, group_size: int) -> None:
    w, hessian = normal(19, columns), correlated(columns)
    target = spec(4, group_size)
    one = obs_sweep(w, hessian, target, block_size=64)
    assert one.codes.scale.shape == (19, -(-columns // group_size))
    difference = w - one.codes.dequantize()
    rounded, _ = quantize_matrix(w, None, target)
    assert hessian_error(difference, hessian) <= 1.01 * hessian_error(
        w - rounded.dequantize(), hessian
    )
    two = obs_sweep(w, hessian, target, block_size=64, workers=2)
    assert (two.codes.values == one.codes.values).all()
    assert (two.codes.scale == one.codes.scale).all()


def test_dynamic_scales_see_the_corrected_weights() -> None:
    w, hessian = normal(32, 128), correlated(128)
    dynamic = obs_sweep(w, hessian, spec(), search="none")
    fixed = obs_sweep(w, hessian, spec(), search="none", static=True)
    np.testing.assert_array_equal(dynamic.codes.scale[:, 0], fixed.codes.scale[:, 0])
    assert (dynamic.codes.scale[:, 1] != fixed.codes.scale[:, 1]).any()
    assert (fixed.codes.scale == quantize_matrix(w, None, spec(), search="none")[0].scale).all()


@pytest.mark.parametrize(("group_size", "block_size"), [(128, 64), (256, 128), (100, 32)])
def test_scales_do_not_depend_on_the_block(group_size: int, block_size: int) -> None:
    """A group's scale is chosen once all of its columns are corrected, coded in pieces or not."""
    w, hessian = normal(32, 512), correlated(512)
    sizes = (block_size, group_size)
    some, whole = (
        obs_sweep(w, hessian, spec(group_size=group_size), search="none", block_size=size)
        for size in sizes
    )
    # Sums in another order may move a scale to the next float16.
    step = np.abs(some.codes.scale.astype(np.float32) - whole.codes.scale.astype(np.float32))
    assert (step <= 2**-10 * np.abs(whole.codes.scale.astype(np.float32))).all()
    assert (some.codes.scale == whole.codes.scale).mean() > 0.9


def test_one_scale_for_the_tensor() -> None:
    w, hessian = normal(8, 64), correlated(64)
    swept = obs_sweep(w, hessian, spec(8, 64, per_tensor=True))
    assert swept.codes.scale.shape == (1, 1)
    assert np.abs(w - swept.codes.dequantize()).max() < 3 * np.abs(w).max() / 127


def test_arguments_that_do_not_fit_are_named() -> None:
    w, hessian = normal(8, 64), correlated(64)
    for options, words in (
        ({"mask": np.ones((8, 63), np.bool_)}, "mask must be bool"),
        ({"protected": np.ones((8, 64), np.uint8)}, "protected must be bool"),
        ({"block_size": 0}, "block_size must be 1 to 256"),
        ({"block_size": 257}, "block_size must be 1 to 256"),
        ({"workers": 0}, "workers must be positive"),
        ({"damping": -1.0}, "damping must not be negative"),
    ):
        with pytest.raises(ValueError, match=words):
            obs_sweep(w, hessian, spec(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hessian must be"):
        obs_sweep(w, hessian[:63], spec())
    with pytest.raises(ValueError, match="values must have two axes"):
        obs_sweep(w[0], hessian, spec())


def test_weights_that_cannot_be_coded_are_found() -> None:
    w, hessian = normal(40, 64), correlated(64)
    w[37, 50] = np.nan
    with pytest.raises(CannotQuantize) as found:
        obs_sweep(w, hessian, spec())
    assert (found.value.row, found.value.column, found.value.overflow) == (37, 50, False)
    w[37, 50] = 3e38
    with pytest.raises(CannotQuantize) as found:
        obs_sweep(w, hessian, spec(), workers=2)
    assert (found.value.row, found.value.column, found.value.overflow) == (37, 32, True)
