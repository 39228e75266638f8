"""The kernels on CUDA tensors: same names, arguments and bytes as `compress.kernels`.

Tensors are contiguous and of one device, work is launched on the caller's current stream, and
callers allocate every output; only `row_offsets`, `project` and the products return a new tensor.
Functions that return a number wait for that stream. Wrong dtypes raise TypeError, wrong ranks,
shapes, strides or devices ValueError, a missing build CompressError. See docs/cuda.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import UsageError
from compress.kernels.cuda_tensors import (
    KINDS,
    Arguments,
    Availability,
    availability,
    check_bits,
    count_groups,
    dtype_name,
    matrix,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "Availability",
    "availability",
    "bitmask_compress",
    "bitmask_expand",
    "dequantize",
    "finite_index",
    "magnitude_histogram",
    "magnitude_histogram_low",
    "pack_bits",
    "quantize_groups",
    "row_offsets",
    "threshold_mask",
    "unpack_bits",
]

HISTOGRAM_BINS = 1 << 15
LOW_BINS = 1 << 16
SCALE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ITEM_SIZES = (1, 2, 4, 8)


# ---------------------------------------------------------------- magnitudes


def magnitude_histogram(w: torch.Tensor, counts: torch.Tensor) -> None:
    """counts int64 [32768] += histogram of the top 15 bits of the magnitude keys of w."""
    call = Arguments()
    kind = call.kind("w", w)
    out = call.tensor("counts", counts, ("int64",), (HISTOGRAM_BINS,))
    call.module.magnitude_histogram(w.data_ptr(), kind, w.numel(), out, *call.place())


def magnitude_histogram_low(w: torch.Tensor, prefix: int, counts: torch.Tensor) -> None:
    """counts int64 [65536] += low 16 key bits of the float32 weights whose top 15 equal prefix."""
    call = Arguments()
    weights = call.tensor("w", w, ("float32",))
    out = call.tensor("counts", counts, ("int64",), (LOW_BINS,))
    if not 0 <= prefix < HISTOGRAM_BINS:
        raise ValueError(f"prefix must be 0 to {HISTOGRAM_BINS - 1}, not {prefix}")
    call.module.magnitude_histogram_low(weights, w.numel(), prefix, out, *call.place())


def threshold_mask(w: torch.Tensor, key: int, ties: int, mask: torch.Tensor) -> int:
    """mask = key(w) > key, or one of the first `ties` entries (flat order) with key(w) == key.

    w and the output mask (bool) have one shape. Returns the number of ties kept.
    """
    call = Arguments()
    kind = call.kind("w", w)
    out = call.tensor("mask", mask, ("bool",), tuple(w.shape))
    if not 0 <= key < 1 << 31:
        raise ValueError(f"key must be 0 to 2^31 - 1, not {key}")
    if ties < 0:
        raise ValueError(f"ties must not be negative, not {ties}")
    n = w.numel()
    scratch = call.empty((call.module.mask_scratch(n),), "int64")
    return int(
        call.module.threshold_mask(
            w.data_ptr(), kind, n, key, min(ties, n), out, scratch.data_ptr(), *call.place()
        )
    )


def finite_index(w: torch.Tensor) -> int:
    """The flat index of the first NaN or infinity of w, or -1."""
    call = Arguments()
    kind = call.kind("w", w)
    scratch = call.empty((1,), "int64")
    return int(
        call.module.finite_index(w.data_ptr(), kind, w.numel(), scratch.data_ptr(), *call.place())
    )


# ---------------------------------------------------------------- quantization


def quantize_groups(
    w: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: str,
    search: str,
    signed_scale: bool,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    sums: torch.Tensor,
    column_weights: torch.Tensor | None = None,
) -> int:
    """Round w [rows, cols] to codes with one scale a group of `group_size` columns of a row.

    Arguments, outputs and the returned status are those of `compress.kernels.quantize_groups`, but
    that a search here weighs all columns alike: raises UsageError for `column_weights`.
    """
    if column_weights is not None and search != "none":
        raise UsageError(
            "column_weights: the CUDA kernels have no weighted search",
            hint="quantize on the CPU, or without column weights",
        )
    call = Arguments()
    kind = call.kind("w", w)
    rows, columns = matrix("w", w)
    check_bits(bits)
    groups = count_groups(columns, group_size)
    if search not in ("none", "mse"):
        raise ValueError(f'search must be "none" or "mse", not {search!r}')
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype must be one of {sorted(SCALE_DTYPES)}, not {scale_dtype!r}")
    if symmetric is not (zero_point is None):
        raise ValueError("zero_point must be None for symmetric codes, and only for them")
    shape = (rows, columns)
    kept = 0 if mask is None else call.tensor("mask", mask, ("bool",), shape)
    out = call.tensor("codes", codes, ("uint8",), shape)
    scales = call.tensor("scale", scale, (SCALE_DTYPES[scale_dtype],), (rows, groups))
    zeros = 0
    if zero_point is not None:
        zeros = call.tensor("zero_point", zero_point, ("uint8",), (rows, groups))
    errors = call.tensor("sums", sums, ("float64",), (rows, 3))
    scratch = call.empty((call.module.quantize_scratch(rows, groups),), "int64")
    return int(
        call.module.quantize_groups(
            w.data_ptr(),
            kind,
            kept,
            rows,
            columns,
            bits,
            group_size,
            KINDS[SCALE_DTYPES[scale_dtype]],
            search == "mse",
            signed_scale,
            out,
            scales,
            zeros,
            errors,
            scratch.data_ptr(),
            *call.place(),
        )
    )


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bits: int,
    group_size: int,
    out: torch.Tensor,
) -> None:
    """out float32 [rows, cols] = (codes - zero_point) * scale, one rounding a weight.

    codes uint8 [rows, cols]; scale float32 and zero_point uint8 [rows, groups]; a zero_point of
    None stands for 2^(bits-1).
    """
    call = Arguments()
    rows, columns = _matrix_of(call, "codes", codes, ("uint8",))
    check_bits(bits)
    shape = (rows, count_groups(columns, group_size))
    scales = call.tensor("scale", scale, ("float32",), shape)
    zeros = 0
    if zero_point is not None:
        zeros = call.tensor("zero_point", zero_point, ("uint8",), shape)
    target = call.tensor("out", out, ("float32",), (rows, columns))
    call.module.dequantize(
        codes.data_ptr(), scales, zeros, rows, columns, bits, group_size, target, *call.place()
    )


def _matrix_of(
    call: Arguments, name: str, value: torch.Tensor, dtypes: tuple[str, ...]
) -> tuple[int, int]:
    call.tensor(name, value, dtypes)
    return matrix(name, value)


# ---------------------------------------------------------------- codes


def pack_bits(codes: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """codes uint8 [rows, n] -> out uint8 [rows, >= ceil(n * bits / 8)]: a bit stream a row.

    Little-endian; the rest of a row is zeroed; bits of a code above `bits` are ignored.
    """
    call = Arguments()
    rows, n = _matrix_of(call, "codes", codes, ("uint8",))
    check_bits(bits)
    width = _wide_enough(call, "out", out, rows, n, bits)
    call.module.pack_bits(codes.data_ptr(), rows, n, bits, out.data_ptr(), width, *call.place())


def unpack_bits(packed: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """packed uint8 [rows, >= ceil(n * bits / 8)] -> out uint8 [rows, n]: the inverse."""
    call = Arguments()
    rows, n = _matrix_of(call, "out", out, ("uint8",))
    check_bits(bits)
    width = _wide_enough(call, "packed", packed, rows, n, bits)
    call.module.unpack_bits(packed.data_ptr(), width, rows, n, bits, out.data_ptr(), *call.place())


def _wide_enough(
    call: Arguments, name: str, packed: torch.Tensor, rows: int, n: int, bits: int
) -> int:
    have, width = _matrix_of(call, name, packed, ("uint8",))
    need = (n * bits + 7) // 8
    if have != rows or width < need:
        raise ValueError(f"{name} must be [{rows}, at least {need}], not [{have}, {width}]")
    return width


# ---------------------------------------------------------------- bitmasks


def row_offsets(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """int64 [rows + 1]: where each row's kept values begin, and how many there are in all.

    bits uint8 [rows, ceil(columns / 8)] in little bit order.
    """
    call = Arguments()
    rows = _matrix_of(call, "bits", bits, ("uint8",))[0]
    call.tensor("bits", bits, ("uint8",), (rows, (columns + 7) // 8))
    offsets = call.empty((rows + 1,), "int64")
    call.module.row_offsets(bits.data_ptr(), rows, columns, offsets.data_ptr(), *call.place())
    return offsets


def bitmask_compress(
    values: torch.Tensor, mask: torch.Tensor, bits_out: torch.Tensor, kept_out: torch.Tensor
) -> int:
    """Gather kept values, row after row, and write one bit a value; returns how many were kept.

    values [rows, n] of item size 1, 2, 4 or 8; mask bool [rows, n]; bits_out uint8
    [rows, ceil(n / 8)] in little bit order; kept_out 1-D of values' dtype, at least as long as
    the kept count (entries behind it are not written).
    """
    call = Arguments()
    rows, n = _matrix_of(call, "values", values, (dtype_name(values),))
    item = _item_size("values", values)
    kept = call.tensor("mask", mask, ("bool",), (rows, n))
    target = call.tensor("bits_out", bits_out, ("uint8",), (rows, (n + 7) // 8))
    out = call.tensor("kept_out", kept_out, (dtype_name(values),))
    offsets = call.empty((rows + 1,), "int64")
    place = call.place()
    count = int(call.module.mask_offsets(kept, rows, n, offsets.data_ptr(), *place))
    if kept_out.ndim != 1 or kept_out.numel() < count:
        raise ValueError(f"kept_out must be a vector of at least {count} entries")
    call.module.bitmask_compress(
        values.data_ptr(), item, kept, offsets.data_ptr(), rows, n, target, out, *place
    )
    return count


def bitmask_expand(bits: torch.Tensor, kept: torch.Tensor, fill: float, out: torch.Tensor) -> None:
    """The inverse: out [rows, n] = the next kept value where the bit is set, else `fill`.

    Raises ValueError where the number of set bits is not the number of kept values.
    """
    call = Arguments()
    rows, n = _matrix_of(call, "out", out, (dtype_name(out),))
    item = _item_size("out", out)
    call.tensor("bits", bits, ("uint8",), (rows, (n + 7) // 8))
    values = call.tensor("kept", kept, (dtype_name(out),))
    if kept.ndim != 1:
        raise ValueError(f"kept must be a vector, not of {kept.ndim} axes")
    offsets = row_offsets(bits, n)
    count = int(offsets[-1].item())
    if count != kept.numel():
        raise ValueError(f"the bitmask keeps {count} values, but {kept.numel()} were given")
    filler = call.empty((1,), dtype_name(out)).fill_(fill)
    call.module.bitmask_expand(
        bits.data_ptr(),
        values,
        offsets.data_ptr(),
        filler.data_ptr(),
        item,
        rows,
        n,
        out.data_ptr(),
        *call.place(),
    )


def _item_size(name: str, tensor: torch.Tensor) -> int:
    size = int(tensor.element_size())
    if size not in ITEM_SIZES:
        raise ValueError(f"{name}: the item size must be 1, 2, 4 or 8, not {size}")
    return size
