"""What a changed weight does to its layer's outputs, beside plain rounding at the same bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.calibrate.statistics import DIAGONAL, HELD_OUT, SECOND_MOMENT, TensorStatistics
from compress.passes.base import CodesSpec
from compress.solvers.group_quantizer import CannotQuantize, quantize_matrix
from compress.solvers.output_error import Matrix, output_error
from compress.tensor import Array, Tensor

# Rows of about so many weights tell the error of a layer's outputs.
_SAMPLE_WEIGHTS = 1 << 20


@dataclass
class OutputSums:
    """Mean squared outputs of a layer and of its errors, for inputs as calibration met them.

    Of evenly spaced rows where the tensor is large. `plain_*` are of plain rounding.
    """

    squared_error: float = 0.0
    squared_norm: float = 0.0
    plain_squared_error: float | None = 0.0  # None: there is no such rounding

    def add(self, other: OutputSums) -> None:
        """Fold in the next tile."""
        self.squared_error += other.squared_error
        self.squared_norm += other.squared_norm
        plain = self.plain_squared_error, other.plain_squared_error
        self.plain_squared_error = None if None in plain else sum(p for p in plain if p)


def moment_of(statistics: TensorStatistics | None, tensor: Tensor) -> Matrix | None:
    """Second moments of a tile's inputs (held-out ones where there are any), or their diagonal.

    None where calibration tells nothing, or each block of rows has inputs of its own and the tile
    is not the whole tensor.
    """
    if statistics is None or statistics.site is None:
        return None
    if statistics.site.blocks > 1 and not tensor.is_whole:
        return None
    for kind, read in (
        (HELD_OUT, statistics.held_out),
        (SECOND_MOMENT, statistics.second_moment),
        (DIAGONAL, statistics.diagonal),
    ):
        if statistics.has(kind):
            return read()
    return None


def measure_outputs(
    source: Array,
    decoded: Matrix,
    moment: Matrix,
    plain: CodesSpec | None,
    *,
    search: str = "none",
) -> OutputSums:
    """Mean squared outputs of a tile and of its error, and of plain rounding to `plain` codes.

    source, decoded  [rows, columns]; of a large tile, evenly spaced rows are measured
    plain            None where there is nothing to compare with
    """
    rows, columns = decoded.shape
    step = max(1, rows * columns // _SAMPLE_WEIGHTS) if moment.shape[0] == 1 else 1
    some = source[:: min(step, max(rows, 1))].astype(np.float32)
    error = decoded[:: min(step, max(rows, 1))] - some
    plain_error: float | None = None
    if plain is not None and not plain.per_tensor:
        try:
            codes, _ = quantize_matrix(some, None, plain, search=search)
        except CannotQuantize:  # a scale that overflows: there is no such rounding
            codes = None
        if codes is not None:
            plain_error = output_error(codes.dequantize() - some, moment)
    return OutputSums(output_error(error, moment), output_error(some, moment), plain_error)
