"""Products with stored values against float64, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from compress.kernels import dispatch
from compress.kernels.packing import Segment, codes_segment, pack_linear
from compress.kernels.products import dense_linear, linear
from compress.kernels.segments import bitmask_segment, dense_segment
from compress.tensor import Codes

_EXTENSION = dispatch.load_extension()
ISAS: list[str] = ["reference", *(_EXTENSION.available_isas() if _EXTENSION else [])]
F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
I8 = np.dtype(np.int8)
FLOATS = [F32, F16, BF16]
ROUNDING = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}
SIZES = [0, 1, 7, 15, 17, 31, 33, 100, 257, 1000]
GUARD = 64


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    before = dispatch.current()
    yield
    if before.native is not None:
        before.native.set_isa(before.backend.isa)
    dispatch._State.resolution = before


@dataclass
class Part:
    """A segment and the float64 matrix that it stands for."""

    segment: Segment
    exact: np.ndarray


def values_of(rng: np.random.Generator, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    if dtype == I8:
        return rng.integers(-128, 128, shape).astype(I8)
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


def part(
    rng: np.random.Generator,
    shape: tuple[int, int],
    dtype: np.dtype,
    density: float | None,
    first_column: int = 0,
    group_size: int = 0,
    scale_dtype: np.dtype = F32,
) -> Part:
    """Random values; `density` None: dense, else a bitmask that keeps that part."""
    values = values_of(rng, shape, dtype)
    exact = values.astype(np.float64)
    options: dict[str, Any] = {}
    if dtype == I8:
        width = group_size or max(shape[1], 1)
        scale = rng.uniform(0.5, 2, (shape[0], -(-shape[1] // width))).astype(scale_dtype)
        exact *= np.repeat(scale.astype(np.float64), width, axis=1)[:, : shape[1]]
        options = {"scale": scale, "group_size": group_size}
    if density is None:
        return Part(dense_segment(values, first_column, **options), exact)
    mask = rng.random(shape) < density
    bits = np.packbits(mask, axis=1, bitorder="little")
    segment = bitmask_segment(bits, values[mask], shape[1], first_column, **options)
    return Part(segment, exact * mask)


def guarded(shape: tuple[int, int], dtype: np.dtype, shift: int = 0) -> tuple[Any, Any]:
    """An output between guard bytes, `shift` items off alignment, and a check of the guards."""
    size = int(np.prod(shape)) * dtype.itemsize
    start = GUARD + shift * dtype.itemsize
    buffer = np.full(start + size + GUARD, 0xA5, np.uint8)

    def check() -> None:
        assert (buffer[:start] == 0xA5).all(), "written before y"
        assert (buffer[start + size :] == 0xA5).all(), "written behind y"

    return buffer[start : start + size].view(dtype).reshape(shape), check


def unaligned(x: np.ndarray) -> np.ndarray:
    """A copy whose address is one item off a multiple of 64."""
    room = np.zeros(x.nbytes + 128 + x.itemsize, np.uint8)
    start = -room.ctypes.data % 64 + x.itemsize
    copy = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def check_close(y: np.ndarray, x: np.ndarray, exact: np.ndarray) -> None:
    """Within float32 accuracy of the sum of magnitudes, plus one rounding to y's dtype."""
    wide = x.astype(np.float64)
    want = wide @ exact.T
    bound = 1e-6 * (np.abs(wide) @ np.abs(exact).T) + ROUNDING[y.dtype] * np.abs(want) + 1e-7
    assert (np.abs(y.astype(np.float64) - want) <= bound).all()


def multiply(packed: np.ndarray, x: np.ndarray, dtype: np.dtype, threads: int = 1) -> np.ndarray:
    rows = int(packed[16:24].view(np.int64)[0])
    y, check = guarded((x.shape[0], rows), dtype, shift=threads % 3)
    linear(unaligned(x), packed, y, threads=threads)
    check()
    return y.copy()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("density", [None, 0, 0.1, 0.5, 0.9, 1], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16, I8], ids=str)
