"""What an error of the weights does to a layer's outputs: tr(E H E^T), with H = E[x x^T]."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


def row_blocks(rows: int, blocks: int) -> Iterator[tuple[int, slice]]:
    """(block, its rows) of a matrix whose rows are split into equal blocks."""
    size = rows // max(blocks, 1)
    for block in range(blocks):
        yield block, slice(block * size, (block + 1) * size)


def output_errors(error: Matrix, moment: Matrix) -> NDArray[np.float64]:
    """float64 [rows]: the mean squared error of each output.

    error   float32 [rows, columns]
    moment  second moment of the inputs, float32 [blocks, columns, columns], or its diagonal
            [blocks, columns], which takes the inputs for uncorrelated
    """
    found = np.zeros(error.shape[0], np.float64)
    for block, rows in row_blocks(error.shape[0], moment.shape[0]):
        part = error[rows]
        if moment.ndim == 2:
            found[rows] = np.square(part, dtype=np.float64) @ moment[block].astype(np.float64)
            continue
        for start in range(0, part.shape[0], 1024):  # the product is as large as the rows
            some = part[start : start + 1024]
            at = slice(rows.start + start, rows.start + start + some.shape[0])
            found[at] = np.einsum("rc,rc->r", some @ moment[block], some, dtype=np.float64)
    return np.maximum(found, 0.0)  # of a positive semidefinite form: below zero is rounding


def output_error(error: Matrix, moment: Matrix) -> float:
    """The sum of `output_errors` over the rows."""
    return float(output_errors(error, moment).sum())
