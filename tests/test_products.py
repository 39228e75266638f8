"""Products with packed matrices: exact integer sums, the same bits everywhere, errors in bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from compress.kernels import dispatch
from compress.kernels.packing import (
    HEADER_WORDS,
    MAX_SEGMENTS,
    SEGMENT_WORDS,
    codes_segment,
    pack_linear,
)
from compress.kernels.products import linear, linear_shape
from compress.kernels.reference_products import unpack_tiles, view
from compress.tensor import Codes, Factors

_EXTENSION = dispatch.load_extension()
ISAS: list[str] = ["reference", *(_EXTENSION.available_isas() if _EXTENSION else [])]
BF16 = np.dtype(ml_dtypes.bfloat16)
GUARD = 64


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    before = dispatch.current()
    yield
    if before.native is not None:
        before.native.set_isa(before.backend.isa)
    dispatch._State.resolution = before


def codes(
    rng: np.random.Generator,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    *,
    zero: bool = False,
    scale_dtype: object = np.float16,
) -> Codes:
    rows, columns = shape
    groups = -(-columns // group_size)
    return Codes(
        rng.integers(0, 1 << bits, shape, dtype=np.uint8),
        (rng.standard_normal((rows, groups)) * 0.01).astype(scale_dtype),
        rng.integers(0, 1 << bits, (rows, groups), dtype=np.uint8) if zero else None,
        bits,
        group_size,
    )


def run(
    packed: np.ndarray,
    x: np.ndarray,
    dtype: object = np.float32,
    *,
    isa: str = "",
    precision: str = "exact",
    threads: int = 1,
) -> np.ndarray:
    """The product, with guard bytes around y."""
    if isa:
        dispatch._set_isa(isa)
    rows = linear_shape(packed)[0]
    dtype = np.dtype(dtype)
    size = x.shape[0] * rows * dtype.itemsize
    room = np.full(size + 2 * GUARD, 0xA5, np.uint8)
    y = room[GUARD : GUARD + size].view(dtype).reshape(x.shape[0], rows)
    linear(x, packed, y, precision=precision, threads=threads)
    assert (room[:GUARD] == 0xA5).all() and (room[GUARD + size :] == 0xA5).all()
    return y.copy()


def distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - want) / max(np.linalg.norm(want), 1e-300))


SHAPES = [
    (0, 32, 32),
    (1, 1, 1),
    (1, 16, 16),
    (7, 0, 16),
    (15, 172, 32),
    (16, 128, 128),
    (17, 90, 20),
    (33, 300, 64),
    (40, 257, 257),
    (48, 520, 256),
    (5, 1000, 1000),
    (64, 384, 128),
]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_every_instruction_set_gives_the_reference_bits(bits: int, precision: str) -> None:
    rng = np.random.default_rng(bits)
    for rows, columns, group_size in SHAPES:
        for batch in (0, 1, 2, 3, 4, 5, 9, 34):
            zero = bool(rng.integers(2))
            scales = rng.choice(["float16", "bfloat16", "float32"])
            own = codes(rng, (rows, columns), bits, group_size, zero=zero, scale_dtype=scales)
            packed = pack_linear(rows, columns, [codes_segment(own)])
            dtype = rng.choice(["float32", "float16", "bfloat16"])
            raw = np.empty(batch * columns * np.dtype(dtype).itemsize + 1, np.uint8)
            x = raw[1:].view(dtype).reshape(batch, columns)  # at an odd address
            x[...] = rng.standard_normal((batch, columns)) ** 3 * 10.0 ** rng.integers(-6, 3)
            want = run(packed, x, dtype, isa="reference", precision=precision)
            for isa in ISAS[1:]:
                got = run(packed, x, dtype, isa=isa, precision=precision, threads=2)
                assert got.tobytes() == want.tobytes(), (isa, rows, columns, batch, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("precision", "bound"), [("exact", 5e-5), ("fast", 1.3e-2)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_error_against_the_decoded_weights(
    isa: str, precision: str, bound: float, bits: int
) -> None:
    """16-bit activations are within 1e-4 of the product with decoded weights, with room."""
    rng = np.random.default_rng(0)
    for group_size in (32, 64, 128, 1024):
        own = codes(rng, (48, 1024), bits, group_size, zero=group_size == 64)
        packed = pack_linear(48, 1024, [codes_segment(own)])
        for batch in (1, 5):
            x = rng.standard_normal((batch, 1024)).astype(np.float32)
            want = x.astype(np.float64) @ own.dequantize().astype(np.float64).T
            assert distance(run(packed, x, isa=isa, precision=precision), want) < bound


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("precision", "bound"), [("exact", 5e-5), ("fast", 1.3e-2)])
def test_massive_activations_cost_their_neighbours_nothing(
    isa: str, precision: str, bound: float
) -> None:
    """The error is that of the other activations, not of the massive one."""
    rng = np.random.default_rng(3)
    for bits, group_size, zero in ((4, 128, False), (8, 32, True), (2, 512, True)):
        own = codes(rng, (40, 512), bits, group_size, zero=zero)
        packed = pack_linear(40, 512, [codes_segment(own)])
        ordinary = rng.standard_normal((3, 512)).astype(np.float32)
        x = ordinary.copy()
        x[0, [7, 60, 300]], x[2, 511] = (3000.0, -2000.0, -900.0), 1e5
        dense = own.dequantize().astype(np.float64)
        error = run(packed, x, isa=isa, precision=precision) - x.astype(np.float64) @ dense.T
        float32 = 4e-7 * np.linalg.norm(np.abs(x.astype(np.float64)) @ np.abs(dense.T))
        assert np.linalg.norm(error) < bound * np.linalg.norm(ordinary @ dense.T) + float32


@pytest.mark.parametrize("isa", ISAS)
def test_results_do_not_depend_on_threads_or_on_the_rest_of_the_batch(isa: str) -> None:
    rng = np.random.default_rng(1)
    packed = pack_linear(200, 700, [codes_segment(codes(rng, (200, 700), 4, 64, zero=True))])
    x = rng.standard_normal((37, 700)).astype(np.float32)
    for precision in ("exact", "fast"):
        whole = run(packed, x, isa=isa, precision=precision)
        for threads in (2, 3, 8):
            again = run(packed, x, isa=isa, precision=precision, threads=threads)
            assert again.tobytes() == whole.tobytes()
        for start, stop in ((0, 1), (3, 5), (8, 36)):
            part = run(packed, x[start:stop], isa=isa, precision=precision)
            assert part.tobytes() == whole[start:stop].tobytes()


def test_large_batches_are_cut_into_rows_that_fit() -> None:
    rng = np.random.default_rng(12)
    packed = pack_linear(20, 64, [codes_segment(codes(rng, (20, 64), 4, 32))])
    x = rng.standard_normal((1100, 64)).astype(np.float32)
    whole = run(packed, x, BF16, threads=2)
    for start, stop in ((0, 1), (511, 513), (1024, 1100)):
        assert run(packed, x[start:stop], BF16).tobytes() == whole[start:stop].tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_non_finite_and_vanishing_activations(isa: str) -> None:
    """A NaN or an infinity makes its own row NaN; zeros and denormals give zeros, not noise."""
    rng = np.random.default_rng(2)
    packed = pack_linear(20, 100, [codes_segment(codes(rng, (20, 100), 4, 32))])
    x = rng.standard_normal((5, 100)).astype(np.float32)
    x[1, 50], x[2, 99], x[3], x[4] = np.nan, -np.inf, 0, 1e-40
    y = run(packed, x, isa=isa)
    assert np.isfinite(y[0]).all() and y[0].any()
    assert np.isnan(y[1]).all() and np.isnan(y[2]).all()
    assert not y[3].any() and not y[4].any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_every_term_at_once(isa: str, dtype: str) -> None:
    """Two widths of columns, factors, outliers and a bias equal the decoded matrix's product."""
    rng = np.random.default_rng(4)
    rows, columns, split, rank = 83, 333, 200, 9
    low, high = codes(rng, (rows, split), 4, 32), codes(rng, (rows, columns - split), 8, 64)
    integer = dtype == "int8"
    wide_b, wide_a = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
    factors = Factors(
        (wide_b * 40 if integer else wide_b * 0.05).astype(dtype),
        (wide_a * 40 if integer else wide_a * 0.05).astype(dtype),
        rng.random(rank).astype(np.float32) * 1e-3 if integer else None,
        rng.random(rank).astype(np.float32) * 1e-3 if integer else None,
    )
    place = rng.integers(0, rows, 11), rng.integers(0, columns, 11)
    outliers = (*place, rng.standard_normal(11).astype(np.float32))
    bias = rng.standard_normal(rows).astype(np.float32)
    packed = pack_linear(
        rows,
        columns,
        [codes_segment(low), codes_segment(high, split)],
        factors=factors,
        outliers=outliers,
        bias=bias,
    )
    dense = np.hstack([low.dequantize(), high.dequantize()]).astype(np.float64)
    b, a = factors.as_float32()
    dense += b.astype(np.float64) @ a.astype(np.float64)
    np.add.at(dense, place, outliers[2].astype(np.float64))
    for batch in (1, 4, 33):
        x = rng.standard_normal((batch, columns)).astype(np.float32)
        want = x.astype(np.float64) @ dense.T + bias
        one = run(packed, x, isa=isa, threads=1)
        assert distance(one, want) < 5e-5
        assert run(packed, x, isa=isa, threads=3).tobytes() == one.tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_outputs_of_16_bits_are_the_rounded_float32_ones(isa: str) -> None:
    rng = np.random.default_rng(5)
    packed = pack_linear(64, 96, [codes_segment(codes(rng, (64, 96), 8, 32))])
    for scale in (1e-9, 1e-6, 1.0, 3e5):  # subnormal, normal and overflowing float16 results
        x = (rng.standard_normal((3, 96)) * scale).astype(np.float32)
        wide = run(packed, x, isa=isa)
        with np.errstate(over="ignore"):
            assert run(packed, x, np.float16, isa=isa).tobytes() == (
                wide.astype(np.float16).tobytes()
            )
        assert run(packed, x, BF16, isa=isa).tobytes() == wide.astype(BF16).tobytes()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("isa", ISAS)
