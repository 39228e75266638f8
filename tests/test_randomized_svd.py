"""The truncated SVD against full decompositions, on easy and on flat spectra."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from compress.passes.base import CodesSpec
from compress.solvers import randomized_svd
from compress.solvers.group_quantizer import quantize_matrix
from compress.solvers.randomized_svd import generator, truncated_svd

Matrix = NDArray[np.float32]
KINDS = ["residual", "gaussian", "power law", "low rank and noise", "heavy tails", "equal values"]


@cache
def make(kind: str, rows: int, columns: int, seed: int = 0) -> Matrix:
    random = np.random.default_rng(seed)
    noise: Matrix = random.standard_normal((rows, columns)).astype(np.float32)
    if kind == "gaussian":
        return noise
    if kind == "residual":  # what 3-bit rounding leaves
        codes, _ = quantize_matrix(noise, None, CodesSpec(3, 32, True, "F16"), search="none")
        noise -= codes.dequantize()
        return noise
    if kind == "heavy tails":
        return random.standard_t(3, size=(rows, columns)).astype(np.float32)
    short = min(rows, columns)
    left = np.linalg.qr(random.standard_normal((rows, short)))[0]
    right = np.linalg.qr(random.standard_normal((columns, short)))[0]
    values = {
        "power law": np.arange(1, short + 1) ** -0.7,
        "low rank and noise": np.where(np.arange(short) < 10, 3.0, 0.3),
        "equal values": np.ones(short),
    }[kind]
    made: Matrix = ((left * values) @ right.T).astype(np.float32)
    return made


def optimum(matrix: Matrix, rank: int) -> float:
    return best_energies(matrix)[rank - 1]


def best_energies(matrix: Matrix) -> list[float]:
    """For each rank the energy of the leading singular values, from a full decomposition."""
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return [float(e) for e in np.cumsum(values**2)]


def captured(matrix: Matrix, rank: int, seed: int = 0) -> float:
    """By how much the factors lower the squared norm: what counts, whatever is claimed."""
    found = truncated_svd(matrix, rank, seed=seed, name="w")
    left = matrix.astype(np.float64) - (found.u * found.s).astype(np.float64) @ found.vt
    gain = float(np.sum(matrix.astype(np.float64) ** 2) - np.sum(left**2))
    assert gain == pytest.approx(found.energy, rel=1e-3)
    return gain


@pytest.fixture
def iterative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices take the iterative way too."""
    monkeypatch.setattr(randomized_svd, "EXACT_SIDE", 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(256, 256), (210, 700), (700, 210)])
@pytest.mark.usefixtures("iterative")
def test_iterative_keeps_95_percent_of_the_optimal_energy(
    kind: str, shape: tuple[int, int]
) -> None:
    matrix = make(kind, *shape)
    best = best_energies(matrix)
    for rank in (1, 2, 4):
        assert truncated_svd(matrix, rank).passes > 0
        assert min(captured(matrix, rank, seed) for seed in range(3)) >= 0.95 * best[rank - 1]


def test_a_large_residual_is_decomposed_iteratively_and_well() -> None:
    matrix = make("residual", 1056, 1312)
    values = np.linalg.eigvalsh(matrix.astype(np.float64) @ matrix.T.astype(np.float64))
    for rank in (16, 64):
        assert truncated_svd(matrix, rank, name="w").passes > 0
        assert captured(matrix, rank) >= 0.95 * values[-rank:].sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 64), (200, 130), (1, 9), (9, 1)])
def test_small_matrices_are_exact(kind: str, shape: tuple[int, int]) -> None:
    columns = -(-shape[1] // 32) * 32 if kind == "residual" else shape[1]
    matrix = make(kind, shape[0], columns)
    for rank in {1, min(matrix.shape) // 2 or 1, min(matrix.shape)}:
        found = truncated_svd(matrix, rank)
        assert found.passes == 0
        assert found.energy == pytest.approx(optimum(matrix, rank), rel=1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_vectors_are_orthonormal_and_ordered(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomized_svd, "EXACT_SIDE", 1024 if exact else 0)
    found = truncated_svd(make("power law", 260, 400), 12)
    np.testing.assert_allclose(found.u.T @ found.u, np.eye(12), atol=1e-4)
    np.testing.assert_allclose(found.vt @ found.vt.T, np.eye(12), atol=1e-4)
    assert np.all(np.diff(found.s) <= 0)
    b, a = found.balanced()
    np.testing.assert_allclose(b @ a, (found.u * found.s) @ found.vt, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1), rtol=1e-3)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e25])
def test_zeros_and_extreme_scales_stay_finite(
    exact: bool, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(randomized_svd, "EXACT_SIDE", 1024 if exact else 0)
    matrix = make("low rank and noise", 256, 256)
    found = truncated_svd(matrix * np.float32(scale), 10)
    product = (found.u * found.s).astype(np.float64) @ found.vt
    assert np.isfinite(product).all()
    left = np.sum((matrix.astype(np.float64) * scale - product) ** 2)
    total = np.sum(matrix.astype(np.float64) ** 2) * scale**2
    assert left <= 0.25 * total
    assert found.energy == pytest.approx(total - left, rel=1e-3)


@pytest.mark.usefixtures("iterative")
def test_an_exactly_low_rank_matrix_is_found_whole() -> None:
    random = np.random.default_rng(3)
    product = random.standard_normal((300, 4)) @ random.standard_normal((4, 500))
    matrix = product.astype(np.float32)
    found = truncated_svd(matrix, 8)
    assert np.abs((found.u * found.s) @ found.vt - matrix).max() < 1e-3


@pytest.mark.usefixtures("iterative")
def test_the_result_depends_on_seed_and_name_alone() -> None:
    matrix = make("gaussian", 300, 400)
    one = truncated_svd(matrix, 4, seed=1, name="a")
    truncated_svd(matrix, 9, seed=5, name="c")
    again = truncated_svd(matrix.copy(), 4, seed=1, name="a")
    np.testing.assert_array_equal(one.u, again.u)
    np.testing.assert_array_equal(one.vt, again.vt)
    for seed, name in ((2, "a"), (1, "b")):
        assert not np.array_equal(truncated_svd(matrix, 4, seed=seed, name=name).u, one.u)


def test_keys_do_not_run_into_each_other() -> None:
    assert generator(1, "2:a").random() != generator(12, ":a").random()


@pytest.mark.parametrize("rank", [0, 9, -1])
def test_an_impossible_rank_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=str(rank)):
        truncated_svd(np.ones((8, 12), np.float32), rank)
