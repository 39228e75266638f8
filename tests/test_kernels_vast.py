"""More than 2^31 elements, and 2^32: every kernel keeps the upper bits of its indices.

Inputs are zeros but for a few planted values, some of them beyond 2^31; what a kernel makes of
those is known exactly. tests/vast.py says how gigabytes fit in some megabytes.
"""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest
from vast import folded, zeros

from compress import kernels
from compress.kernels import dispatch

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
N = (1 << 31) + (1 << 16) + 3
FAR = [(1 << 31) - 1, 1 << 31, N - 2]  # where values are planted
FAR_BF16 = [(1 << 32) - 1, 1 << 32, (1 << 32) + (1 << 16)]
NEAR = 5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does"),
    pytest.mark.skipif(dispatch.load_extension() is None, reason="the kernels are not built"),
]
kinds = pytest.mark.parametrize("dtype", [BF16, F32], ids=lambda d: d.name)


def planted(dtype: np.dtype, values: list[float]) -> tuple[np.ndarray, list[int]]:
    """8 GiB of weights, and where the values lie."""
    places = FAR if dtype == F32 else FAR_BF16
    w = zeros((places[-1] + 2,), dtype)
    w[places] = np.array(values, dtype)
    return w, places


@kinds
def test_histograms(dtype: np.dtype) -> None:
    w, _ = planted(dtype, [1, 2, 2])
    counts = np.zeros(1 << 15, np.uint64)
    kernels.magnitude_histogram(w, counts)
    one, two = (int(np.float32(x).view(np.uint32)) >> 16 for x in (1, 2))
    assert (counts[0], counts[one], counts[two]) == (w.size - 3, 1, 2)
    assert counts.sum() == w.size
    if dtype == F32:
        low = np.zeros(1 << 16, np.uint64)
        kernels.magnitude_histogram_low(w, two, low)
        assert low[0] == low.sum() == 2


@kinds
def test_finite_index(dtype: np.dtype) -> None:
    w, places = planted(dtype, [0, 1, np.nan])
    assert kernels.finite_index(w) == places[2]
    w[places[1]] = np.inf
    assert kernels.finite_index(w) == places[1]


@kinds
def test_threshold_mask(dtype: np.dtype) -> None:
    w, places = planted(dtype, [2, 1, 1])
    w[NEAR] = 1
    mask = folded(w.shape, np.bool_)
    key = int(np.array([1], dtype).view(f"u{dtype.itemsize}")[0])
    assert kernels.threshold_mask(w, key, 2, mask) == 2
    assert mask[[NEAR, *places]].tolist() == [True, True, True, False]
    assert mask[:1000].sum() == 1
    assert mask[-1000:].sum() == 0


@kinds
def test_sums(dtype: np.dtype) -> None:
    w, places = planted(dtype, [1, 2, 4])
    norms = np.empty(1)
    kernels.squared_norms(w.reshape(1, -1), norms)
    assert norms[0] == 21
    decoded = zeros(w.shape, np.float32)
    decoded[places] = [1, 1, 1]
    sums = np.zeros(2)
    kernels.error_sums(w, decoded, sums)
    assert sums.tolist() == [0 + 1 + 9, 21]


def test_norms_of_rows_beyond() -> None:
    rows, columns = (1 << 24) + 5, 128
    w = zeros((rows, columns), BF16)
    w[-1] = 1
    out = np.full(rows, 7.0)
    kernels.squared_norms(w, out)
    assert out[-1] == 128
    assert (out[:-1] == 0).all()


