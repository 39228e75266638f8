"""Products of activations with compressed weights as they are stored, on CUDA tensors.

y [batch, rows] = x [batch, columns] @ W.T (+ (x @ a.T) @ b.T) (+ bias), with float32 sums. x is
float16 or bfloat16; y has x's dtype, or `out_dtype`. The tolerance is stated in docs/cuda.md.
Errors and streams: as in `compress.kernels.cuda`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.kernels.cuda_tensors import (
    HALF_DTYPES,
    KINDS,
    Arguments,
    check_bits,
    count_groups,
    dtype_name,
    matrix,
)

if TYPE_CHECKING:
    import torch

__all__ = ["product_bitmask", "product_codes", "project"]


def project(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """float32 [batch, rank] = x [batch, columns] @ a.T; a [rank, columns] of any float dtype."""
    call = Arguments()
    call.kind("x", x, HALF_DTYPES)
    matrix("x", x)
    return _project(call, x, a)


def _project(call: Arguments, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    batch, columns = x.shape
    kind = call.kind("a", a)
    rank = matrix("a", a)[0]
    call.tensor("a", a, tuple(KINDS), (rank, columns))
    out = call.empty((batch, rank), "float32")
    call.module.project(
        x.data_ptr(),
        KINDS[dtype_name(x)],
        batch,
        columns,
        a.data_ptr(),
        kind,
        rank,
        out.data_ptr(),
        *call.place(),
    )
    return out


class _Product:
    """What all products share: x, y and the epilogue, checked, in the binding's order."""

    def __init__(
        self,
        x: torch.Tensor,
        rows: int,
        bias: torch.Tensor | None,
        low_rank: tuple[torch.Tensor, torch.Tensor] | None,
        out_dtype: torch.dtype | None,
    ) -> None:
        self.call = call = Arguments()
        kind = call.kind("x", x, HALF_DTYPES)
        batch, columns = matrix("x", x)
        name = dtype_name(x) if out_dtype is None else str(out_dtype).removeprefix("torch.")
        if name not in KINDS:
            raise TypeError(f"out_dtype must be one of {', '.join(KINDS)}, not {name}")
        bias_kind = 0
        if bias is not None:
            bias_kind = call.kind("bias", bias)
            call.tensor("bias", bias, tuple(KINDS), (rows,))
        self.projected: torch.Tensor | None = None  # kept until the launch
        factors = (0, 0, 0, 0)  # projected, b, its kind, rank
        if low_rank is not None:
            b, a = low_rank
            b_kind = call.kind("low_rank[0]", b)
            rank = matrix("low_rank[0]", b)[1]
            call.tensor("low_rank[0]", b, tuple(KINDS), (rows, rank))
            call.tensor("low_rank[1]", a, tuple(KINDS), (rank, columns))
            self.projected = _project(call, x, a)
            factors = (self.projected.data_ptr(), b.data_ptr(), b_kind, rank)
        self.y = call.empty((batch, rows), name)
        self.columns = columns
        self.arguments: tuple[Any, ...] = (
            x.data_ptr(),
            kind,
            batch,
            rows,
            columns,
            self.y.data_ptr(),
            KINDS[name],
            0 if bias is None else bias.data_ptr(),
            bias_kind,
            *factors,
        )


def product_codes(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x @ W.T with W = (codes - zero_point) * scale, from compressed-tensors' layout.

    x [batch, columns]; packed int32 [rows, ceil(columns * bits / 32)], a little-endian bit stream a
    row; scale [rows, groups] of any float dtype; zero_point uint8 [rows, groups], None stands for
    2^(bits-1); bias [rows]; low_rank (b [rows, rank], a [rank, columns]). 2, 4 and 8 bits in groups
    of 32 and more run on the tensor cores, everything else on a slower kernel.
    """
    check_bits(bits)
    rows = _rows("packed", packed)
    product = _Product(x, rows, bias, low_rank, out_dtype)
    call, columns = product.call, product.columns
    groups = count_groups(columns, group_size)
    words = call.tensor("packed", packed, ("int32",), (rows, (columns * bits + 31) // 32))
    scale_kind = call.kind("scale", scale)
    scales = call.tensor("scale", scale, tuple(KINDS), (rows, groups))
    zeros = 0
    if zero_point is not None:
        zeros = call.tensor("zero_point", zero_point, ("uint8",), (rows, groups))
    call.module.product_codes(
        *product.arguments, words, scales, scale_kind, zeros, bits, group_size, *call.place()
    )
    return product.y


def product_bitmask(
    x: torch.Tensor,
    bits: torch.Tensor,
    kept: torch.Tensor,
    offsets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x @ W.T with W = the next kept value where the bit is set, else 0: the native layout.

    x [batch, columns]; bits uint8 [rows, ceil(columns / 8)] in little bit order; kept 1-D of x's
    dtype, row after row; offsets int64 [rows + 1] = `row_offsets(bits, columns)`, worked out once
    and not checked here: that would wait for the device.
    """
    rows = _rows("bits", bits)
    product = _Product(x, rows, bias, low_rank, out_dtype)
    call = product.call
    mask = call.tensor("bits", bits, ("uint8",), (rows, (product.columns + 7) // 8))
    values = call.tensor("kept", kept, (dtype_name(x),))
    if kept.ndim != 1:
        raise ValueError(f"kept must be a vector, not of {kept.ndim} axes")
    starts = call.tensor("offsets", offsets, ("int64",), (rows + 1,))
    call.module.product_bitmask(
        *product.arguments, mask, values, kept.numel(), starts, *call.place()
    )
    return product.y


def _rows(name: str, value: Any) -> int:
    """The rows of what should be a matrix; its other properties are checked with x at hand."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, not {type(value).__name__}")
    return matrix(name, value)[0]
