"""The CUDA kernels give the reference's bytes, and write nothing else.

The very sources run here on the CPU, threads in order and in reverse (csrc/cuda/emulator), and on
a device where there is one. `make cuda-check` runs this file on a device.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from cuda_device import (  # noqa: F401
    Device,
    device_fixture,
    emulated_module,
    need_device,
    to_bytes,
)

from compress.kernels import cuda, reference, reference_quantize

WEIGHT_DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
SIZES = [0, 1, 2, 7, 8, 9, 31, 255, 1000, 4095, 4096, 4097, 20_003]


def weights(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Normal, heavy-tailed, tied, one-sided or tiny values."""
    values = rng.standard_normal(shape) * 10.0 ** rng.choice([-9, -5, -2, 0, 2])
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
    return np.clip(values, -largest, largest).astype(np.float32).astype(dtype)


# ---------------------------------------------------------------- magnitudes


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda d: d.name)
def test_magnitude_histogram(device: Device, dtype: np.dtype) -> None:
    rng = np.random.default_rng(1)
    for n in SIZES:
        w = weights(rng, (n,), dtype)
        want = rng.integers(0, 1 << 40, 1 << 15).astype(np.uint64)
        counts = device.put(want)
        reference.magnitude_histogram(w, want)
        cuda.magnitude_histogram(device.put(w), counts)
        assert to_bytes(counts) == want.tobytes(), n
        device.check()


