"""The upper factor of an inverse Hessian, by one Cholesky decomposition and one inversion.

With J the reversal of the order, J H J = L L^T gives H = R R^T with R = J L J, which is upper
triangular; so H^-1 = U^T U with U = R^-1 = J L^-1 J. GPTQ's own way, cholesky(inverse(H)), costs
another inversion and another decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Matrix = NDArray[np.float32]

_SMALL = 128  # up to this side one triangular solve is faster than products of halves


@dataclass(frozen=True)
class InverseFactor:
    """U float32 [n, n], upper triangular, with (P H P^T + damping)^-1 = U^T U.

    order    int64 [n]: the columns of H in the order of U
    dead     bool [n], in the order of H: columns whose input was always zero
    damping  what was added to the diagonal
    """

    upper: Matrix
    order: NDArray[np.int64]
    dead: NDArray[np.bool_]
    damping: float


def inverse_factor(
    hessian: NDArray[Any], *, damping: float = 0.01, act_order: bool = False
) -> InverseFactor:
    """Decompose H [n, n], symmetric and positive semidefinite, after damping.

    `damping` is a share of the mean of the diagonal, over columns that are not dead; a dead
    column gets that mean and no neighbours. `act_order` sorts by falling diagonal. Raises
    ValueError where `hessian` is not a finite square matrix, or not positive definite then.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"hessian must be square, not {list(hessian.shape)}")
    if not damping >= 0:
        raise ValueError(f"damping must not be negative, not {damping}")
    diagonal = np.diagonal(hessian).astype(np.float64)
    if not np.isfinite(hessian).all():
        raise ValueError("hessian must be finite")
    if (diagonal < 0).any():
        raise ValueError("hessian must not have a negative diagonal")
    dead = diagonal == 0
    live = ~dead
    mean = float(diagonal[live].mean()) if live.any() else 1.0
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(diagonal.size)
    added = damping * mean
    lower = _damped(hessian, order[::-1], np.where(dead, mean, diagonal) + added, dead)
    upper = np.ascontiguousarray(_inverse_of_root(lower, damping)[::-1, ::-1])
    return InverseFactor(upper, order.astype(np.int64), dead, added)


def _damped(
    hessian: NDArray[Any],
    order: NDArray[np.int64],
    diagonal: NDArray[np.float64],
    dead: NDArray[np.bool_],
) -> Matrix:
    """A float32 copy of H in `order` with its new diagonal."""
    copy: Matrix = hessian[np.ix_(order, order)].astype(np.float32, copy=False)
    gone = dead[order]
    copy[gone] = 0
    copy[:, gone] = 0
    np.fill_diagonal(copy, diagonal[order])
    return copy


def _inverse_of_root(matrix: Matrix, damping: float) -> Matrix:
    """L^-1 of the matrix L L^T; the decomposition is tried in float64 where float32 fails."""
    import torch

    tensor = torch.from_numpy(matrix)
    lower, failed = torch.linalg.cholesky_ex(tensor)
    if failed:
        lower, failed = torch.linalg.cholesky_ex(tensor.double())
        lower = lower.float()
    if failed:
        raise ValueError(f"hessian is not positive definite with damping={damping}: raise damping")
    # LAPACK gives it by columns; the products below, and what reads them, want rows.
    lower = lower.contiguous()
    _invert_lower(lower)
    inverse: Matrix = lower.numpy()
    return inverse


def _invert_lower(lower: torch.Tensor) -> None:
    """Replace a lower triangular matrix [n, n] (zeros above) by its inverse, by halves."""
    import torch

    n = lower.shape[0]
    if n <= _SMALL:
        lower.copy_(torch.linalg.solve_triangular(lower, torch.eye(n), upper=False))
        return
    half = (n // 2 + _SMALL - 1) // _SMALL * _SMALL
    first, second, corner = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_lower(first)
    _invert_lower(second)
    corner.copy_(second @ (corner @ first)).neg_()
