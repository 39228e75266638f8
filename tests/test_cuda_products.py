"""Products from stored weights stay within docs/cuda.md's tolerance of a float64 product.

As in test_cuda.py, the sources run on the CPU, and on a device where there is one.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cuda_device import TORCH_DTYPES, Device, device_fixture, to_bytes  # noqa: F401

from compress.kernels import cuda, cuda_products, reference

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
HALVES = [F16, BF16]
SUM_ERROR = 1e-5  # of sum |x| |w|: float32 sums
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    names = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    dtype = np.dtype(names[str(tensor.dtype).removeprefix("torch.")])
    return np.frombuffer(to_bytes(tensor), dtype).reshape(tensor.shape)


class Extras:
    """Bias, low-rank factors and output dtype of a product, at random."""

    def __init__(self, rng: np.random.Generator, rows: int, columns: int) -> None:
        kinds = [np.float32, np.float16, ml_dtypes.bfloat16]
        self.bias = random(rng, (rows,), rng.choice(kinds)) if rng.integers(2) else None
        self.factors = None
        if rng.integers(2):
            rank, kind = int(rng.choice([0, 1, 8, 21])), rng.choice(kinds)
            self.factors = random(rng, (rows, rank), kind), random(rng, (rank, columns), kind)
        self.out = [None, np.float32][rng.integers(2)]

    def keywords(self, device: Device) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.bias is not None:
            found["bias"] = device.put(self.bias)
        if self.factors is not None:
            found["low_rank"] = (device.put(self.factors[0]), device.put(self.factors[1]))
        if self.out is not None:
            found["out_dtype"] = TORCH_DTYPES[np.dtype(self.out).name]
        return found

    def check(self, y: torch.Tensor, x: np.ndarray, w: np.ndarray) -> None:
        """y is x @ w.T and what these extras add, within the tolerance."""
        x64 = x.astype(np.float64)
        want, size = x64 @ w.T, np.abs(x64) @ np.abs(w.T)
        if self.factors is not None:
            b, a = (f.astype(np.float64) for f in self.factors)
            want += x64 @ a.T @ b.T
            size += np.abs(x64) @ np.abs(a.T) @ np.abs(b.T)
        if self.bias is not None:
            want += self.bias.astype(np.float64)
            size += np.abs(self.bias.astype(np.float64))
        have = to_numpy(y)
        assert have.dtype == np.dtype(self.out or x.dtype) and have.shape == want.shape
        bound = SUM_ERROR * size + ROUNDING[have.dtype.name] * np.abs(want) + 2.0**-24
        excess = np.abs(have.astype(np.float64) - want) - bound
        assert (excess <= 0).all(), f"beyond the tolerance by {excess.max()} of {bound.max()}"


def stored(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes [rows, n] as compressed-tensors' weight_packed, int32."""
    rows, n = codes.shape
    packed = np.zeros((rows, (n * bits + 31) // 32 * 4), np.uint8)
    reference.pack_bits(codes, bits, packed)
    return packed.view(np.int32)


def codes_case(
    device: Device,
    rng: np.random.Generator,
    *,
    bits: int,
    group_size: int,
    batch: int,
    rows: int,
    columns: int,
    x_dtype: np.dtype,
) -> None:
    codes = rng.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    groups = -(-columns // group_size)
    scale_dtype = rng.choice([np.float32, np.float16, ml_dtypes.bfloat16])
    scale = (random(rng, (rows, groups), np.float32) * 0.02).astype(scale_dtype)
    zero = rng.integers(0, 1 << bits, (rows, groups)).astype(np.uint8) if rng.integers(2) else None
    middle = np.full((rows, groups), 1 << (bits - 1)) if zero is None else zero.astype(np.int64)
    of_column = np.arange(columns) // group_size
    w = (codes - middle[:, of_column]) * scale.astype(np.float64)[:, of_column]
    x = random(rng, (batch, columns), x_dtype)
    extras = Extras(rng, rows, columns)
    y = cuda_products.product_codes(
        device.put(x),
        device.put(stored(codes, bits)),
        device.put(scale),
        None if zero is None else device.put(zero),
        bits=bits,
        group_size=group_size,
        **extras.keywords(device),
    )
    extras.check(y, x, w)
    device.check()


@pytest.mark.parametrize("x_dtype", HALVES, ids=lambda d: d.name)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_product_codes_over_groups(device: Device, bits: int, x_dtype: np.dtype) -> None:
    """Every way of tiling: 1, 2 and 4 words a lane, whole rows, ragged ends, none."""
    rng = np.random.default_rng(bits)
    for group_size in (16, 32, 64, 128, 1000):
        for columns in (128, 256, 296, 304, 999):
            codes_case(
                device,
                rng,
                bits=bits,
                group_size=group_size,
                batch=int(rng.integers(1, 9)),
                rows=int(rng.choice([1, 16, 37])),
                columns=columns,
                x_dtype=x_dtype,
            )


@pytest.mark.parametrize("batch", [1, 8, 9, 16, 17, 33, 64, 65])
def test_product_codes_over_batches(device: Device, batch: int) -> None:
    rng = np.random.default_rng(batch)
    for bits, group_size in [(2, 64), (4, 32), (4, 128), (8, 64)]:
        codes_case(
            device,
            rng,
            bits=bits,
            group_size=group_size,
            batch=batch,
            rows=int(rng.choice([15, 33, 48])),
            columns=int(rng.choice([384, 328])),
            x_dtype=HALVES[int(rng.integers(2))],
        )


@pytest.mark.parametrize("bits", range(2, 9))
def test_product_codes_of_any_width_and_group(device: Device, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for columns, group_size in [(1, 1), (7, 3), (100, 24), (333, 333), (64, 10_000)]:
        for batch in (1, 11):
            codes_case(
                device,
                rng,
                bits=bits,
                group_size=group_size,
                batch=batch,
                rows=9,
                columns=columns,
                x_dtype=HALVES[int(rng.integers(2))],
            )


@pytest.mark.parametrize("x_dtype", HALVES, ids=lambda d: d.name)
def test_every_code_and_zero_point_is_exact(device: Device, x_dtype: np.dtype) -> None:
    """One activation of 1: y is (code - zero point) * scale itself, for all of them."""
    for bits in (2, 4, 8):
        span = 1 << bits
        codes = np.arange(span, dtype=np.uint8)[:, None] * np.ones((1, 64), np.uint8)
        for zero in sorted({0, 1, span // 2, span - 1}):
            points = np.full((span, 1), zero, np.uint8)
            scale = np.full((span, 1), 3.0, np.float32)
            for column in (0, 5, 63):
                x = np.zeros((1, 64), x_dtype)
                x[0, column] = 1
                y = cuda_products.product_codes(
                    device.put(x),
                    device.put(stored(codes, bits)),
                    device.put(scale),
                    device.put(points),
                    bits=bits,
                    group_size=64,
                    out_dtype=torch.float32,
                )
                assert to_numpy(y)[0].tolist() == [3.0 * (code - zero) for code in range(span)]


@pytest.mark.parametrize("x_dtype", HALVES, ids=lambda d: d.name)
@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 1.0])
def test_product_bitmask(device: Device, density: float, x_dtype: np.dtype) -> None:
    rng = np.random.default_rng(11)
    for columns in (1, 31, 64, 257, 1024, 1032, 2500):
        rows, batch = int(rng.integers(1, 20)), int(rng.choice([1, 2, 3, 8, 9]))
        mask = rng.random((rows, columns)) < density
        values = random(rng, (rows, columns), x_dtype)
        bits = np.zeros((rows, (columns + 7) // 8), np.uint8)
        kept = np.zeros(int(mask.sum()), x_dtype)
        reference.bitmask_compress(values, mask, bits, kept)
        x = random(rng, (batch, columns), x_dtype)
        extras = Extras(rng, rows, columns)
        placed = device.put(bits)
        y = cuda_products.product_bitmask(
            device.put(x),
            placed,
            device.put(kept),
            cuda.row_offsets(placed, columns),
            **extras.keywords(device),
        )
        extras.check(y, x, np.where(mask, values.astype(np.float64), 0))
        device.check()


def test_a_mask_with_more_bits_than_values_reads_zeros(device: Device) -> None:
    bits = device.put(np.full((2, 128), 0xFF, np.uint8))
    kept, x = device.put(np.ones(1024, F16)), device.put(np.ones((1, 1024), F16))
    y = cuda_products.product_bitmask(x, bits, kept, cuda.row_offsets(bits, 1024))
    assert y.tolist() == [[1024.0, 0.0]]


def test_project(device: Device) -> None:
    rng = np.random.default_rng(12)
    for batch, rank, columns in [(1, 1, 1), (3, 5, 300), (9, 16, 1000), (0, 4, 8), (2, 0, 8)]:
        x, a = random(rng, (batch, columns), F16), random(rng, (rank, columns), BF16)
        have = to_numpy(cuda_products.project(device.put(x), device.put(a)))
        x64, a64 = x.astype(np.float64), a.astype(np.float64)
        bound = SUM_ERROR * (np.abs(x64) @ np.abs(a64.T))
        assert have.shape == (batch, rank)
        assert (np.abs(have - x64 @ a64.T) <= bound).all()


@pytest.mark.parametrize("shape", [(0, 16, 64), (2, 0, 64), (2, 16, 0)])
def test_products_of_nothing(device: Device, shape: tuple[int, int, int]) -> None:
    batch, rows, columns = shape
    x = device.put(np.ones((batch, columns), F16))
    bias = device.put(np.ones(rows, np.float32))
    packed = device.put(np.zeros((rows, columns // 8), np.int32))
    scale = device.put(np.ones((rows, -(-columns // 32)), np.float32))
    y = cuda_products.product_codes(x, packed, scale, bits=4, group_size=32, bias=bias)
    bits = device.put(np.zeros((rows, columns // 8), np.uint8))
    kept, offsets = device.put(np.zeros(0, F16)), cuda.row_offsets(bits, columns)
    sparse = cuda_products.product_bitmask(x, bits, kept, offsets, bias=bias)
    assert y.shape == sparse.shape == (batch, rows)
    assert (sparse == 1).all()  # the bias alone
    if columns == 0:
        assert (y == 1).all()
