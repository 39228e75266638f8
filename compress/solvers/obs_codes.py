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


def with_dense_outputs(
    tensor: Tensor, moment: Matrix, cross: Matrix, damping: float = 0.01
) -> Tensor:
    """The tensor whose weights give, for the inputs it will meet, what W gives for the dense ones.

    moment  H = E[x x^T] of the inputs it will meet, cross C = E[x_d x^T] with the dense model's,
            float32 [blocks, columns, columns]
    W + W (C - H) (H + damping * mean(diag H))^-1 minimises E|W x_d - W' x|^2 with a pull towards W.
    Entries that are stored exactly keep their value. Raises ValueError where H is not positive
    definite.
    """
    import torch

    source = tensor.source.astype(np.float32)
    target = source.copy()
    for block, rows in row_blocks(source.shape[0], moment.shape[0]):
        h = torch.from_numpy(moment[block].astype(np.float64))
        move = torch.from_numpy(cross[block].astype(np.float64)) - h
        h.diagonal().add_(damping * float(h.diagonal().mean()))
        lower, failed = torch.linalg.cholesky_ex(h)
        if failed:
            raise ValueError(f"the second moments are not positive definite with damping={damping}")
        error = torch.from_numpy(source[rows].astype(np.float64)) @ move
        target[rows] += torch.cholesky_solve(error.T, lower).T.numpy()
    outliers = tensor.outliers
    if outliers is not None and outliers.rows.size:
        target[outliers.rows, outliers.columns] = source[outliers.rows, outliers.columns]
    return tensor.with_(source=target)


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