@pytest.mark.parametrize("columns", [1 << 15, N], ids=["rows", "one row"])
def test_quantize_groups(columns: int) -> None:
    rows = N // columns + (columns < N)
    w = zeros((rows, columns), BF16)
    w[-1, -3:] = [-7, 3, 1]
    codes = folded(w.shape, np.uint8)
    scale, sums = np.empty((rows, 1), np.float32), np.empty((rows, 3))
    status = kernels.quantize_groups(
        w,
        None,
        bits=4,
        group_size=columns,
        symmetric=True,
        scale_dtype="F32",
        search="none",
        signed_scale=False,
        codes=codes,
        scale=scale,
        zero_point=None,
        sums=sums,
    )
    assert status == -1
    assert codes[-1, -4:].tolist() == [8, 1, 11, 9]
    assert (codes[0, :4] == 8).all()
    assert scale[-1, 0] == 1
    assert sums[-1].tolist() == [0, 0, 49 + 9 + 1]
    w[-1, -2] = np.nan
    assert kernels.finite_index(w) == w.size - 2


def test_dequantize() -> None:
    rows, columns = (1 << 16) + 2, 1 << 15
    codes = zeros((rows, columns), np.uint8)
    codes[-1, -3:] = [1, 2, 15]
    scale = np.full((rows, 2), 0.5, np.float32)
    scale[-1, 1] = 2
    out = folded(codes.shape, np.float32)
    kernels.dequantize(codes, scale, None, 4, columns // 2, out)
    assert out[-1, -4:].tolist() == [-16, -14, -12, 14]
    assert (out[0, :4] == -4).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_codes(bits: int) -> None:
    codes = zeros((1, N), np.uint8)
    codes[0, FAR] = [1, 2, 3]
    packed = folded((1, (N * bits + 7) // 8), np.uint8)
    kernels.pack_bits(codes, bits, packed)
    assert (packed[0, :1000] == 0).all()
    start = FAR[0] * bits // 8 // bits * bits  # at a code whose bits begin a byte
    stream = int.from_bytes(packed[0, start:].tobytes(), "little")
    for index, code in zip(FAR, [1, 2, 3], strict=True):
        stream -= code << ((index - start * 8 // bits) * bits)
    assert stream == 0
    del codes
    back = folded((1, N), np.uint8)
    wide = zeros(packed.shape, np.uint8)
    wide[0, start:] = packed[0, start:]
    kernels.unpack_bits(wide, bits, back)
    assert back[0, FAR].tolist() == [1, 2, 3]
    assert back[0, FAR[0] - 1000 :].sum() == 6
    assert (back[0, :1000] == 0).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_bitmasks(rows: int) -> None:
    n = -(-N // rows)
    values, mask = zeros((rows, n), np.uint8), zeros((rows, n), np.bool_)
    places = [(0, 5), (rows - 1, n - 9), (rows - 1, n - 1)]
    for value, place in enumerate(places, 11):
        values[place], mask[place] = value, True
    bits = folded((rows, (n + 7) // 8), np.uint8)
    kept = np.zeros(3, np.uint8)
    assert kernels.bitmask_compress(values, mask, bits, kept) == 3
    assert kept.tolist() == [11, 12, 13]
    assert bits[0, 0] == 1 << 5
    assert np.unpackbits(bits[-1, -1000:], bitorder="little").sum() == 2
    del values, mask
    dense = zeros(bits.shape, np.uint8)
    dense[0, :1000], dense[-1, -1000:] = bits[0, :1000], bits[-1, -1000:]
    out = folded((rows, n), np.uint8)
    kernels.bitmask_expand(dense, kept, 7, out)
    assert [int(out[place]) for place in places] == [11, 12, 13]
    assert (out[-1, -1000:] != 7).sum() == 2


def test_add_low_rank() -> None:
    a, b = zeros((1, N), np.float32), np.ones((1, 1), np.float32)
    a[0, FAR] = [1, 2, 3]
    matrix = folded((1, N), np.float32)
    tail = matrix[0, -(1 << 17) :]
    tail[...] = 1
    kernels.add_low_rank(matrix, b, a)
    assert matrix[0, FAR].tolist() == [2, 3, 4]
    assert tail.sum() == tail.size + 6
