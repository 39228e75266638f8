"""Every instruction set of this machine gives the reference's bytes, and writes nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from guarded import Guarded, fenced

from compress import kernels
from compress.kernels import dispatch

_EXTENSION = dispatch.load_extension()
ISAS: list[str] = _EXTENSION.available_isas() if _EXTENSION else []
WEIGHT_DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
COLUMNS = [0, 1, 7, 15, 16, 17, 31, 33, 64, 100, 127, 128, 130, 257, 1000, 4095, 4097, 9001]

pytestmark = pytest.mark.skipif(not ISAS, reason="the compiled kernels are not built")


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    before = dispatch.current()
    yield
    if before.native is not None:
        before.native.set_isa(before.backend.isa)
    dispatch._State.resolution = before


class Undefined(int):
    """The status of a call whose outputs are undefined."""


def same_everywhere(call: Callable[[Guarded], Any]) -> None:
    """`call` fills guarded arrays and returns a value: both must equal the reference's.

    An index that names a bad weight (any int but -1 from a quantizer) leaves outputs undefined:
    such calls return it as `Undefined`.
    """

    def outcome(isa: str) -> tuple[Any, list[bytes]]:
        dispatch._set_isa(isa)
        guarded = Guarded()
        value = call(guarded)
        arrays = guarded.check()
        return value, [] if isinstance(value, Undefined) else arrays

    want = outcome("reference")
    for isa in ISAS:
        assert outcome(isa) == want, isa


def weights(rng: np.random.Generator, rows: int, columns: int, dtype: np.dtype) -> np.ndarray:
    """Normal, heavy-tailed, tied, one-sided or tiny values, at an odd address at times.

    What is read behind them faults.
    """
    values = rng.standard_normal((rows, columns)) * 10.0 ** rng.choice([-9, -5, -2, 0, 2])
    match rng.integers(5):
        case 0:
            values = values**3
        case 1:
            values = np.round(values * 4) / 4
        case 2:
            values = np.abs(values)
        case 3:
            values[rng.random(values.shape) < 0.5] = 0
    largest = 6e4 if dtype == np.float16 else 3e38
    small = np.clip(values, -largest, largest).astype(np.float32).astype(dtype)
    return fenced(small, int(rng.integers(2)))


def column_weights(rng: np.random.Generator, columns: int) -> np.ndarray | None:
    """None, or weights of many magnitudes, a part of them (or all) zero."""
    if rng.random() < 0.5:
        return None
    weights = 10.0 ** rng.uniform(-20, 3, columns)
    weights[rng.random(columns) < rng.choice([0, 0.3, 1])] = 0
    return fenced(weights.astype(np.float32))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda d: d.name)
def test_quantize_groups(dtype: np.dtype, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for columns in COLUMNS:
        for _ in range(3):
            rows = int(rng.integers(0, 4))
            w = weights(rng, rows, columns, dtype)
            mask = None
            if rng.random() < 0.6:
                mask = fenced(rng.random(w.shape) < rng.choice([0, 0.5, 0.9]))
            group_size = int(rng.choice([1, 7, 16, 32, 40, 64, 128, 4096, 5000, 70_000]))
            scale_dtype = str(rng.choice(["F16", "BF16", "F32"]))
            symmetric, signed = bool(rng.integers(2)), bool(rng.integers(2))
            shift, search = int(rng.integers(4)), str(rng.choice(["none", "mse"]))
            groups = -(-columns // group_size)
            weights_of_columns = column_weights(rng, columns)

            def call(
                out: Guarded,
                w: np.ndarray = w,
                mask: np.ndarray | None = mask,
                column_weights: np.ndarray | None = weights_of_columns,
                options: tuple[Any, ...] = (group_size, symmetric, scale_dtype, search, signed),
                shape: tuple[int, int] = (rows, groups),
                shift: int = shift,
                width: int | None = (columns * bits + 7) // 8 + 1 if rng.random() < 0.5 else None,
            ) -> int:
                group_size, symmetric, scale_dtype, search, signed = options
                status = kernels.quantize_groups(
                    w,
                    mask,
                    bits=bits,
                    group_size=group_size,
                    symmetric=symmetric,
                    scale_dtype=scale_dtype,
                    search=search,
                    signed_scale=signed,
                    codes=out.array(w.shape, np.uint8, shift) if width is None else None,
                    scale=out.array(shape, kernels.SCALE_DTYPES[scale_dtype], shift),
                    zero_point=None if symmetric else out.array(shape, np.uint8, shift),
                    sums=out.array((w.shape[0], 3), np.float64),
                    packed=None
                    if width is None
                    else out.array((w.shape[0], width), np.uint8, shift),
                    column_weights=column_weights,
                )
                return status if status == -1 else Undefined(status)

            same_everywhere(call)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda d: d.name)
def test_quantize_extremes(dtype: np.dtype) -> None:
    """Every finite 16-bit pattern (or its like in float32), in one group and in small ones."""
    patterns = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    if dtype == np.float32:
        w = (patterns.astype(np.uint32) << 16 | 0x8123).view(np.float32)
    else:
        w = patterns.view(dtype)
    w = w[np.isfinite(w.astype(np.float32))].reshape(1, -1)
    for group_size, symmetric, scale_dtype in (
        (16, True, "F32"),
        (48, False, "BF16"),
        (w.size, True, "F32"),
    ):

        def call(
            out: Guarded,
            options: tuple[int, bool, str] = (group_size, symmetric, scale_dtype),
        ) -> int:
            group_size, symmetric, scale_dtype = options
            shape = (1, -(-w.size // group_size))
            status = kernels.quantize_groups(
                w,
                None,
                bits=4,
                group_size=group_size,
                symmetric=symmetric,
                scale_dtype=scale_dtype,
                search="mse",
                signed_scale=True,
                codes=out.array(w.shape, np.uint8),
                scale=out.array(shape, kernels.SCALE_DTYPES[scale_dtype]),
                zero_point=None if symmetric else out.array(shape, np.uint8),
                sums=out.array((1, 3), np.float64),
            )
            return status if status == -1 else Undefined(status)

        same_everywhere(call)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("scale_dtype", ["F16", "BF16", "F32"])
def test_errors_are_found_alike(dtype: np.dtype, scale_dtype: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        w = weights(rng, 3, 200, dtype)
        for value in rng.choice([np.nan, np.inf, -np.inf, 6e4, 1e6, 3e38], 2):
            with np.errstate(over="ignore"):
                w.reshape(-1)[rng.integers(w.size)] = np.float64(value).astype(dtype)
        group_size = int(rng.choice([16, 33, 200]))

        def call(out: Guarded, w: np.ndarray = w, group_size: int = group_size) -> int:
            shape = (3, -(-200 // group_size))
            status = kernels.quantize_groups(
                w,
                None,
                bits=3,
                group_size=group_size,
                symmetric=True,
                scale_dtype=scale_dtype,
                search="mse",
                signed_scale=True,
                codes=out.array(w.shape, np.uint8),
                scale=out.array(shape, kernels.SCALE_DTYPES[scale_dtype]),
                zero_point=None,
                sums=out.array((3, 3), np.float64),
            )
            found = status * 1000 + kernels.finite_index(w)
            return found if status == -1 else Undefined(found)

        same_everywhere(call)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda d: d.name)
def test_magnitudes(dtype: np.dtype) -> None:
    rng = np.random.default_rng(1)
    for columns in [*COLUMNS, 70_003]:
        w = weights(rng, 1, columns, dtype)
        keys = np.abs(w).view(f"u{dtype.itemsize}").reshape(-1)
        key = int(keys[rng.integers(columns)]) if columns else 5
        ties, shift = int(rng.integers(0, 40)), int(rng.integers(33))

        def call(
            out: Guarded, w: np.ndarray = w, key: int = key, ties: int = ties, shift: int = shift
        ) -> tuple[int, int]:
            counts = out.array((1 << 15,), np.uint64)
            counts[...] = 3
            kernels.magnitude_histogram(w, counts)
            if dtype == np.float32:
                low = out.array((1 << 16,), np.uint64)
                low[...] = 0
                kernels.magnitude_histogram_low(w, key >> 16, low)
            norms = out.array((1,), np.float64)
            kernels.squared_norms(w, norms)
            kept = kernels.threshold_mask(w, key, ties, out.array(w.shape, np.bool_, shift))
            return kept, kernels.finite_index(w)

        same_everywhere(call)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for columns in COLUMNS:
        rows, shift = int(rng.integers(0, 4)), int(rng.integers(33))
        codes = fenced(rng.integers(0, 256, (rows, columns), dtype=np.uint8))  # 8 bits: cut
        width = (columns * bits + 7) // 8 + int(rng.integers(0, 4))
        packed = fenced(rng.integers(0, 256, (rows, width), dtype=np.uint8))
        group_size = int(rng.choice([1, 7, 16, 33, 128, 10_000]))
        groups = -(-columns // group_size)
        scale = fenced(rng.standard_normal((rows, groups)).astype(np.float32), shift % 4)
        zero = fenced(rng.integers(0, 1 << bits, (rows, groups), dtype=np.uint8))

        def call(
            out: Guarded,
            arrays: tuple[np.ndarray, ...] = (codes, packed, scale, zero),
            group_size: int = group_size,
            shift: int = shift,
        ) -> None:
            codes, packed, scale, zero = arrays
            kernels.pack_bits(codes, bits, out.array(packed.shape, np.uint8, shift))
            kernels.unpack_bits(packed, bits, out.array(codes.shape, np.uint8, shift))
            for zero_point in (None, zero):
                decoded = out.array(codes.shape, np.float32, shift)
                kernels.dequantize(codes, scale, zero_point, bits, group_size, decoded)

        same_everywhere(call)


@pytest.mark.parametrize("item", [1, 2, 4, 8])
def test_bitmasks(item: int) -> None:
    rng = np.random.default_rng(item)
    for columns in COLUMNS:
        rows, shift = int(rng.integers(0, 4)), int(rng.integers(9))
        raw = rng.integers(0, 256, rows * columns * item, dtype=np.uint8)
        values = fenced(raw.view(f"u{item}").reshape(rows, columns), shift % item)
        mask = fenced(rng.random((rows, columns)) < rng.choice([0.0, 0.1, 0.5, 0.9, 1.0]))
        spare = int(rng.integers(9))  # room behind the kept values, which stays as it was

        def call(
            out: Guarded,
            arrays: tuple[np.ndarray, ...] = (values, mask),
            shift: int = shift,
            spare: int = spare,
        ) -> int:
            values, mask = arrays
            rows, columns = values.shape
            bits = out.array((rows, (columns + 7) // 8), np.uint8, shift)
            kept = out.array((int(mask.sum()) + spare,), values.dtype, shift)
            count = kernels.bitmask_compress(values, mask, bits, kept)
            back = out.array(values.shape, values.dtype, shift)
            kernels.bitmask_expand(fenced(bits), fenced(kept[:count], shift % item), 77, back)
            return count

        same_everywhere(call)


def test_padding_bits_of_a_mask_are_ignored() -> None:
    def call(out: Guarded) -> None:
        bits = np.full((2, 2), 0xFF, np.uint8)
        kept = np.arange(22, dtype=np.uint16)
        kernels.bitmask_expand(bits, kept, 0, out.array((2, 11), np.uint16))

    same_everywhere(call)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda d: d.name)
def test_float_matrices(dtype: np.dtype) -> None:
    rng = np.random.default_rng(3)
    for columns in COLUMNS:
        rows, rank = int(rng.integers(0, 4)), int(rng.choice([0, 1, 5, 130]))
        w = weights(rng, rows, columns, dtype)
        start = rng.standard_normal((rows, columns)).astype(np.float32)
        shift = int(rng.integers(4))
        b = fenced(rng.standard_normal((rows, rank)).astype(np.float32), shift)
        a = fenced(rng.standard_normal((rank, columns)).astype(np.float32), shift)
        decoded = fenced(start + np.float32(1), shift)

        def call(
            out: Guarded,
            w: np.ndarray = w,
            factors: tuple[np.ndarray, ...] = (start, b, a, decoded),
        ) -> None:
            matrix = out.array(w.shape, np.float32, 1)
            matrix[...] = factors[0]
            kernels.add_low_rank(matrix, factors[1], factors[2])
            sums = out.array((2,), np.float64)
            sums[...] = 1
            kernels.error_sums(w, factors[3], sums)
            kernels.squared_norms(w, out.array((w.shape[0],), np.float64))

        same_everywhere(call)


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
def test_the_environment_forces_an_implementation(isa: str) -> None:
    code = "from compress import kernels; print(kernels.backend().isa, kernels.backend().reason)"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "COMPRESS_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.split() == ["numpy" if isa == "reference" else isa, f"COMPRESS_ISA={isa}"]


def test_threads_do_not_disturb_each_other() -> None:
    from concurrent.futures import ThreadPoolExecutor

    rng = np.random.default_rng(9)
    tiles = [weights(rng, 8, 512, np.dtype(np.float32)) for _ in range(32)]

    def run(w: np.ndarray) -> bytes:
        codes, scale = np.empty(w.shape, np.uint8), np.empty((8, 8), ml_dtypes.bfloat16)
        status = kernels.quantize_groups(
            w,
            None,
            bits=4,
            group_size=64,
            symmetric=True,
            scale_dtype="BF16",
            search="mse",
            signed_scale=True,
            codes=codes,
            scale=scale,
            zero_point=None,
            sums=np.empty((8, 3)),
        )
        assert status == -1
        return codes.tobytes() + scale.tobytes()

    dispatch._set_isa(ISAS[-1])
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, tiles)) == [run(w) for w in tiles]


def test_a_negative_zero_keeps_its_sign() -> None:
    """Scales and factors of -0: what they multiply is a zero of the other sign."""
    codes = np.arange(40, dtype=np.uint8).reshape(1, 40)
    scale, ones = np.full((1, 1), -0.0, np.float32), np.ones((1, 40), np.float32)

    def call(guarded: Guarded) -> list[int]:
        decoded = guarded.array((1, 40), np.float32)
        kernels.dequantize(codes, scale, None, 4, 40, decoded)
        matrix = guarded.array((1, 40), np.float32)
        matrix[...] = -0.0
        kernels.add_low_rank(matrix, scale, ones)
        return [int(np.signbit(decoded).sum()), int(np.signbit(matrix).sum())]

    dispatch._set_isa("reference")
    assert call(Guarded()) == [32, 40]
    same_everywhere(call)
