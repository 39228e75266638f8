"""Products from stored weights stay within docs/cuda.md's tolerance of a float64 product.

As in test_cuda.py, the sources run on the CPU, and on a device where there is one.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cuda_device import (  # noqa: F401
    TORCH_DTYPES,
    Device,
    device_fixture,
    need_device,
    to_bytes,
)

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


# ---------------------------------------------------------------- a device only


def assert_close(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> None:
    """As `Extras.check`, worked out on the device."""
    x64, w64 = x.double(), w.double()
    want, size = x64 @ w64.T, x64.abs() @ w64.abs().T
    rounding = ROUNDING[str(y.dtype).removeprefix("torch.")]
    bound = SUM_ERROR * size + rounding * want.abs() + 2.0**-24
    assert bool(((y.double() - want).abs() <= bound).all())


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_real_sizes(dtype: torch.dtype) -> None:
    need_device()
    rows, columns, group_size = 4096, 14_336, 128
    scale = torch.rand(rows, columns // group_size, device="cuda") * 0.02
    for bits in (2, 4, 8):
        codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, device="cuda")
        packed = torch.empty(rows, columns * bits // 8, dtype=torch.uint8, device="cuda")
        cuda.pack_bits(codes, bits, packed)
        w = torch.empty(rows, columns, device="cuda")
        cuda.dequantize(codes, scale, None, bits, group_size, w)
        for batch in (1, 3, 8, 16, 31, 64, 100):
            x = torch.randn(batch, columns, device="cuda").to(dtype)
            for out in (dtype, torch.float32):
                y = cuda_products.product_codes(
                    x,
                    packed.view(torch.int32),
                    scale,
                    bits=bits,
                    group_size=group_size,
                    out_dtype=out,
                )
                assert_close(y, x, w)
    for density in (0.5, 0.1):
        mask = torch.rand(rows, columns, device="cuda") < density
        values = torch.randn(rows, columns, device="cuda").to(dtype)
        bits_out = torch.empty(rows, columns // 8, dtype=torch.uint8, device="cuda")
        kept = torch.empty(int(mask.sum()), dtype=dtype, device="cuda")
        cuda.bitmask_compress(values, mask, bits_out, kept)
        offsets = cuda.row_offsets(bits_out, columns)
        for batch in (1, 2, 4, 8, 20):
            x = torch.randn(batch, columns, device="cuda").to(dtype)
            y = cuda_products.product_bitmask(x, bits_out, kept, offsets)
            assert_close(y, x, torch.where(mask, values, 0))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_words() -> None:
    need_device()
    rows, columns = 140_000, 131_072
    words = columns * 4 // 32
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of device memory")
    packed = torch.full((rows, words), -0x77777778, dtype=torch.int32, device="cuda")  # all 8: zero
    packed[-1, -1] = 0x7FFFFFFF  # its last code 7, the others 15
    scale = torch.ones(rows, columns // 128, dtype=torch.float16, device="cuda")
    x = torch.zeros(1, columns, dtype=torch.float16, device="cuda")
    x[0, -8:] = torch.arange(1, 9)
    y = cuda_products.product_codes(x, packed, scale, bits=4, group_size=128)
    assert y[0, -1].item() == 7 * sum(range(1, 8)) - 8
    assert not bool(y[0, :-1].any())


@pytest.mark.gpu
def test_another_stream_and_a_graph() -> None:
    """Work goes to the caller's stream, and products can be captured."""
    need_device()
    x = torch.randn(2, 256, device="cuda", dtype=torch.float16)
    packed = torch.randint(0, 1 << 30, (64, 32), dtype=torch.int32, device="cuda")
    scale = torch.rand(64, 2, device="cuda")
    want = cuda_products.product_codes(x, packed, scale, bits=4, group_size=128)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # what runs on the default stream would be early
        late = x * 1
        y = cuda_products.product_codes(late, packed, scale, bits=4, group_size=128)
    side.synchronize()
    assert torch.equal(y, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda_products.product_codes(x, packed, scale, bits=4, group_size=128)
    x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(
        captured, cuda_products.product_codes(x, packed, scale, bits=4, group_size=128)
    )