def test_packed_tiles_hold_every_code(isa: str, bits: int) -> None:
    rng = np.random.default_rng(6)
    for rows, columns, group_size in SHAPES:
        dispatch._set_isa(isa)
        own = codes(rng, (rows, columns), bits, group_size)
        packed = codes_segment(own).arrays[6]
        assert (unpack_tiles(packed, rows, columns, bits, group_size) == own.values).all()


def test_a_packed_matrix_takes_little_more_than_its_codes_and_scales() -> None:
    rng = np.random.default_rng(7)
    own = codes(rng, (512, 2048), 4, 128)
    packed = pack_linear(512, 2048, [codes_segment(own)])
    assert packed.nbytes < 1.002 * (own.values.size // 2 + own.scale.nbytes)
    assert packed.ctypes.data % 64 == 0


def test_bad_arguments_are_named() -> None:
    rng = np.random.default_rng(8)
    own = codes(rng, (8, 32), 4, 32)
    packed = pack_linear(8, 32, [codes_segment(own)])
    x, y = np.zeros((2, 32), np.float32), np.zeros((2, 8), np.float32)
    frozen = y.copy()
    frozen.flags.writeable = False
    for error, text, arguments, options in [
        (TypeError, "x must be float32", (x.astype(np.float64), packed, y), {}),
        (TypeError, "y must be float32", (x, packed, y.astype(np.int32)), {}),
        (TypeError, "packed must be uint8", (x, packed.view(np.int8), y), {}),
        (ValueError, r"x must be \[batch, 32\]", (x[:, :31].copy(), packed, y), {}),
        (ValueError, r"x must be \[batch, 32\]", (x[0], packed, y), {}),
        (ValueError, r"y must be \[2, 8\]", (x, packed, y[:1]), {}),
        (ValueError, "x must be C-contiguous", (np.asfortranarray(x), packed, y), {}),
        (ValueError, "y must be writable", (x, packed, frozen), {}),
        (ValueError, "packed is not a packed matrix", (x, packed[1:], y), {}),
        (ValueError, "packed", (x, packed[:-64].copy(), y), {}),
        (ValueError, "precision must be", (x, packed, y), {"precision": "best"}),
        (ValueError, "threads must be positive", (x, packed, y), {"threads": 0}),
    ]:
        with pytest.raises(error, match=text):
            linear(*arguments, **options)


def test_bad_parts_are_refused_when_packing() -> None:
    rng = np.random.default_rng(9)
    segment = codes_segment(codes(rng, (8, 32), 4, 32))
    with pytest.raises(ValueError, match="does not fit"):
        pack_linear(9, 32, [segment])
    with pytest.raises(ValueError, match="does not fit"):
        pack_linear(8, 31, [segment])
    with pytest.raises(ValueError, match="bias must have shape"):
        pack_linear(8, 32, [segment], bias=np.zeros(7))
    with pytest.raises(ValueError, match="factors must be"):
        pack_linear(8, 32, [segment], factors=Factors(np.zeros((8, 2)), np.zeros((2, 31))))
    with pytest.raises(ValueError, match="outlier"):
        pack_linear(8, 32, [segment], outliers=(np.array([8]), np.array([0]), np.ones(1)))
    with pytest.raises(ValueError, match="does not fit"):
        pack_linear(8, 32, [replace(segment, first_column=-1)])
    with pytest.raises(ValueError, match="another one has"):
        pack_linear(8, 64, [segment, replace(segment, first_column=31)])
    with pytest.raises(ValueError, match="segments"):
        pack_linear(8, 32, [segment] * (MAX_SEGMENTS + 1))
    with pytest.raises(ValueError, match="scale and zero_point"):
        codes_segment(Codes(np.zeros((8, 32), np.uint8), np.ones((8, 3), np.float32), None, 4, 16))


@pytest.mark.skipif(_EXTENSION is None, reason="the compiled kernels are not built")
def test_damaged_buffers_are_refused_or_computed_but_never_read_outside() -> None:
    """Random words in the headers: an error that says so, or a result, never a crash."""
    rng = np.random.default_rng(10)
    own = codes(rng, (40, 96), 4, 32, zero=True)
    outliers = (np.array([3, 39]), np.array([5, 95]), np.ones(2, np.float32))
    factors = Factors(np.ones((40, 3), np.float16), np.ones((3, 96), np.float16))
    whole = pack_linear(40, 96, [codes_segment(own)], factors=factors, outliers=outliers)
    words = HEADER_WORDS + SEGMENT_WORDS
    x = np.ones((2, 96), np.float32)
    refused = 0
    interesting = [0, 1, 2, 3, 15, 17, 255, 2**31, 2**32, 2**62, 2**63 - 1, -1, -64]
    for _ in range(3000):
        packed = whole.copy()
        own_words = packed[: 8 * words].view(np.int64)
        for _ in range(int(rng.integers(1, 4))):
            own_words[rng.integers(words)] = rng.choice(
                [*interesting, int(rng.integers(0, packed.size))]
            )
        start = int(view(whole).words[12])
        if rng.random() < 0.3:
            packed[start + int(rng.integers(60))] = rng.integers(256)
        try:
            rows, columns = linear_shape(packed)
            if not 0 <= rows < 5000 or columns != x.shape[1]:
                rows = 40
            linear(x, packed, np.empty((2, rows), np.float32))
        except (ValueError, MemoryError):
            refused += 1
    assert 300 < refused < 3000


@pytest.mark.skipif(_EXTENSION is None, reason="the compiled kernels are not built")
@pytest.mark.parametrize("rows", [0, 16])
def test_damaged_factors_without_columns_write_nothing(rows: int) -> None:
    """No column bounds A, and a rank of 2^60 wraps the size of B."""
    packed = pack_linear(rows, 0, [])
    words = packed[: 8 * HEADER_WORDS].view(np.int64)
    for rank in (1 << 60, 1 << 62, (1 << 60) + 1, -1, packed.size + 1):
        words[6:10] = rank, 0, 128, 128
        with pytest.raises(ValueError, match="packed"):
            linear(np.empty((4, 0), np.float32), packed, np.empty((4, rows), np.float32))


@pytest.mark.skipif(_EXTENSION is None, reason="the compiled kernels are not built")
def test_products_run_on_torchs_threads_where_torch_is_loaded() -> None:
    """One pool: our own without torch, torch's OpenMP threads with it; the same bits on both."""
    program = """
import hashlib, sys
import numpy as np
if sys.argv[1] == "torch":
    import torch
from compress.kernels import _cpu
from compress.kernels.packing import codes_segment, pack_linear
from compress.kernels.products import linear
from compress.tensor import Codes
rng = np.random.default_rng(0)
codes = rng.integers(0, 16, (999, 512), dtype=np.uint8)
own = Codes(codes, rng.random((999, 4), np.float32), None, 4, 128)
packed = pack_linear(999, 512, [codes_segment(own)])
y = np.empty((40, 999), np.float32)
for threads in (1, 2, 5) * 20:
    linear(rng.standard_normal((40, 512), np.float32), packed, y, threads=threads)
print(_cpu.pool_name(), hashlib.sha256(y).hexdigest())
"""
    printed = [
        subprocess.run(
            [sys.executable, "-c", program, which], capture_output=True, text=True, check=True
        ).stdout.split()
        for which in ("torch", "none")
    ]
    assert printed[1][0] == "own"
    if sys.platform == "linux":
        assert printed[0][0] == "openmp"
    assert printed[0][1] == printed[1][1]


@pytest.mark.skipif(_EXTENSION is None, reason="the compiled kernels are not built")
def test_many_callers_at_once() -> None:
    rng = np.random.default_rng(11)
    packed = pack_linear(400, 256, [codes_segment(codes(rng, (400, 256), 4, 64))])
    x = rng.standard_normal((8, 256)).astype(np.float32)
    want = run(packed, x).tobytes()
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: run(packed, x, threads=3).tobytes(), range(200))
        assert all(result == want for result in found)


@pytest.mark.skipif(_EXTENSION is None or not hasattr(os, "fork"), reason="needs the kernels, fork")
@pytest.mark.parametrize("library", ["sys", "torch"])
def test_a_forked_child_still_multiplies(library: str) -> None:
    """The parent's threads, OpenMP's with torch and ours without, are gone in the child."""
    program = """
import os, sys
import numpy as np
__import__(sys.argv[1])
from compress.kernels.packing import codes_segment, pack_linear
from compress.kernels.products import linear
from compress.tensor import Codes
own = Codes(np.arange(4096, dtype=np.uint8).reshape(512, 8) % 16, np.ones((512, 1), np.float32),
            None, 4, 8)
packed = pack_linear(512, 8, [codes_segment(own)])
x = np.ones((40, 8), np.float32)
want, got = np.empty((2, 40, 512), np.float32)
linear(x, packed, want, threads=3)
child = os.fork()
if child == 0:
    linear(x, packed, got, threads=3)
    os._exit(0 if (want == got).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-W", "ignore", "-c", program, library]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
