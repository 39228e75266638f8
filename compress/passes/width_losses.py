"""What a tensor loses at a width: its error after quantizing, weighed by what is known of it.

    fisher   sum over outputs of E[g^2] * E[(the error's output)^2]: a second-order estimate of the
             divergence of the model's predictions, with the Fisher information of the outputs in
             place of their curvature
    outputs  squared error of the outputs relative to the outputs
    weights  squared error of the weights: nothing is known of the inputs

The estimate chooses about as well as measuring the model's divergence unit by unit (stories260k,
4 bits, fused sets: 0.936 of uniform rounding's divergence against 0.912, with solver=obs 0.946
both) and takes a hundredth of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compress.calibrate.statistics import DIAGONAL, OUTPUT_FISHER, SECOND_MOMENT
from compress.solvers.output_error import output_error, output_errors
from compress.tensor import Outliers, Tensor, TensorInfo

if TYPE_CHECKING:
    from compress.passes.quantize import Quantize

FISHER, OUTPUTS, WEIGHTS = "fisher", "outputs", "weights"
Losses = dict[str, list[float]]  # measure -> by option
Matrix = NDArray[np.float32]
Weigh = Callable[[Matrix, Matrix], dict[str, float]]
# Larger matrices are weighed by a sample of their rows where each is rounded by itself.
_SAMPLED = 1 << 22


def losses(one: Quantize, tensor: Tensor) -> Losses:
    """What each option of one tensor costs, in every measure that its statistics allow."""
    found: Losses = {}
    options = one.options_of(tensor.info)
    if one.with_choice(tensor.info, options[0]).solver != "obs":
        tensor, step = _sample(one, tensor)
    else:
        step = 1
    source = tensor.source.astype(np.float32)
    weigh = _weights_of(one, tensor.info, step)
    for option in options:
        made = one.with_choice(tensor.info, option).apply(tensor)
        error = made.decode()
        error -= source
        for kind, weight in weigh(error, source).items():
            found.setdefault(kind, []).append(weight)
    return found


def _weights_of(
    one: Quantize, info: TensorInfo, step: int
) -> Callable[[Matrix, Matrix], dict[str, float]]:
    """(error, source) -> loss by measure; `step`: of the rows every so many are given."""
    statistics = one.statistics
    moment = gradients = None
    if statistics is not None and one.sensitivity != WEIGHTS and statistics.has(DIAGONAL):
        full = statistics.has(SECOND_MOMENT)
        moment = statistics.second_moment() if full else statistics.diagonal()
        if statistics.has(OUTPUT_FISHER):
            gradients = statistics.output_fisher()[::step].astype(np.float64)
    norms: list[float] = []

    def weigh(error: Matrix, source: Matrix) -> dict[str, float]:
        flat = error.reshape(-1)
        found = {WEIGHTS: step * float(np.dot(flat, flat))}
        if moment is not None:
            outputs = output_errors(error, moment)
            if not norms:
                norms.append(output_error(source, moment))
            found[OUTPUTS] = float(outputs.sum()) / (norms[0] or 1.0)
            if gradients is not None:
                found[FISHER] = step * float(gradients @ outputs)
        return found

    return weigh


def _sample(one: Quantize, tensor: Tensor) -> tuple[Tensor, int]:
    """Every n-th row of a huge tensor, and n. Blocks of rows keep equal shares."""
    rows, columns = tensor.source.shape
    wanted = rows * columns // _SAMPLED
    blocks = 1
    if one.statistics is not None and one.statistics.site is not None:
        blocks = one.statistics.site.blocks
    step = max((n for n in range(1, wanted + 1) if rows // blocks % n == 0), default=1)
    if step == 1 or any(g == 0 for _, g in one.options_of(tensor.info)):
        return tensor, 1
    outliers = tensor.outliers
    if outliers is not None:
        here = outliers.rows % step == 0
        outliers = Outliers(
            outliers.rows[here] // step,
            outliers.columns[here],
            outliers.values[here],
            outliers.in_scale,
        )
    mask = None if tensor.mask is None else np.ascontiguousarray(tensor.mask[::step])
    source = np.ascontiguousarray(tensor.source[::step])
    return tensor.with_(source=source, mask=mask, outliers=outliers), step
