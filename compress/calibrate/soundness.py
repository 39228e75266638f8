"""What arrays of a statistics file cannot hold: each rule gives the reason as words, or None.

A statistics file may come from anywhere, and a wrong one ruins a model in silence: with a negative
mean of squares a pass takes every weight for useless. The bounds leave room for rounding, in
float32 and in TF32, so that what calibration measures always passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.calibrate.inputs import IDS, IMAGES, LABELS, positions_of, vocabulary_of
from compress.tensor import Array

# The largest mean of products: inputs of a million millions. float32 sums of such means with
# weights, over any number of columns that a layer has, are still far from overflow.
LARGEST = 1e24
_ROUNDING = 0.01  # of a matrix's entry, in parts of the largest that its diagonal allows
_UNDERFLOW = 1e-37  # below it squares are lost in float32 where products with others are not
_PANEL = 256  # rows that are looked at together


def largest(values: Array) -> float:
    """The largest magnitude, NaN where there is one, 0 of nothing."""
    return float(max(values.max(), -values.min())) if values.size else 0.0


def wrong_values(values: Array, *, moment: bool, squares: bool) -> str | None:
    """Why an array of statistics is none.

    values   float32
    moment   it is a mean of x x^T, [blocks, columns, columns]
    squares  it is a mean of squares
    """
    most = largest(values)
    if not np.isfinite(most):
        return "is not finite"
    if most > LARGEST:
        return f"reaches {most:.3g}, more than {LARGEST:.0e}"
    if squares and values.size and values.min() < 0:
        return f"holds {values.min():.3g}, which no mean of squares is"
    if moment and values.ndim == 3 and values.shape[1] == values.shape[2]:
        return next(filter(None, map(_wrong_moment, values)), None)
    return None


def _wrong_moment(values: Array) -> str | None:
    """The same of one mean of x x^T: its diagonal, then symmetry and Cauchy-Schwarz by panels."""
    diagonal = np.diagonal(values).astype(np.float64)
    if diagonal.size and diagonal.min() < 0:
        return f"holds {diagonal.min():.3g} on its diagonal, which no mean of squares is"
    roots = np.sqrt(diagonal + _UNDERFLOW)
    for start in range(0, len(values), _PANEL):
        rows = slice(start, start + _PANEL)
        allowed = roots[rows, None] * roots
        if (np.abs(values[rows]) > allowed * (1 + _ROUNDING)).any():
            return "holds more beside its diagonal than the diagonal allows"
        if (np.abs(values[rows] - values[:, rows].T) > allowed * _ROUNDING).any():
            return "is not symmetric"
    return None


def wrong_inputs(arrays: Mapping[str, Array], config: Mapping[str, Any] | None) -> str | None:
    """Why these are no inputs that a calibration kept; `config` of the model, where it is known."""
    if set(arrays) == {IDS}:
        return _wrong_ids(arrays[IDS], config)
    if not {IMAGES} <= set(arrays) <= {IMAGES, LABELS}:
        return "its inputs are neither token ids nor images"
    images, labels = arrays[IMAGES], arrays.get(LABELS)
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        return f"its images are {images.dtype} {list(images.shape)}"
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        return f"its labels are {labels.dtype} {list(labels.shape)}, not {len(images)} integers"
    return None


def _wrong_ids(ids: NDArray[Any], config: Mapping[str, Any] | None) -> str | None:
    if ids.dtype.kind != "i" or ids.ndim != 2 or not ids.size:
        return f"its token ids are {ids.dtype} {list(ids.shape)}, not integers [samples, longest]"
    there = ids >= 0
    if ids.min() < -1 or not there[:, 0].all() or (there[:, 1:] & ~there[:, :-1]).any():
        return "its token ids are not samples that -1 fills up at their ends"
    vocabulary, positions = vocabulary_of(config), positions_of(config)
    if vocabulary is not None and ids.max() >= vocabulary:
        return f"token id {ids.max():,} is out of the model's vocabulary of {vocabulary:,}"
    if positions is not None and ids.shape[1] > positions:
        return f"its samples are of {ids.shape[1]:,} tokens, the model has {positions:,} positions"
    return None
