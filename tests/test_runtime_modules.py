"""The modules and torch ops of the runtime, on packed matrices made in place."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from compress.kernels import dispatch
from compress.kernels.packing import codes_segment, pack_linear
from compress.kernels.rows import decode_rows
from compress.runtime import ops
from compress.runtime.modules import CompressedEmbedding, CompressedLinear, DenseLinear
from compress.tensor import Codes

pytestmark = pytest.mark.usefixtures("one_thread")


def codes(rows: int, columns: int, bits: int, group_size: int, zero: bool = False) -> Codes:
    rng = np.random.default_rng(rows + columns + bits)
    groups = -(-columns // group_size)
    scale = rng.uniform(0.01, 0.1, (rows, groups)).astype(np.float16)
    points = rng.integers(0, 1 << bits, (rows, groups), dtype=np.uint8) if zero else None
    values = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    return Codes(values, scale, points, bits, group_size)


def linear(rows: int = 24, columns: int = 48, **options: Any) -> CompressedLinear:
    packed = pack_linear(rows, columns, [codes_segment(codes(rows, columns, 4, 16))], **options)
    return CompressedLinear(torch.from_numpy(packed)).eval()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("columns", "group_size"), [(64, 32), (80, 80), (50, 20), (300, 300)])
def test_rows_of_a_packed_table(bits: int, columns: int, group_size: int) -> None:
    table = codes(37, columns, bits, group_size, zero=bits in (3, 4))
    packed = pack_linear(37, columns, [codes_segment(table)])
    rows = np.array([36, 0, 16, 15, 16])
    assert np.array_equal(decode_rows(packed, rows), table.dequantize()[rows])
    with pytest.raises(IndexError, match="0 to 36"):
        decode_rows(packed, np.array([37]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (0, 48)])
def test_any_leading_shape_and_dtype(dtype: Any, shape: tuple[int, ...]) -> None:
    weight = torch.from_numpy(codes(24, 48, 4, 16).dequantize()).double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = linear()(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 24)
    expected = x.double() @ weight.T
    step = {torch.float32: 1e-4, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert float((y.double() - expected).norm()) <= step * float(expected.norm())


def test_a_transposed_input_is_read_in_its_own_order() -> None:
    x = torch.randn(48, 5).T
    module = linear()
    assert not x.is_contiguous()
    assert torch.equal(module(x), module(x.contiguous()))


@pytest.mark.filterwarnings("ignore")
def test_torch_accepts_the_ops() -> None:
    packed = linear().packed
    x = torch.randn(2, 3, 48)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(ops.linear, (x.to(dtype), packed, 24, "exact"))
        torch.library.opcheck(ops.dense_linear, (x.to(dtype), torch.randn(24, 48).to(dtype)))
        torch.library.opcheck(ops.embedding, (torch.tensor([[1, 3]]), packed, 48, dtype))


@pytest.mark.filterwarnings("ignore")
def test_export_keeps_the_op() -> None:
    module, x = linear(), torch.randn(2, 48)
    program = torch.export.export(
        module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    )
    assert "compress.linear" in str(program.graph)
    longer = torch.randn(7, 48)
    assert torch.equal(program.module()(longer), module(longer))


def test_dense_linear_shares_the_weight() -> None:
    plain = torch.nn.Linear(48, 24, bias=True, dtype=torch.bfloat16).requires_grad_(False)
    module = DenseLinear(plain)
    assert module.weight is plain.weight
    for batch in (1, 8, 40):
        x = torch.randn(batch, 48).bfloat16()
        expected = x.double() @ plain.weight.double().T + plain.bias.double()
        assert torch.allclose(module(x).double(), expected, rtol=2e-2, atol=2e-2)


def test_wrong_tensors_are_named() -> None:
    module = linear()
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 48\], not \[2, 47\]"):
        module(torch.randn(2, 47))
    with pytest.raises(ValueError, match="x is on the device meta"):
        module(torch.randn(2, 48, device="meta"))
    with pytest.raises(ValueError, match="x requires a gradient"):
        module(torch.randn(2, 48, requires_grad=True))
    with pytest.raises(TypeError, match="float32, float16 or bfloat16, not"):
        module(torch.zeros(2, 48, dtype=torch.int32))
    with pytest.raises(ValueError, match="precision"):
        CompressedLinear(module.packed, "rough")
    with pytest.raises(TypeError, match="packed must be uint8"):
        CompressedLinear(module.packed.float())
    with pytest.raises(ValueError, match="not a packed matrix"):
        CompressedLinear(torch.zeros(1000, dtype=torch.uint8))
    table = CompressedEmbedding(module.packed, torch.float32)
    with pytest.raises(ValueError, match="indices are on the device meta"):
        table(torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(IndexError, match="0 to 23"):
        table(torch.tensor([24]))


def test_state_and_copies_keep_the_packed_bytes() -> None:
    module = linear(bias=np.arange(24, dtype=np.float32))
    x = torch.randn(3, 48)
    twin = copy.deepcopy(module).to(torch.bfloat16)
    assert twin.packed.dtype == torch.uint8
    assert torch.equal(twin(x), module(x))
    assert module.weight.shape == (24, 48) and module.weight.is_meta
    assert (module.weight.dtype, twin.weight.dtype) == (torch.float32, torch.bfloat16)
    assert CompressedLinear(module.packed, dtype=torch.float16).weight.dtype == torch.float16
    assert list(module.state_dict()) == ["packed"]


@pytest.mark.parametrize("native", [True, False])
def test_no_columns_give_the_bias(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        numpy_only = dispatch.Resolution(dispatch.current().backend, None)
        monkeypatch.setattr(dispatch, "current", lambda: numpy_only)
    bias = np.arange(24, dtype=np.float32)
    module = CompressedLinear(torch.from_numpy(pack_linear(24, 0, [], bias=bias)))
    y = module(torch.zeros(2, 3, 0))
    assert torch.equal(y, torch.from_numpy(bias).expand(2, 3, 24))


@pytest.mark.parametrize("batch", [1, 8])
def test_a_bias_is_added_before_the_one_rounding(batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.nn.Linear(48, 400, dtype=torch.bfloat16).requires_grad_(False)
    torch.nn.init.normal_(plain.bias, generator=generator)
    x = torch.randn(batch, 48, generator=generator).bfloat16()
    once = ops.dense_linear(x.float(), plain.weight) + plain.bias.float()
    assert torch.equal(DenseLinear(plain)(x), once.bfloat16())
