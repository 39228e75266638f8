"""Products beyond 2^31: codes in a packed matrix, codes that are packed, and outputs.

See tests/test_kernels_vast.py for the method.
"""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest
from vast import folded, zeros

from compress.kernels import dispatch
from compress.kernels.packing import HEADER_WORDS, SEGMENT_WORDS, codes_segment, pack_linear
from compress.kernels.products import linear
from compress.tensor import Codes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does"),
    pytest.mark.skipif(dispatch.load_extension() is None, reason="the kernels are not built"),
]
COLUMNS, GROUP = 4096, 128
TILES = (1 << 31) // (16 * COLUMNS) + 5


def one_tile(bits: int) -> Codes:
    rng = np.random.default_rng(bits)
    values = rng.integers(0, 1 << bits, (16, COLUMNS), dtype=np.uint8)
    scale = rng.standard_normal((16, COLUMNS // GROUP)).astype(np.float16)
    return Codes(values, scale, None, bits, GROUP)


@pytest.mark.parametrize("bits", [4, 8])
def test_more_codes_than_2_31(bits: int) -> None:
    """Every tile but the last has scales of zero."""
    own = one_tile(bits)
    segment = codes_segment(own)
    small = pack_linear(16, COLUMNS, [segment])
    data, scale = segment.arrays[6].reshape(-1), segment.arrays[7].reshape(-1).view(np.uint8)
    start = 64 * ((HEADER_WORDS + SEGMENT_WORDS) * 8 // 64 + 1)
    scales = start + TILES * data.size
    packed = zeros((scales + TILES * scale.size,), np.uint8)
    words = packed[:start].view(np.int64)
    words[: HEADER_WORDS + SEGMENT_WORDS] = small[:start].view(np.int64)[
        : HEADER_WORDS + SEGMENT_WORDS
    ]
    words[1], words[2] = packed.size, 16 * TILES
    words[HEADER_WORDS + 6], words[HEADER_WORDS + 7] = start, scales
    packed[scales - data.size : scales] = data
    packed[-scale.size :] = scale
    x = np.random.default_rng(1).standard_normal((1, COLUMNS)).astype(np.float32)
    y, want = np.full((1, 16 * TILES), 7, np.float32), np.empty((1, 16), np.float32)
    linear(x, packed, y, threads=2)
    linear(x, small, want)
    assert y[0, -16:].tobytes() == want.tobytes()
    assert not y[0, :-16].any()


def test_more_codes_to_pack_than_2_31() -> None:
    own = one_tile(4)
    tile = codes_segment(own).arrays[6]
    codes = zeros((16 * TILES, COLUMNS), np.uint8)
    codes[-16:] = own.values
    out = folded((TILES, tile.size), np.uint8)
    native = dispatch.current().native
    assert native is not None
    native.pack_tiles(codes.reshape(-1), *codes.shape, 4, GROUP, out.reshape(-1))
    assert (out[-1] == tile).all()
    assert not out[0].any() and not out[-2].any()


def test_more_outputs_than_2_31() -> None:
    rows, columns = 1 << 15, 16
    rng = np.random.default_rng(2)
    values = rng.integers(0, 4, (rows, columns), dtype=np.uint8)
    own = Codes(values, np.ones((rows, 1), np.float16), None, 2, columns)
    packed = pack_linear(rows, columns, [codes_segment(own)])
    x = rng.standard_normal(((1 << 16) + 3, columns)).astype(np.float32)
    y = folded((len(x), rows), ml_dtypes.bfloat16)
    linear(x, packed, y, threads=2)
    want = np.empty((3, rows), ml_dtypes.bfloat16)
    for part in (slice(0, 3), slice(-3, None)):
        linear(x[part], packed, want)
        assert y[part].tobytes() == want.tobytes()
