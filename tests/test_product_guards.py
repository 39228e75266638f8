"""Products touch their own memory alone: faulting pages behind inputs, guards around outputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from guarded import Guarded, fenced

from compress.kernels import dispatch, reference_products
from compress.kernels.packing import codes_segment, pack_linear
from compress.kernels.products import linear
from compress.tensor import Codes, Factors

_EXTENSION = dispatch.load_extension()
ISAS: list[str] = _EXTENSION.available_isas() if _EXTENSION else []

pytestmark = pytest.mark.skipif(not ISAS, reason="the compiled kernels are not built")


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    before = dispatch.current()
    yield
    if before.native is not None:
        before.native.set_isa(before.backend.isa)
    dispatch._State.resolution = before


def random_codes(
    rng: np.random.Generator, rows: int, columns: int, bits: int, group_size: int
) -> Codes:
    shape = (rows, -(-columns // group_size))
    values = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    zero = rng.integers(0, 1 << bits, shape, dtype=np.uint8) if rng.integers(2) else None
    scale = rng.standard_normal(shape).astype(rng.choice(["float32", "float16"]))
    return Codes(values, scale, zero, bits, group_size)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_products_stay_inside_their_arrays(isa: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for rows in (0, 1, 15, 16, 33):
        for columns in (1, 3, 31, 32, 128, 131, 260):
            own = random_codes(rng, rows, columns, bits, int(rng.choice([32, 64, 128, 1000])))
            terms = {}
            if rng.integers(2):
                rank, dtype = int(rng.integers(1, 6)), rng.choice(["float32", "float16", "int8"])
                b, a = np.ones((rows, rank), dtype), np.ones((rank, columns), dtype)
                terms["factors"] = Factors(b, a)
            if rows and rng.integers(2):
                place = np.array([0, rows - 1]), np.array([columns - 1, 0])
                terms["outliers"] = (*place, np.ones(2, np.float32))
            if rng.integers(2):
                terms["bias"] = np.ones(rows, np.float32)
            packed = fenced(pack_linear(rows, columns, [codes_segment(own)], **terms))
            for batch in (0, 1, 2, 5, 33):
                shift, dtype = int(rng.integers(4)), rng.choice(["float32", "float16"])
                x = fenced(rng.standard_normal((batch, columns)).astype(dtype), shift)
                results = []
                for name in ("reference", isa):
                    dispatch._set_isa(name)
                    out = Guarded()
                    linear(x, packed, out.array((batch, rows), dtype, shift), threads=2)
                    results.append(out.check())
                if "factors" not in terms:  # sums of floats may end in other bits
                    assert results[0] == results[1], (rows, columns, batch, shift)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_stays_inside_its_arrays(isa: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    native = dispatch._set_isa(isa) and dispatch.current().native
    assert native is not None
    for rows in (0, 1, 15, 16, 33):
        for columns in (0, 1, 3, 31, 128, 260):
            group_size = int(rng.choice([32, 48, 128, 1000]))
            codes = fenced(rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8))
            segment = codes_segment(
                Codes(
                    codes,
                    np.ones((rows, -(-columns // group_size)), np.float32),
                    None,
                    bits,
                    group_size,
                )
            )
            shape = segment.arrays[6].shape
            out, want = Guarded(), np.empty(shape, np.uint8)
            packed = out.array(shape, np.uint8, int(rng.integers(64)))
            native.pack_tiles(
                codes.reshape(-1), rows, columns, bits, group_size, packed.reshape(-1)
            )
            reference_products.pack_tiles(codes, bits, group_size, want)
            assert out.check() == [want.tobytes()]
