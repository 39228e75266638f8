"""`prune score=wanda|obs` on one tile: the masks of solvers/input_masks.py, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.calibrate.statistics import TensorStatistics
from compress.solvers import input_masks, n_of_m
from compress.solvers.magnitude_counts import protected_mask, scored
from compress.solvers.output_error import row_blocks
from compress.tensor import Tensor

Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class MaskByInputs:
    """What decides a mask: the score (wanda or obs), how many go, and the inputs' statistics."""

    score: str
    share: float
    pattern: tuple[int, int] | None
    damping: float
    statistics: TensorStatistics

    def kept(self, tensor: Tensor) -> int:
        """Weights of a tile (for OBS of the whole tensor) that `mask` keeps, without ranking."""
        values, protected = scored(tensor), protected_mask(tensor)
        if self.score == "wanda":
            if self.pattern is not None:
                return n_of_m.count(values, *self.pattern, protected)[0]
            return input_masks.kept_in_rows(values != 0, self._quotas(tensor), protected)
        site = self.statistics.site
        return sum(
            input_masks.kept_in_blocks(
                values[rows] != 0,
                self.share,
                self.pattern,
                None if protected is None else protected[rows],
            )
            for _, rows in row_blocks(values.shape[0], 1 if site is None else site.blocks)
        )

    def mask(self, tensor: Tensor) -> Bool:
        """bool [rows, columns] of a tile (for OBS of the whole tensor): True = kept."""
        values, protected = scored(tensor).astype(np.float32), protected_mask(tensor)
        if self.score == "wanda":
            return self._wanda(tensor, values, protected)
        moment = self.statistics.second_moment()
        mask = np.empty(values.shape, np.bool_)
        for block, rows in row_blocks(values.shape[0], moment.shape[0]):
            mask[rows] = input_masks.obs_mask(
                np.ascontiguousarray(values[rows]),
                moment[block],
                self.share,
                pattern=self.pattern,
                protected=None if protected is None else protected[rows],
                damping=self.damping,
            )
        return mask

    def _wanda(self, tensor: Tensor, values: NDArray[np.float32], protected: Bool | None) -> Bool:
        diagonal = self.statistics.diagonal()
        rows = tensor.first_row + np.arange(values.shape[0])
        diagonal = diagonal[rows * diagonal.shape[0] // tensor.info.matrix_shape[0]]
        if self.pattern is None:
            return input_masks.wanda_mask(values, diagonal, self._quotas(tensor), protected)
        score = input_masks.wanda_score(values, diagonal, protected)
        kept: Bool = n_of_m.mask(score, *self.pattern, protected)
        kept &= values != 0
        return kept

    def _quotas(self, tensor: Tensor) -> NDArray[np.int64]:
        rows = tensor.source.shape[0]
        shape = tensor.info.matrix_shape
        return input_masks.row_quotas(tensor.first_row, rows, shape, self.share)
