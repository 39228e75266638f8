"""The hot loops: checked here, then run by C++ where it is built, else by numpy.

Arrays are C-contiguous and callers allocate every output. Weights are float32, float16 or
bfloat16 (ml_dtypes). Wrong shapes and dtypes raise ValueError. The compiled kernels release the
GIL, run on the calling thread, and give the bytes of `compress.kernels.reference`.
See docs/kernels.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from compress.kernels import dispatch, reference, reference_quantize, reference_sums
from compress.kernels.dispatch import Backend
from compress.kernels.reference_quantize import SCALE_DTYPES

__all__ = [
    "SCALE_DTYPES",
    "Backend",
    "add_low_rank",
    "backend",
    "bitmask_compress",
    "bitmask_expand",
    "dequantize",
    "error_sums",
    "finite_index",
    "magnitude_histogram",
    "magnitude_histogram_low",
    "pack_bits",
    "quantize_groups",
    "squared_norms",
    "threshold_mask",
    "unpack_bits",
]

Array = NDArray[Any]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]
Bool = NDArray[np.bool_]

KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}  # the codes of csrc/kernels.h
SCALE_KINDS = {"F32": 0, "F16": 1, "BF16": 2}
HISTOGRAM_BINS = 1 << 15
LOW_BINS = 1 << 16
MIN_BITS, MAX_BITS = 2, 8
ITEM_SIZES = (1, 2, 4, 8)
MATRIX = 2
_PADDING = np.zeros(16, np.float32)  # C++ reads column weights by blocks of sixteen


def backend() -> Backend:
    """Which implementation runs, with which instruction set, and why."""
    return dispatch.current().backend


# ---------------------------------------------------------------- checks


def _dense(name: str, array: Array, *, writable: bool = False) -> None:
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")
    if writable and not (array.flags.writeable and array.flags.aligned):
        raise ValueError(f"{name} must be writable and aligned")


def _check(
    name: str,
    array: Array,
    dtype: DTypeLike,
    shape: tuple[int, ...] | None = None,
    *,
    writable: bool = False,
) -> None:
    if array.dtype != np.dtype(dtype):
        raise ValueError(f"{name} must be {np.dtype(dtype).name}, not {array.dtype.name}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {array.shape}")
    _dense(name, array, writable=writable)


def _kind(name: str, w: Array) -> int:
    kind = KINDS.get(w.dtype.name)
    if kind is None or not w.dtype.isnative:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, not {w.dtype}")
    _dense(name, w)
    return kind


def _matrix(name: str, array: Array) -> tuple[int, int]:
    if array.ndim != MATRIX:
        raise ValueError(f"{name} must have two axes, not {array.ndim}")
    return array.shape[0], array.shape[1]


def _bits(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be {MIN_BITS} to {MAX_BITS}, not {bits}")


def _groups(columns: int, group_size: int) -> int:
    if group_size < 1:
        raise ValueError(f"group_size must be positive, not {group_size}")
    return -(-columns // group_size)


def _raw(array: Array) -> Array:
    """The bytes as a flat vector: what crosses to C++, which loads them at any alignment."""
    return array.reshape(-1).view(np.uint8)


# ---------------------------------------------------------------- magnitudes


def magnitude_histogram(w: Array, counts: U64) -> None:
    """counts uint64 [32768] += histogram of the top 15 bits of the magnitude keys of w."""
    kind = _kind("w", w)
    _check("counts", counts, np.uint64, (HISTOGRAM_BINS,), writable=True)
    native = dispatch.current().native
    if native is None:
        reference.magnitude_histogram(w, counts)
    else:
        native.magnitude_histogram(_raw(w), kind, counts)


def magnitude_histogram_low(w: F32, prefix: int, counts: U64) -> None:
    """counts uint64 [65536] += low 16 key bits of the float32 weights whose top 15 equal prefix."""
    _check("w", w, np.float32)
    _check("counts", counts, np.uint64, (LOW_BINS,), writable=True)
    if not 0 <= prefix < HISTOGRAM_BINS:
        raise ValueError(f"prefix must be 0 to {HISTOGRAM_BINS - 1}, not {prefix}")
    native = dispatch.current().native
    if native is None:
        reference.magnitude_histogram_low(w, prefix, counts)
    else:
        native.magnitude_histogram_low(_raw(w), prefix, counts)


def threshold_mask(w: Array, key: int, ties: int, mask: Bool) -> int:
    """mask = key(w) > key, or one of the first `ties` entries (flat order) with key(w) == key.

    w and the output mask have one shape. Returns the number of ties kept.
    """
    kind = _kind("w", w)
    _check("mask", mask, np.bool_, w.shape, writable=True)
    if not 0 <= key < 1 << 31:
        raise ValueError(f"key must be 0 to 2^31 - 1, not {key}")
    if ties < 0:
        raise ValueError(f"ties must not be negative, not {ties}")
    native = dispatch.current().native
    if native is None:
        return reference.threshold_mask(w, key, ties, mask)
    return int(native.threshold_mask(_raw(w), kind, key, min(ties, w.size), _raw(mask)))


def finite_index(w: Array) -> int:
    """The flat index of the first NaN or infinity of w, or -1."""
    kind = _kind("w", w)
    native = dispatch.current().native
    if native is None:
        return reference.finite_index(w)
    return int(native.finite_index(_raw(w), kind))


# ---------------------------------------------------------------- quantization


def quantize_groups(
    w: Array,
    mask: Bool | None,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: str,
    search: str,
    signed_scale: bool,
    codes: U8 | None,
    scale: Array,
    zero_point: U8 | None,
    sums: F64,
    packed: U8 | None = None,
    column_weights: F32 | None = None,
) -> int:
    """Round w [rows, cols] to codes with one scale a group of `group_size` columns of a row.

    mask bool [rows, cols] or None: False = pruned, takes no part and gets the code of zero.
    codes uint8 [rows, cols], or None and instead packed uint8 [rows, >= ceil(cols * bits / 8)],
    as pack_bits packs them; scale [rows, groups] in scale_dtype ("F16", "BF16" or "F32");
    zero_point uint8 [rows, groups], None if and only if symmetric; sums float64 [rows, 3] =
    (squared error, squared error of plain rounding, sum of w^2), pruned weights included.
    search: "none" or "mse"; signed_scale lets the symmetric search choose negative scales;
    column_weights float32 [cols], finite and not negative, weigh its squared errors (None: all
    alike). The sums are unweighted.

    Returns -1; the flat index i of the first non-finite weight; or -2 - i where the scale of the
    group that starts at flat index i overflows scale_dtype. Outputs are undefined unless -1.
    """
    kind = _kind("w", w)
    rows, columns = _matrix("w", w)
    _bits(bits)
    groups = _groups(columns, group_size)
    if search not in ("none", "mse"):
        raise ValueError(f'search must be "none" or "mse", not {search!r}')
    if scale_dtype not in SCALE_KINDS:
        raise ValueError(f"scale_dtype must be one of {sorted(SCALE_KINDS)}, not {scale_dtype!r}")
    if symmetric is not (zero_point is None):
        raise ValueError("zero_point must be None for symmetric codes, and only for them")
    if mask is not None:
        _check("mask", mask, np.bool_, w.shape)
    if (codes is None) is (packed is None):
        raise ValueError("codes or packed must be given, and not both")
    if codes is not None:
        _check("codes", codes, np.uint8, w.shape, writable=True)
    if packed is not None:
        _check("packed", packed, np.uint8, writable=True)
        _wide_enough(packed, rows, columns, bits)
    _check("scale", scale, SCALE_DTYPES[scale_dtype], (rows, groups), writable=True)
    if zero_point is not None:
        _check("zero_point", zero_point, np.uint8, (rows, groups), writable=True)
    _check("sums", sums, np.float64, (rows, 3), writable=True)
    if column_weights is not None:
        _column_weights(column_weights, columns)
        if search == "none":
            column_weights = None
    native = dispatch.current().native
    if native is None:
        return reference_quantize.quantize_groups(
            w,
            mask,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
            search=search,
            signed_scale=signed_scale,
            codes=codes,
            scale=scale,
            zero_point=zero_point,
            sums=sums,
            packed=packed,
            column_weights=column_weights,
        )
    return int(
        native.quantize_groups(
            _raw(w),
            kind,
            None if mask is None else _raw(mask),
            rows,
            columns,
            bits,
            group_size,
            SCALE_KINDS[scale_dtype],
            search == "mse",
            signed_scale,
            _raw(np.empty(columns, np.uint8) if codes is None else codes),
            None if packed is None else _raw(packed),
            0 if packed is None else packed.shape[1],
            _raw(scale),
            None if zero_point is None else _raw(zero_point),
            sums.reshape(-1),
            None if column_weights is None else _raw(np.append(column_weights, _PADDING)),
        )
    )


def _column_weights(weights: F32, columns: int) -> None:
    _check("column_weights", weights, np.float32, (columns,))
    good = (weights >= 0) & (weights < np.inf)
    if not good.all():
        at = int(good.argmin())
        raise ValueError(
            f"column_weights must be finite and not negative, but [{at}] is {weights[at]}"
        )


def dequantize(
    codes: U8, scale: F32, zero_point: U8 | None, bits: int, group_size: int, out: F32
) -> None:
    """out float32 [rows, cols] = (codes - zero_point) * scale, one rounding a weight.

    codes uint8 [rows, cols]; scale float32 and zero_point uint8 [rows, groups]; a zero_point of
    None stands for 2^(bits-1).
    """
    rows, columns = _matrix("codes", codes)
    _bits(bits)
    groups = _groups(columns, group_size)
    _check("codes", codes, np.uint8)
    _check("scale", scale, np.float32, (rows, groups))
    if zero_point is not None:
        _check("zero_point", zero_point, np.uint8, (rows, groups))
    _check("out", out, np.float32, codes.shape, writable=True)
    if not out.size:  # a file may have 2^48 rows of nothing: no loop may run over them
        return
    native = dispatch.current().native
    if native is None:
        reference.dequantize(codes, scale, zero_point, bits, group_size, out)
        return
    zero = None if zero_point is None else _raw(zero_point)
    native.dequantize(
        _raw(codes), _raw(scale), zero, rows, columns, bits, group_size, out.reshape(-1)
    )


def pack_bits(codes: U8, bits: int, out: U8) -> None:
    """codes uint8 [rows, n] -> out uint8 [rows, >= ceil(n * bits / 8)]: a bit stream a row.

    Little-endian: element i holds bits i * bits to (i + 1) * bits. The rest of a row is zeroed;
    bits of a code above `bits` are ignored.
    """
    rows, n = _matrix("codes", codes)
    _bits(bits)
    _check("codes", codes, np.uint8)
    _check("out", out, np.uint8, writable=True)
    _wide_enough(out, rows, n, bits)
    if not out.size:
        return
    native = dispatch.current().native
    if native is None:
        reference.pack_bits(codes, bits, out)
    else:
        native.pack_bits(_raw(codes), rows, n, bits, _raw(out), out.shape[1])


def unpack_bits(packed: U8, bits: int, out: U8) -> None:
    """packed uint8 [rows, >= ceil(n * bits / 8)] -> out uint8 [rows, n]: the inverse."""
    rows, n = _matrix("out", out)
    _bits(bits)
    _check("packed", packed, np.uint8)
    _check("out", out, np.uint8, writable=True)
    _wide_enough(packed, rows, n, bits)
    if not out.size:
        return
    native = dispatch.current().native
    if native is None:
        reference.unpack_bits(packed, bits, out)
    else:
        native.unpack_bits(_raw(packed), packed.shape[1], rows, n, bits, _raw(out))


def _wide_enough(packed: U8, rows: int, n: int, bits: int) -> None:
    have, width = _matrix("the packed array", packed)
    need = (n * bits + 7) // 8
    if have != rows or width < need:
        raise ValueError(
            f"the packed array must be [{rows}, at least {need}], not [{have}, {width}]"
        )


# ---------------------------------------------------------------- bitmasks


def bitmask_compress(values: Array, mask: Bool, bits_out: U8, kept_out: Array) -> int:
    """Gather kept values, row after row, and write one bit a value; returns how many were kept.

    values [rows, n] of item size 1, 2, 4 or 8; mask bool [rows, n]; bits_out uint8
    [rows, ceil(n / 8)] in little bit order; kept_out 1-D of values' dtype, at least as long as
    the kept count (entries behind it are not written).
    """
    rows, n = _matrix("values", values)
    _item_size(values)
    _dense("values", values)
    _check("mask", mask, np.bool_, values.shape)
    _check("bits_out", bits_out, np.uint8, (rows, (n + 7) // 8), writable=True)
    _check("kept_out", kept_out, values.dtype, writable=True)
    if not values.size and kept_out.ndim == 1:
        return 0
    native = dispatch.current().native
    count = int(np.count_nonzero(mask)) if native is None else int(native.count_mask(_raw(mask)))
    if kept_out.ndim != 1 or kept_out.size < count:
        raise ValueError(f"kept_out must be a vector of at least {count} entries")
    if native is None:
        return reference.bitmask_compress(values, mask, bits_out, kept_out)
    return int(
        native.bitmask_compress(
            _raw(values),
            values.dtype.itemsize,
            _raw(mask),
            rows,
            n,
            _raw(bits_out),
            _raw(kept_out[:count]),
        )
    )


def bitmask_expand(bits: U8, kept: Array, fill: Any, out: Array) -> None:
    """The inverse: out [rows, n] = the next kept value where the bit is set, else `fill`.

    Raises ValueError where the number of set bits is not the number of kept values.
    """
    rows, n = _matrix("out", out)
    _item_size(out)
    _check("out", out, out.dtype, writable=True)
    _check("bits", bits, np.uint8, (rows, (n + 7) // 8))
    _check("kept", kept, out.dtype)
    if kept.ndim != 1:
        raise ValueError("kept must be a vector")
    native = dispatch.current().native
    if not out.size:
        count = 0
    elif native is None:
        count = reference.count_bits(bits, n)
    else:
        count = int(native.count_bits(_raw(bits), rows, n))
    if count != kept.size:
        raise ValueError(f"the bitmask keeps {count} values, but {kept.size} were given")
    if not out.size:
        return
    filler = np.asarray(fill).astype(out.dtype).reshape(1)
    if native is None:
        reference.bitmask_expand(bits, kept, filler[0], out)
    else:
        item = out.dtype.itemsize
        native.bitmask_expand(_raw(bits), _raw(kept), _raw(filler), item, rows, n, _raw(out))


def _item_size(array: Array) -> None:
    if array.dtype.itemsize not in ITEM_SIZES:
        raise ValueError(f"item size must be 1, 2, 4 or 8, not {array.dtype.itemsize}")


# ---------------------------------------------------------------- float32 matrices


def add_low_rank(matrix: F32, b: F32, a: F32) -> None:
    """matrix [rows, cols] += b [rows, r] @ a [r, cols], in place, as r rank-1 updates.

    Each product is rounded and then added, k ascending: the same bytes on every machine.
    """
    rows, columns = _matrix("matrix", matrix)
    rank = _matrix("b", b)[1]
    _check("matrix", matrix, np.float32, writable=True)
    _check("b", b, np.float32, (rows, rank))
    _check("a", a, np.float32, (rank, columns))
    native = dispatch.current().native
    if native is None:
        reference.add_low_rank(matrix, b, a)
    else:
        native.add_low_rank(matrix.reshape(-1), _raw(b), _raw(a), rows, columns, rank)


def error_sums(w: Array, decoded: F32, sums: F64) -> None:
    """sums float64 [2] += (sum of (w - decoded)^2, sum of w^2), in a fixed order."""
    kind = _kind("w", w)
    _check("decoded", decoded, np.float32, w.shape)
    _check("sums", sums, np.float64, (2,), writable=True)
    native = dispatch.current().native
    if native is None:
        reference_sums.error_sums(w, decoded, sums)
    else:
        native.error_sums(_raw(w), kind, _raw(decoded), sums)


def squared_norms(w: Array, out: F64) -> None:
    """out float64 [rows] = sum of squares of each row of w [rows, cols], in a fixed order."""
    kind = _kind("w", w)
    rows, columns = _matrix("w", w)
    _check("out", out, np.float64, (rows,), writable=True)
    native = dispatch.current().native
    if native is None:
        reference_sums.squared_norms(w, out)
    else:
        native.squared_norms(_raw(w), kind, rows, columns, out)
