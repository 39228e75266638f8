"""Wrong tensors are refused before any work, by the name of the argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cuda_device import emulated_module

from compress.errors import UsageError
from compress.kernels import cuda, cuda_products, cuda_tensors


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    state = cuda_tensors._State
    before = (state.loaded, state.module)
    state.loaded, state.module = True, emulated_module()
    yield
    state.loaded, state.module = before


def u8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def f16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def quantize(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "w": torch.zeros(2, 64),
        "mask": None,
        "bits": 4,
        "group_size": 32,
        "symmetric": True,
        "scale_dtype": "F16",
        "search": "none",
        "signed_scale": False,
        "codes": u8(2, 64),
        "scale": f16(2, 2),
        "zero_point": None,
        "sums": torch.zeros(2, 3, dtype=torch.float64),
    }
    assert cuda.quantize_groups(**arguments) == -1
    arguments.update(changes)
    cuda.quantize_groups(**arguments)


def codes(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "x": f16(1, 64),
        "packed": torch.zeros(16, 8, dtype=torch.int32),
        "scale": f16(16, 2),
        "zero_point": None,
        "bits": 4,
        "group_size": 32,
    }
    cuda_products.product_codes(**arguments)
    arguments.update(changes)
    cuda_products.product_codes(**arguments)


def bitmask(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "x": f16(1, 64),
        "bits": u8(16, 8),
        "kept": f16(0),
        "offsets": torch.zeros(17, dtype=torch.int64),
    }
    cuda_products.product_bitmask(**arguments)
    arguments.update(changes)
    cuda_products.product_bitmask(**arguments)


VALUES: list[tuple[Callable[[], Any], str]] = [
    (lambda: quantize(bits=9), "bits must be 2 to 8, not 9"),
    (lambda: quantize(group_size=0), "group_size must be positive"),
    (lambda: quantize(search="all"), "search must be"),
    (lambda: quantize(scale_dtype="F8"), "scale_dtype must be one of"),
    (lambda: quantize(zero_point=u8(2, 2)), "zero_point must be None"),
    (lambda: quantize(codes=u8(2, 63)), r"codes must have shape \(2, 64\), not \(2, 63\)"),
    (lambda: quantize(codes=u8(64, 2).T), "codes must be contiguous"),
    (lambda: quantize(scale=f16(2, 1)), "scale must have shape"),
    (
        lambda: quantize(w=torch.zeros(2, 64, device="meta")),
        "w must be on a cpu device, not on meta",
    ),
    (lambda: quantize(w=torch.zeros(128)), "w must have two axes, not 1"),
    (lambda: cuda.threshold_mask(f16(4), -1, 0, torch.zeros(4, dtype=torch.bool)), "key must be"),
    (lambda: cuda.threshold_mask(f16(4), 1, -1, torch.zeros(4, dtype=torch.bool)), "ties must not"),
    (lambda: cuda.pack_bits(u8(2, 9), 4, u8(2, 4)), r"out must be \[2, at least 5\], not \[2, 4\]"),
    (lambda: cuda.unpack_bits(u8(1, 9), 4, u8(2, 9)), "packed must be"),
    (lambda: cuda.bitmask_expand(u8(1, 1) + 3, f16(1), 0, f16(1, 8)), "keeps 2 values, but 1 were"),
    (
        lambda: cuda.bitmask_compress(f16(1, 8), f16(1, 8) == 0, u8(1, 1), f16(7)),
        "kept_out must be a vector of at least 8",
    ),
    (lambda: cuda.row_offsets(u8(3, 2), 17), "bits must have shape"),
    (lambda: codes(x=f16(64)), "x must have two axes"),
    (lambda: codes(packed=torch.zeros(16, 7, dtype=torch.int32)), "packed must have shape"),
    (lambda: codes(scale=f16(16, 1)), "scale must have shape"),
    (lambda: codes(zero_point=u8(16, 1)), "zero_point must have shape"),
    (lambda: codes(bias=f16(15)), "bias must have shape"),
    (lambda: codes(low_rank=(f16(16, 3), f16(2, 64))), r"low_rank\[1\] must have shape"),
    (lambda: codes(low_rank=(f16(15, 3), f16(3, 64))), r"low_rank\[0\] must have shape"),
    (lambda: bitmask(offsets=torch.zeros(16, dtype=torch.int64)), "offsets must have shape"),
    (lambda: bitmask(bits=u8(16, 9)), "bits must have shape"),
    (lambda: bitmask(kept=f16(1, 1)), "kept must be a vector"),
]

TYPES: list[tuple[Callable[[], Any], str]] = [
    (lambda: quantize(w=[1.0]), "w must be a torch tensor, not list"),
    (lambda: quantize(w=torch.zeros(2, 64, dtype=torch.float64)), "w must be float32 or float16"),
    (lambda: quantize(mask=u8(2, 64)), "mask must be bool, not uint8"),
    (lambda: quantize(scale=torch.zeros(2, 2)), "scale must be float16, not float32"),
    (lambda: cuda.magnitude_histogram(f16(4), u8(1 << 15)), "counts must be int64"),
    (lambda: codes(x=torch.zeros(1, 64)), "x must be float16 or bfloat16, not float32"),
    (lambda: codes(packed=u8(16, 32)), "packed must be int32, not uint8"),
    (lambda: codes(packed=None), "packed must be a torch tensor, not NoneType"),
    (lambda: codes(out_dtype=torch.int8), "out_dtype must be one of"),
    (lambda: bitmask(kept=torch.zeros(0)), "kept must be float16, not float32"),
]


def test_a_weighted_search_is_refused() -> None:
    with pytest.raises(UsageError, match="no weighted search"):
        quantize(search="mse", column_weights=torch.ones(64))
    quantize(search="none", column_weights=torch.ones(64))  # nothing to weigh


@pytest.mark.parametrize(("call", "message"), VALUES, ids=[message[:30] for _, message in VALUES])
def test_wrong_values(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), TYPES, ids=[message[:30] for _, message in TYPES])
def test_wrong_types(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_an_output_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="counts must be on a cpu device"):
        counts = torch.zeros(1 << 15, dtype=torch.int64, device="meta")
        cuda.magnitude_histogram(f16(4), counts)