def test_sizes(isa: str, dtype: np.dtype, density: float | None) -> None:
    dispatch._set_isa(isa)
    rng = np.random.default_rng(7)
    for i, columns in enumerate([*SIZES, 1024, 2050]):
        rows, batch = SIZES[(3 * i + 2) % 8], [1, 2, 3, 5][i % 4]
        group_size = [0, 64, 32, 13, 128][i % 5]
        scales = FLOATS[i % 3]
        one = part(rng, (rows, columns), dtype, density, 0, group_size, scales)
        packed = pack_linear(rows, columns, [one.segment])
        x = rng.standard_normal((batch, columns)).astype(FLOATS[i % 3])
        check_close(multiply(packed, x, FLOATS[(i + 1) % 3]), x, one.exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("density", [None, 0.5], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16, I8], ids=str)
def test_batches_and_threads(isa: str, dtype: np.dtype, density: float | None) -> None:
    """A row's bits depend neither on the other rows nor on the number of threads."""
    dispatch._set_isa(isa)
    rng = np.random.default_rng(8)
    rows, columns = 83, 1231
    one = part(rng, (rows, columns), dtype, density, group_size=192)
    packed = pack_linear(rows, columns, [one.segment])
    x = rng.standard_normal((100, columns)).astype(np.float32)
    alone = np.concatenate([multiply(packed, row[None], F32) for row in x])
    check_close(alone, x, one.exact)
    for batch in [*range(2, 10), 33, 100]:
        for threads in (1, 2, 5):
            y = multiply(packed, x[:batch], F32, threads)
            assert y.tobytes() == alone[:batch].tobytes(), (batch, threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("out", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activation_dtypes(isa: str, dtype: np.dtype, out: np.dtype) -> None:
    dispatch._set_isa(isa)
    rng = np.random.default_rng(9)
    one = part(rng, (33, 257), BF16, 0.5)
    packed = pack_linear(33, 257, [one.segment])
    for batch in (1, 4):
        x = rng.standard_normal((batch, 257)).astype(dtype)
        check_close(multiply(packed, x, out), x, one.exact)


def codes_part(rng: np.random.Generator, rows: int, columns: int, bits: int, first: int) -> Part:
    codes = rng.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.02, (rows, -(-columns // 64))).astype(np.float16)
    exact = codes.astype(np.float64) - (1 << (bits - 1))
    exact *= np.repeat(scale.astype(np.float64), 64, axis=1)[:, :columns]
    return Part(codes_segment(Codes(codes, scale, None, bits, 64), first), exact)


@pytest.mark.parametrize("isa", ISAS)
def test_mixed_segments(isa: str) -> None:
    """Columns as 4-bit codes, a bitmask, dense values, nothing, int8 and 8-bit codes."""
    dispatch._set_isa(isa)
    rng = np.random.default_rng(10)
    rows = 37
    parts = [
        codes_part(rng, rows, 100, 4, 0),
        part(rng, (rows, 301), BF16, 0.4, 100),
        part(rng, (rows, 75), F16, None, 401),
        part(rng, (rows, 130), I8, 0.6, 480, 64),
        codes_part(rng, rows, 96, 8, 610),
    ]
    exact = np.zeros((rows, 706))
    for one in parts:
        start = one.segment.first_column
        exact[:, start : start + one.segment.columns] = one.exact
    bias = rng.standard_normal(rows).astype(np.float32)
    packed = pack_linear(rows, 706, [one.segment for one in parts], bias=bias)
    for batch in (1, 2, 7):
        x = rng.standard_normal((batch, 706)).astype(np.float32)
        y = multiply(packed, x, F32)
        want = x.astype(np.float64) @ exact.T + bias
        bound = 2e-4 * (np.abs(x).astype(np.float64) @ np.abs(exact).T)  # codes round activations
        assert (np.abs(y - want) <= bound).all()
        assert y.tobytes() == multiply(packed, x, F32, threads=2).tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dense_linear(isa: str, dtype: np.dtype) -> None:
    """A weight in place, at any address, gives the bits of the packed one."""
    dispatch._set_isa(isa)
    rng = np.random.default_rng(11)
    for i, (rows, columns) in enumerate(
        [(0, 5), (3, 0), (1, 1), (17, 100), (33, 1000), (50, 2051)]
    ):
        w = unaligned(rng.standard_normal((rows, columns)).astype(np.float32).astype(dtype))
        before = w.tobytes()
        for batch in (0, 1, 2, 6):
            x = rng.standard_normal((batch, columns)).astype(FLOATS[i % 3])
            y, check = guarded((batch, rows), FLOATS[(i + 1) % 3], shift=1)
            dense_linear(x, w, y, threads=1 + batch)
            check()
            check_close(y, x, w.astype(np.float64))
            packed = pack_linear(rows, columns, [dense_segment(w)])
            assert y.tobytes() == multiply(packed, x, y.dtype).tobytes()
        assert w.tobytes() == before


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_byte_of_the_mask(isa: str, dtype: np.dtype) -> None:
    """All 256 patterns of eight columns, and special values of the dtype."""
    dispatch._set_isa(isa)
    mask = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") > 0
    mask = np.tile(mask, (1, 9))
    tiny, largest = ml_dtypes.finfo(dtype).smallest_subnormal, ml_dtypes.finfo(dtype).max
    base = np.array([1, -2, 3, tiny, -tiny, 0.5, largest, -7], dtype)
    values = np.where(mask, np.tile(base, (256, 9)), base.dtype.type(0))
    bits = np.packbits(mask, axis=1, bitorder="little")
    packed = pack_linear(256, 72, [bitmask_segment(bits, values[mask], 72)])
    got = np.zeros((72, 256), np.float32)
    linear(np.eye(72, dtype=np.float32), packed, got)  # each column alone
    assert np.array_equal(got.T, values.astype(np.float32))
    for column in (0, 9, 63, 71):
        one = np.zeros((1, 256), np.float32)
        linear(np.eye(72, dtype=np.float32)[column : column + 1], packed, one)
        assert np.array_equal(one[0], values[:, column].astype(np.float32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [I8, np.dtype(np.uint8)], ids=str)
def test_every_int8(isa: str, dtype: np.dtype) -> None:
    """int8 and the offset-binary codes of the native format, with the scale of their group."""
    dispatch._set_isa(isa)
    values = np.arange(256, dtype=np.uint8).reshape(4, 64)
    stored = values.view(np.int8) if dtype == I8 else values
    integers = stored.astype(np.int32) - (0 if dtype == I8 else 128)
    scale = np.array([[0.5, 2], [1, 3], [0.25, 1e-37], [7, 3e-36]], np.float32)
    want = integers.astype(np.float32) * np.repeat(scale, 32, axis=1)
    bits = np.full((4, 8), 255, np.uint8)
    for segment in (
        dense_segment(stored, scale=scale, group_size=32),
        bitmask_segment(bits, stored.reshape(-1), 64, scale=scale, group_size=32),
    ):
        got = np.zeros((64, 4), np.float32)
        linear(np.eye(64, dtype=np.float32), pack_linear(4, 64, [segment]), got)
        assert np.array_equal(got.T, want)


@pytest.mark.parametrize("isa", ISAS)
def test_what_lies_beside_a_row_is_not_read(isa: str) -> None:
    """A NaN in the next row of x or w, or behind the kept values, stays there."""
    dispatch._set_isa(isa)
    rng = np.random.default_rng(12)
    for columns in (1, 9, 63, 65, 1030):
        w = rng.standard_normal((5, columns)).astype(np.float32)
        w[1::2] = np.nan
        mask = rng.random(w.shape) < 0.5
        bits = np.packbits(mask, axis=1, bitorder="little")
        x = rng.standard_normal((4, columns)).astype(np.float32)
        x[1::2] = np.nan
        for segment in (dense_segment(w), bitmask_segment(bits, w[mask], columns)):
            y = multiply(pack_linear(5, columns, [segment]), x, F32)
            assert np.isfinite(y[::2, ::2]).all()


def test_bad_arguments() -> None:
    x, y = np.zeros((2, 8), np.float32), np.zeros((2, 4), np.float32)
    w = np.zeros((4, 8), np.float32)
    bits, kept = np.full((4, 1), 3, np.uint8), np.zeros(8, np.float32)
    refused: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "w must be", lambda: dense_linear(x, w.astype(np.float64), y)),
        (TypeError, "x must be", lambda: dense_linear(x.astype(np.int32), w, y)),
        (TypeError, "y must be", lambda: dense_linear(x, w, y.astype(np.float64))),
        (ValueError, "w must be", lambda: dense_linear(x, w[0], y)),
        (ValueError, "w must be", lambda: dense_linear(x, np.asfortranarray(w), y)),
        (ValueError, "x must be", lambda: dense_linear(x[:, :7], w, y)),
        (ValueError, "x must be", lambda: dense_linear(np.asfortranarray(x), w, y)),
        (ValueError, "y must be", lambda: dense_linear(x, w, y[:1])),
        (ValueError, "y must be", lambda: dense_linear(x, w, y.T.copy().T)),
        (ValueError, "threads", lambda: dense_linear(x, w, y, threads=0)),
        (TypeError, "values must be", lambda: dense_segment(w.astype(np.float64))),
        (ValueError, "values must be", lambda: dense_segment(w[0])),
        (ValueError, "scale and group_size", lambda: dense_segment(w, group_size=8)),
        (ValueError, "scale must be given", lambda: dense_segment(w.astype(np.int8))),
        (TypeError, "bits must be", lambda: bitmask_segment(w, kept, 8)),  # type: ignore[arg-type]
        (ValueError, "bits must be", lambda: bitmask_segment(bits, kept, 9)),
        (ValueError, "bits has ones", lambda: bitmask_segment(bits, kept, 1)),
        (ValueError, "columns", lambda: bitmask_segment(bits, kept, -1)),
        (ValueError, "kept must have", lambda: bitmask_segment(bits, kept[1:], 8)),
        (TypeError, "values must be", lambda: bitmask_segment(bits, kept.astype(np.int32), 8)),
    ]
    int8 = kept.astype(np.int8)
    for scale, size, error, message in (
        (np.zeros((4, 3), np.float32), 4, ValueError, r"scale must be \[4, 2\]"),
        (np.zeros((4, 2), np.float64), 4, TypeError, "scale must be"),
        (np.zeros((4, 2), np.float32), -4, ValueError, "group_size"),
    ):
        with pytest.raises(error, match=message):
            bitmask_segment(bits, int8, 8, scale=scale, group_size=size)
    for kind, text, call in refused:
        with pytest.raises(kind, match=text):
            call()


@pytest.mark.parametrize("isa", ISAS[1:])
def test_damaged_buffers(isa: str) -> None:
    """A changed header, row start or mask gives a ValueError or some result, never a crash."""
    dispatch._set_isa(isa)
    rng = np.random.default_rng(13)
    rows, columns = 21, 333
    parts = [
        part(rng, (rows, 133), BF16, 0.5, 0),
        part(rng, (rows, 100), I8, 0.3, 133, 32),
        part(rng, (rows, 60), F32, None, 233),
        part(rng, (rows, 40), I8, None, 293, 16),
    ]
    whole = pack_linear(rows, columns, [one.segment for one in parts])
    words = 16 + 12 * len(parts)
    header = whole[: 8 * words].view(np.int64)
    starts = [int(header[16 + 12 * i + 10]) for i in (0, 1)]
    masks = [int(header[16 + 12 * i + 9]) for i in (0, 1)]
    x = {n: rng.standard_normal((n, columns)).astype(np.float32) for n in (1, 2, 4)}
    nasty = [0, 1, 2, 3, 7, 8, 64, -1, -8, 2**31, 2**62, 2**63 - 1, -(2**63), rows, columns]
    computed = refused = 0
    for turn in range(4000):
        damaged = whole.copy()
        value = int(rng.choice(np.array(nasty))) if turn % 2 else int(rng.integers(0, 6000))
        if turn % 8 < 5:
            damaged[: 8 * words].view(np.int64)[rng.integers(2, words)] = value
        elif turn % 8 < 7:
            at = starts[turn % 2] + 8 * int(rng.integers(rows))
            damaged[at : at + 8].view(np.int64)[0] = value
        else:
            damaged[masks[turn % 16 // 8] :][:17] = rng.integers(0, 256, 17, dtype=np.uint8)
        batch = (1, 2, 4)[turn % 3]
        y, check = guarded((batch, rows), F32)
        try:
            linear(x[batch], damaged, y)
            computed += 1
        except ValueError:
            refused += 1
        check()
    assert computed > 500
    assert refused > 500
