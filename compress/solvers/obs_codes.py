"""Codes of a tensor by the OBS sweep: mask, exact entries and blocks of rows taken into account."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compress.solvers.group_quantizer import CannotQuantize, working_dtype
from compress.solvers.obs_sweep import obs_sweep
from compress.solvers.output_error import Matrix, row_blocks
from compress.tensor import Array, Codes, Tensor

if TYPE_CHECKING:
    from compress.passes.base import CodesSpec


def obs_codes(
    tensor: Tensor,
    moment: Matrix,
    spec: CodesSpec,
    *,
    search: str = "mse",
    signed_scale: bool = True,
    damping: float = 0.01,
    act_order: bool = False,
) -> Codes:
    """Codes of a whole tensor under its mask, for inputs with these second moments.

    moment  float32 [blocks, columns, columns]; the rows are split into as many equal blocks, each
            swept with its own (grouped convolutions, fused experts)
    Entries that are stored exactly outside of their scale are exempt: they leave no error. Raises
    CannotQuantize and ValueError as `obs_sweep` does.
    """
    if spec.per_tensor and moment.shape[0] > 1:
        raise ValueError("one scale for the tensor (group=0) cannot be shared by several sweeps")
    values = working_dtype(tensor.source)
    protected = _protected(tensor)
    parts = []
    for block, rows in row_blocks(values.shape[0], moment.shape[0]):
        try:
            swept = obs_sweep(
                np.ascontiguousarray(values[rows]),
                moment[block],
                spec,
                mask=None if tensor.mask is None else np.ascontiguousarray(tensor.mask[rows]),
                protected=None if protected is None else np.ascontiguousarray(protected[rows]),
                search=search,
                signed_scale=signed_scale,
                damping=damping,
                act_order=act_order,
            )
        except CannotQuantize as bad:
            raise CannotQuantize(rows.start + bad.row, bad.column, bad.overflow) from None
        parts.append(swept.codes)
    return parts[0] if len(parts) == 1 else _stacked(parts)


def _protected(tensor: Tensor) -> NDArray[np.bool_] | None:
    outliers = tensor.outliers
    if outliers is None or outliers.in_scale or not outliers.rows.size:
        return None
    protected = np.zeros(tensor.source.shape, np.bool_)
    protected[outliers.rows, outliers.columns] = True
    return protected


def _stacked(parts: list[Codes]) -> Codes:
    """Codes of blocks of rows as those of the whole."""
    first = parts[0]
    zero_point: Array | None = None
    if first.zero_point is not None:
        zero_point = np.concatenate([p.zero_point for p in parts if p.zero_point is not None])
    return Codes(
        np.concatenate([p.values for p in parts]),
        np.concatenate([p.scale for p in parts]),
        zero_point,
        first.bits,
        first.group_size,
    )