def test_magnitude_histogram_without_a_shared_table(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.name == "gpu":
        pytest.skip("a device has the shared memory that it has")
    module = emulated_module()
    module.set_shared_memory(48 << 10)
    try:
        for dtype in WEIGHT_DTYPES:
            w = weights(np.random.default_rng(4), (3001,), dtype)
            want = np.zeros(1 << 15, np.uint64)
            counts = device.put(want)
            reference.magnitude_histogram(w, want)
            cuda.magnitude_histogram(device.put(w), counts)
            assert to_bytes(counts) == want.tobytes()
    finally:
        module.set_shared_memory(163 << 10)


def test_magnitude_histogram_low(device: Device) -> None:
    rng = np.random.default_rng(2)
    for n in SIZES:
        w = weights(rng, (n,), np.dtype(np.float32))
        prefix = int(reference.magnitude_key(w)[n // 2] >> 16) if n else 5
        want = rng.integers(0, 1 << 40, 1 << 16).astype(np.uint64)
        counts = device.put(want)
        reference.magnitude_histogram_low(w, prefix, want)
        cuda.magnitude_histogram_low(device.put(w), prefix, counts)
        assert to_bytes(counts) == want.tobytes(), n
        device.check()


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda d: d.name)
def test_threshold_mask_keeps_the_first_ties(device: Device, dtype: np.dtype) -> None:
    rng = np.random.default_rng(3)
    for n in SIZES:
        w = np.round(rng.standard_normal(n) * 2).astype(dtype)  # a handful of values: many ties
        keys = reference.magnitude_key(w)
        key = int(keys[n // 2]) if n else 7
        total = int((keys == key).sum())
        for threshold, ties in [
            (key, 0),
            (key, 1),
            (key, total // 2),
            (key, total + 9),
            (1 << 30, 3),
        ]:
            want = np.zeros(n, np.bool_)
            used = reference.threshold_mask(w, threshold, ties, want)
            mask = device.output((n,), np.bool_)
            assert cuda.threshold_mask(device.put(w), threshold, ties, mask) == used
            assert to_bytes(mask) == want.tobytes(), (n, threshold, ties)
            device.check()


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda d: d.name)
def test_finite_index_is_the_first(device: Device, dtype: np.dtype) -> None:
    rng = np.random.default_rng(5)
    for n in SIZES:
        w = weights(rng, (n,), dtype)
        assert cuda.finite_index(device.put(w)) == -1
        for value in (np.nan, np.inf, -np.inf):
            if n:
                places = rng.integers(0, n, 3)
                bad = w.copy()
                bad[places] = value
                assert cuda.finite_index(device.put(bad)) == places.min()
        device.check()


# ---------------------------------------------------------------- quantization


def quantize_both(
    device: Device, w: np.ndarray, mask: np.ndarray | None, options: dict[str, Any]
) -> tuple[tuple[int, list[bytes]], tuple[int, list[bytes]]]:
    """(status, output bytes) of the kernels and of the reference."""
    rows, columns = w.shape
    groups = -(-columns // options["group_size"])
    scale_type = reference_quantize.SCALE_DTYPES[options["scale_dtype"]]
    shapes = {
        "codes": ((rows, columns), np.uint8),
        "scale": ((rows, groups), scale_type),
        "zero_point": ((rows, groups), np.uint8),
        "sums": ((rows, 3), np.float64),
    }
    if options["symmetric"]:
        del shapes["zero_point"]
    want = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    have = {name: device.output(shape, dtype) for name, (shape, dtype) in shapes.items()}
    none = {"zero_point": None} if options["symmetric"] else {}
    expected = reference_quantize.quantize_groups(w, mask, **options, **want, **none)
    kept = None if mask is None else device.put(mask)
    status = cuda.quantize_groups(device.put(w), kept, **options, **have, **none)
    device.check()
    defined = expected == -1
    return (
        (status, [to_bytes(t) for t in have.values()] if defined else []),
        (expected, [a.tobytes() for a in want.values()] if defined else []),
    )


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=lambda d: d.name)
def test_quantize_groups(device: Device, dtype: np.dtype, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for columns in [0, 1, 15, 16, 17, 33, 100, 130, 257, 1000, 4097, 9001]:
        rows = int(rng.integers(0, 4)) if columns < 4000 else 1
        w = weights(rng, (rows, columns), dtype)
        mask = None if rng.random() < 0.4 else rng.random(w.shape) < rng.choice([0, 0.5, 0.9])
        options = {
            "bits": bits,
            "group_size": int(
                rng.choice([1, 7, 16, 32, 40, 64, 100, 128, 200, 4096, 5000, 70_000])
            ),
            "symmetric": bool(rng.integers(2)),
            "scale_dtype": str(rng.choice(["F16", "BF16", "F32"])),
            "search": str(rng.choice(["none", "mse"])),
            "signed_scale": bool(rng.integers(2)),
        }
        have, want = quantize_both(device, w, mask, options)
        assert have == want, (columns, options)


@pytest.mark.parametrize("search", ["none", "mse"])
@pytest.mark.parametrize("group_size", [16, 128, 256, 5000, 10_000])
def test_quantize_groups_over_every_path(device: Device, group_size: int, search: str) -> None:
    """Registers, one chunk, several chunks; with and without a mask and a short last group."""
    rng = np.random.default_rng(group_size)
    for symmetric in (True, False):
        for dtype in WEIGHT_DTYPES:
            columns = 2 * group_size + int(rng.integers(1, 16)) if group_size < 5000 else 9001
            w = rng.standard_normal((1, columns)).astype(np.float32).astype(dtype)
            options = {
                "bits": 4,
                "group_size": group_size,
                "symmetric": symmetric,
                "scale_dtype": "F16",
                "search": search,
                "signed_scale": True,
            }
            for mask in (None, rng.random(w.shape) < 0.5):
                have, want = quantize_both(device, w, mask, options)
                assert have == want, (dtype, symmetric)


def test_quantize_groups_names_the_first_bad_weight_or_group(device: Device) -> None:
    rng = np.random.default_rng(6)
    for group_size in (8, 64, 300, 5000):
        for _ in range(6):
            w = rng.standard_normal((3, 700)).astype(np.float32)
            for _ in range(int(rng.integers(1, 4))):  # too large for a float16 scale, or no number
                value = rng.choice([3e38, np.nan, np.inf, 1e30])
                w[rng.integers(3), rng.integers(700)] = value
            options = {
                "bits": 4,
                "group_size": group_size,
                "symmetric": bool(rng.integers(2)),
                "scale_dtype": str(rng.choice(["F16", "F32"])),
                "search": str(rng.choice(["none", "mse"])),
                "signed_scale": True,
            }
            mask = None if rng.integers(2) else rng.random(w.shape) < 0.5
            have, want = quantize_both(device, w, mask, options)
            assert have == want, options


# ---------------------------------------------------------------- codes and bitmasks


@pytest.mark.parametrize("bits", range(2, 9))
def test_dequantize_pack_and_unpack(device: Device, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for n in [0, 1, 3, 7, 8, 9, 16, 17, 40, 1000, 4099]:
        rows, extra = int(rng.integers(0, 4)), int(rng.integers(0, 9))
        codes = rng.integers(0, 256, (rows, n)).astype(np.uint8)
        width = (n * bits + 7) // 8 + extra
        want = np.zeros((rows, width), np.uint8)
        reference.pack_bits(codes, bits, want)
        packed = device.output((rows, width), np.uint8)
        cuda.pack_bits(device.put(codes), bits, packed)
        assert to_bytes(packed) == want.tobytes(), n
        back = device.output((rows, n), np.uint8)
        cuda.unpack_bits(device.put(want), bits, back)
        assert to_bytes(back) == (codes & ((1 << bits) - 1)).tobytes(), n

        group_size = int(rng.choice([1, 5, 32, 5000]))
        groups = -(-n // group_size)
        scale = weights(rng, (rows, groups), np.dtype(np.float32))
        zero = None
        if rng.integers(2):
            zero = rng.integers(0, 1 << bits, (rows, groups)).astype(np.uint8)
        decoded = np.zeros((rows, n), np.float32)
        reference.dequantize(codes, scale, zero, bits, group_size, decoded)
        out = device.output((rows, n), np.float32)
        points = None if zero is None else device.put(zero)
        cuda.dequantize(device.put(codes), device.put(scale), points, bits, group_size, out)
        assert to_bytes(out) == decoded.tobytes(), n
        device.check()


@pytest.mark.parametrize("dtype", [np.uint8, ml_dtypes.bfloat16, np.float32, np.float64])
def test_bitmask_compress_and_expand(device: Device, dtype: Any) -> None:
    rng = np.random.default_rng(7)
    for rows in (0, 1, 5, 9):
        for n in [0, 1, 7, 8, 31, 32, 33, 100, 1031]:
            values = (rng.standard_normal((rows, n)) * 50).astype(dtype)
            mask = rng.random((rows, n)) < rng.choice([0.0, 0.3, 1.0])
            bits = np.zeros((rows, (n + 7) // 8), np.uint8)
            kept = np.zeros(int(mask.sum()), dtype)
            count = reference.bitmask_compress(values, mask, bits, kept)
            have_bits, have_kept = (
                device.output(bits.shape, np.uint8),
                device.output(kept.shape, dtype),
            )
            given = (device.put(values), device.put(mask), have_bits, have_kept)
            assert cuda.bitmask_compress(*given) == count
            assert to_bytes(have_bits) == bits.tobytes()
            assert to_bytes(have_kept) == kept.tobytes()
            offsets = cuda.row_offsets(device.put(bits), n)
            assert offsets.tolist() == [0, *np.cumsum(mask.sum(axis=1))]
            want = np.zeros((rows, n), dtype)
            reference.bitmask_expand(bits, kept, dtype(3), want)
            out = device.output((rows, n), dtype)
            cuda.bitmask_expand(device.put(bits), device.put(kept), 3, out)
            assert to_bytes(out) == want.tobytes()
            device.check()


def test_row_offsets_of_many_rows(device: Device) -> None:
    """More rows than one round of the scan takes."""
    bits = np.random.default_rng(9).integers(0, 256, (9001, 3)).astype(np.uint8)
    counts = np.unpackbits(bits, axis=1, bitorder="little")[:, :21].sum(axis=1)
    assert cuda.row_offsets(device.put(bits), 21).tolist() == [0, *np.cumsum(counts)]


def test_bits_behind_the_last_column_count_for_nothing(device: Device) -> None:
    bits = np.full((3, 2), 0xFF, np.uint8)
    assert cuda.row_offsets(device.put(bits), 9).tolist() == [0, 9, 18, 27]


# ---------------------------------------------------------------- a device only


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("search", ["none", "mse"])
def test_real_sizes_give_the_bytes_of_the_cpu(search: str) -> None:
    from compress import kernels

    need_device()
    rows, columns, group_size = 4096, 14_336, 128
    rng = np.random.default_rng(8)
    w = (rng.standard_normal((rows, columns), np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    mask = rng.random(w.shape) < 0.5
    groups = columns // group_size
    device = Device("gpu")
    for kept in (None, mask):
        want = {
            "codes": np.zeros(w.shape, np.uint8),
            "scale": np.zeros((rows, groups), np.float16),
            "sums": np.zeros((rows, 3)),
        }
        have = {name: device.output(a.shape, a.dtype) for name, a in want.items()}
        options: dict[str, Any] = {
            "bits": 4,
            "group_size": group_size,
            "symmetric": True,
            "scale_dtype": "F16",
            "search": search,
            "signed_scale": True,
            "zero_point": None,
        }
        assert kernels.quantize_groups(w, kept, **options, **want) == -1
        placed = None if kept is None else device.put(kept)
        assert cuda.quantize_groups(device.put(w), placed, **options, **have) == -1
        for name, array in want.items():
            assert to_bytes(have[name]) == array.tobytes(), name
        device.check()


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_weights() -> None:
    need_device()
    n = (1 << 31) + 5001
    w = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    w[-1], w[-3], w[n // 2] = 2.0, 2.0, 1.0
    key = 0x4000  # of 2.0
    mask = torch.ones(n, dtype=torch.bool, device="cuda")
    assert cuda.threshold_mask(w, key, 1, mask) == 1
    assert mask.nonzero().tolist() == [[n - 3]]
    counts = torch.zeros(1 << 15, dtype=torch.int64, device="cuda")
    cuda.magnitude_histogram(w, counts)
    assert counts[[0, 0x3F80, key]].tolist() == [n - 3, 1, 2]
    w[-2] = float("nan")
    assert cuda.finite_index(w) == n - 2
