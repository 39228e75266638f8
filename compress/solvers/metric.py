"""What an error E of a matrix costs: ||E S||^2, S S^T = H + damping, for inputs with moments H.

With S = 1 every weight counts the same; with the diagonal of H inputs are taken for uncorrelated
(as in LQER, arXiv:2402.02446); with all of H the leading part of E S, multiplied by S^-1, is the
best correction of the layer's outputs that a rank allows (QERA, arXiv:2410.06040, theorem 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Metric:
    """S of one matrix: its diagonal float32 [columns], or a lower triangle [columns, columns]."""

    root: Matrix

    @classmethod
    def diagonal(cls, diagonal: NDArray[np.floating], damping: float = 0.01) -> Metric:
        """S = sqrt(H_kk + damping * mean)."""
        values = diagonal.astype(np.float64)
        return cls(np.sqrt(values + _added(values, damping)).astype(np.float32))

    @classmethod
    def full(cls, moment: NDArray[np.floating], damping: float = 0.01) -> Metric:
        """The Cholesky factor of H + damping * mean(diag H).

        Raises ValueError where it has none.
        """
        damped = moment.astype(np.float64)
        damped[np.diag_indices_from(damped)] += _added(np.diagonal(damped), damping)
        try:
            return cls(np.linalg.cholesky(damped).astype(np.float32))
        except np.linalg.LinAlgError as error:
            raise ValueError(
                f"the second moments are not positive definite with damping={damping}"
            ) from error

    def whiten(self, error: Matrix) -> Matrix:
        """E S."""
        product: Matrix = error * self.root if self.root.ndim == 1 else error @ self.root
        return product

    def unwhiten(self, factor: Matrix) -> Matrix:
        """A S^-1, A [rank, columns]."""
        if self.root.ndim == 1:
            scaled: Matrix = factor / self.root
            return scaled
        import torch

        root, values = torch.from_numpy(self.root), torch.from_numpy(np.ascontiguousarray(factor))
        solved = torch.linalg.solve_triangular(root, values, upper=False, left=False)
        return solved.numpy()  # type: ignore[no-any-return]

    def loss(self, error: Matrix) -> float:
        """||E S||^2."""
        flat = self.whiten(error).reshape(-1)
        return float(np.dot(flat.astype(np.float64), flat.astype(np.float64)))


def _added(diagonal: NDArray[np.floating], damping: float) -> float:
    """A share of the diagonal's mean; something where no input ever came."""
    mean = float(np.mean(diagonal)) if diagonal.size else 0.0
    return max(damping * mean, 0.0) or (1.0 if mean == 0 else 0.0)


def balanced(b: Matrix, a: Matrix) -> tuple[Matrix, Matrix]:
    """The same product with columns of B and rows of A of equal norms, for 16-bit storage."""
    of_b, of_a = np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1)
    live = (of_b > 0) & (of_a > 0)
    ratio = np.sqrt(np.where(live, of_a, 1) / np.where(live, of_b, 1)).astype(np.float32)
    return np.ascontiguousarray(b * ratio), np.ascontiguousarray(a / ratio[:, None])
