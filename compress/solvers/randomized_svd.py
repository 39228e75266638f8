"""The leading singular vectors of a dense matrix, without a full decomposition.

Residuals of quantization have nearly flat spectra, on which the usual two power iterations of
randomized SVD lose a fifth of the attainable energy. Block Lanczos (Golub & Underwood 1977;
Musco & Musco, "Randomized Block Krylov Methods", NeurIPS 2015, arXiv:1504.05477) keeps every
product it pays for, converges with the square root of the gap, and measures the energy it has
captured, so it can stop when little is left to gain. A small Gram matrix is decomposed exactly.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]

# Up to this short side an exact eigendecomposition costs well under a second.
EXACT_SIDE = 1024
# A Krylov space of this share of the short side is no cheaper than the exact decomposition.
_KRYLOV_SHARE = 0.5
_OVERSAMPLE = 16  # further start vectors: clusters of equal singular values are not missed
_LEAST_PASSES, _MOST_PASSES = 3, 24
# Stop when the extrapolated rest is below this share of the captured energy. The extrapolation
# is optimistic on flat spectra: at 2 % the worst of many trials kept 97 % of the optimum.
_REST = 0.02
_COLUMNS_AT_ONCE = 8192
_SAFE_EXPONENT = 40


@dataclass(frozen=True)
class Truncated:
    """matrix ~ u * s @ vt: u [rows, rank], s [rank] descending, vt [rank, columns].

    energy   sum of s^2: what the factors take from the matrix's squared norm
    passes   products with the matrix and its transpose; 0 for the exact decomposition
    """

    u: Matrix
    s: Matrix
    vt: Matrix
    energy: float
    passes: int

    def balanced(self) -> tuple[Matrix, Matrix]:
        """B = u * sqrt(s) [rows, rank] and A = sqrt(s) * vt [rank, columns]."""
        root = np.sqrt(self.s)
        return self.u * root, root[:, None] * self.vt


def generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers keyed by seed and tensor name, whatever ran before."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def truncated_svd(matrix: Matrix, rank: int, *, seed: int = 0, name: str = "") -> Truncated:
    """The leading `rank` singular triplets of a float32 matrix [rows, columns].

    They capture at least 95 % of the optimal energy (tests and bench/low_rank.py measure it);
    exact where the short side is at most EXACT_SIDE or the rank is a large part of it.
    Raises ValueError for a rank outside 1 .. min(rows, columns).
    """
    rows, columns = matrix.shape
    short = min(rows, columns)
    if not 1 <= rank <= short:
        raise ValueError(f"rank {rank} is not from 1 to {short}")
    if rows > columns:
        flipped = truncated_svd(matrix.T, rank, seed=seed, name=name)
        u, vt = np.ascontiguousarray(flipped.vt.T), np.ascontiguousarray(flipped.u.T)
        return Truncated(u, flipped.s, vt, flipped.energy, flipped.passes)
    exponent = _exponent(matrix)
    if abs(exponent) > _SAFE_EXPONENT:  # squares would leave float32's range
        scaled = truncated_svd(np.ldexp(matrix, -exponent), rank, seed=seed, name=name)
        energy = math.ldexp(scaled.energy, 2 * exponent)
        return Truncated(scaled.u, np.ldexp(scaled.s, exponent), scaled.vt, energy, scaled.passes)
    few_passes = 5 * (rank + _OVERSAMPLE)
    if short <= EXACT_SIDE or few_passes >= _KRYLOV_SHARE * short:
        return _exact(matrix, rank)
    return _block_lanczos(matrix, rank, generator(seed, name))


def _exponent(matrix: Matrix) -> int:
    """The power of two of the largest magnitude; 0 for a matrix of zeros."""
    largest = max(float(matrix.max()), -float(matrix.min()))
    return math.frexp(largest)[1]


def _exact(matrix: Matrix, rank: int) -> Truncated:
    """From the eigenvectors of matrix @ matrix.T; rows <= columns."""
    rows, columns = matrix.shape
    gram = np.zeros((rows, rows), np.float64)
    for start in range(0, columns, _COLUMNS_AT_ONCE):
        block = matrix[:, start : start + _COLUMNS_AT_ONCE].astype(np.float64)
        gram += block @ block.T
    u = np.linalg.eigh(gram)[1][:, ::-1][:, :rank].astype(np.float32)
    return _from_projection(u, matrix.T @ u, passes=0)


def _block_lanczos(matrix: Matrix, rank: int, random: np.random.Generator) -> Truncated:
    """Block Golub-Kahan-Lanczos with full reorthogonalization; rows <= columns.

    The basis Q of the Krylov space and Z = matrix.T @ Q are kept, so that the captured energy
    is measured: the leading eigenvalues of Z.T @ Z.
    """
    rows, columns = matrix.shape
    block = rank + _OVERSAMPLE
    most = min(_MOST_PASSES, rows // block)
    start = random.standard_normal((rows, block), dtype=np.float32)
    new: Matrix = np.linalg.qr(start)[0]
    basis = np.empty((rows, 0), np.float32)
    image = np.empty((columns, 0), np.float32)
    gram = np.empty((0, 0), np.float64)
    captured: list[float] = []
    for _ in range(most):
        product = matrix.T @ new
        basis = np.concatenate((basis, new), axis=1)
        image = np.concatenate((image, product), axis=1)
        gram = _grow(gram, image.T @ product)
        captured.append(float(np.linalg.eigvalsh(gram)[-rank:].sum()))
        if len(captured) == most or _converged(captured):
            break
        candidate = matrix @ product
        for _ in range(2):  # once leaves float32 rounding of the size of the signal
            candidate -= basis @ (basis.T @ candidate)
        new = np.linalg.qr(candidate)[0]
        # Where the space is exhausted, QR returns rounding noise: make it orthogonal again.
        new -= basis @ (basis.T @ new)
        new = np.linalg.qr(new)[0]
    weights = np.linalg.eigh(gram)[1][:, ::-1][:, :rank].astype(np.float32)
    return _from_projection(basis @ weights, image @ weights, passes=len(captured))


def _grow(gram: NDArray[np.float64], columns: Matrix) -> NDArray[np.float64]:
    """The Gram matrix with its new last block of columns (and, by symmetry, of rows)."""
    old, size = gram.shape[0], columns.shape[0]
    grown = np.empty((size, size), np.float64)
    grown[:old, :old] = gram
    grown[:, old:] = columns
    grown[old:, :old] = columns[:old].T
    grown[old:, old:] = (columns[old:] + columns[old:].T) / 2
    return grown


def _converged(captured: list[float]) -> bool:
    """Whether the rest, as a geometric series of the last gains, is small."""
    if len(captured) < _LEAST_PASSES:
        return False
    before, last = captured[-2] - captured[-3], captured[-1] - captured[-2]
    if last <= 1e-6 * captured[-1] or before <= 0:
        return True
    ratio = last / before
    return ratio < 1 and last * ratio / (1 - ratio) <= _REST * captured[-1]


def _from_projection(u: Matrix, image: Matrix, passes: int) -> Truncated:
    """Triplets from orthonormal u [rows, rank] and image = matrix.T @ u [columns, rank]."""
    squares = np.einsum("ij,ij->j", image, image, dtype=np.float64)
    s = np.sqrt(squares).astype(np.float32)
    inverse = np.divide(1, s, out=np.zeros_like(s), where=s > 0)
    order = np.argsort(-s, kind="stable")  # rounding may have swapped neighbours
    vt = (image * inverse).T[order]
    return Truncated(
        np.ascontiguousarray(u[:, order]),
        s[order],
        np.ascontiguousarray(vt),
        math.fsum(squares),
        passes,
    )
