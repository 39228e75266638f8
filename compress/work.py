"""What one thread does with one tile: read, apply the passes, measure, pack."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compress import formats, kernels
from compress.checkpoint.writer import nbytes_of
from compress.errors import InputError, show
from compress.formats.base import MODEL, Named
from compress.passes.quantize import PLAIN_SQUARED_ERROR, SQUARED_ERROR, SQUARED_NORM
from compress.plan import Plan
from compress.solvers import baseline
from compress.tensor import DTYPES, Tensor
from compress.tiles import Tile, read_tile


@dataclass
class Sums:
    """Additive measurements of a tensor's tiles."""

    squared_error: float = 0.0
    squared_norm: float = 0.0
    plain_squared_error: float = 0.0
    plain_squared_norm: float = 0.0  # over the part that the plain figure was measured on
    nonzeros: int = 0
    seconds: float = 0.0
    plain: str = ""  # what the plain rounding was, e.g. "4 bits, group 32"
    extra: dict[str, float] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Fold in the next tile."""
        self.squared_error += other.squared_error
        self.squared_norm += other.squared_norm
        self.plain_squared_error += other.plain_squared_error
        self.plain_squared_norm += other.plain_squared_norm
        self.nonzeros += other.nonzeros
        self.seconds += other.seconds
        self.plain = self.plain or other.plain
        for key, value in other.extra.items():
            self.extra[key] = self.extra.get(key, 0.0) + value


@dataclass
class Packed:
    """A finished tile: its arrays by (part, name), or raw bytes; and what was measured."""

    arrays: Named
    raw: Any = None
    sums: Sums | None = None


def work_on(plan: Plan, tile: Tile) -> Packed:
    """Everything that happens to one tile between reading and writing."""
    started = time.perf_counter()
    if tile.raw:
        return Packed({}, raw=_raw_bytes(plan, tile))
    tensor = read_tile(plan.checkpoint, tile)
    terms = tile.tensor.terms
    if not terms.changed and tile.tensor.cast is not None:
        return _cast(tensor, tile, started)
    for one in plan.bound(tile.tensor):
        tensor = one.apply(tensor)
    sums = _measure(tensor)
    if terms.changed:
        arrays = plan.format.pack(tensor, terms)
    else:
        arrays = {(MODEL, tensor.info.name): tensor.info.from_matrix(tensor.source)}
        arrays |= formats.pack_super_weights(tensor)
    if terms.changed:
        _compare_with_plain(plan, tile, tensor, sums)
    sums.seconds = time.perf_counter() - started
    return Packed(arrays, sums=sums)


def _raw_bytes(plan: Plan, tile: Tile) -> Any:
    buffer = bytearray(tile.stop - tile.start)
    if buffer:
        plan.checkpoint.read_into(tile.tensor.info, tile.start, memoryview(buffer))
    return buffer


def _cast(tensor: Tensor, tile: Tile, started: float) -> Packed:
    """`--untouched`: another float dtype, refused where a finite weight would overflow."""
    tag = tile.tensor.cast or tensor.info.dtype
    with np.errstate(over="ignore"):
        values = tensor.source.astype(DTYPES[tag])
    wide = tensor.source.astype(np.float32)
    narrow = values.astype(np.float32)
    if bool(np.any(np.isinf(narrow) & np.isfinite(wide))):
        raise InputError(
            f"tensor {show(tensor.info.name)}: a weight of {np.abs(wide).max():g} does not fit "
            f"{tag}",
            hint="use --untouched bf16 or keep",
        )
    sums = Sums(nonzeros=int(np.count_nonzero(wide)))
    error = np.zeros(2)
    kernels.error_sums(wide, narrow, error)
    sums.squared_error, sums.squared_norm = float(error[0]), float(error[1])
    sums.seconds = time.perf_counter() - started
    shape = (-1, *tensor.info.shape[1:]) if tensor.info.shape else ()
    return Packed({(MODEL, tensor.info.name): values.reshape(shape)}, sums=sums)


def _measure(tensor: Tensor) -> Sums:
    """Squared error against the source; the quantizer has measured it on the way."""
    notes = tensor.notes
    sums = Sums(extra={k: v for k, v in notes.items() if k not in _SUM_NOTES})
    if SQUARED_ERROR in notes:
        sums.squared_error = notes[SQUARED_ERROR]
        sums.squared_norm = notes[SQUARED_NORM]
    else:
        error = np.zeros(2)
        source = _kernel_ready(tensor)
        kernels.error_sums(source, tensor.decode(), error)
        sums.squared_error, sums.squared_norm = float(error[0]), float(error[1])
    if tensor.mask is not None:
        sums.nonzeros = int(np.count_nonzero(tensor.mask))
    else:
        sums.nonzeros = tensor.source.size
    return sums


_SUM_NOTES = frozenset({SQUARED_ERROR, PLAIN_SQUARED_ERROR, SQUARED_NORM})


def _compare_with_plain(plan: Plan, tile: Tile, tensor: Tensor, sums: Sums) -> None:
    """What plain rounding at the same bytes would have cost."""
    terms = tile.tensor.terms
    codes = terms.codes
    if codes is not None and terms.nonzeros is None and terms.rank == 0:
        sums.plain_squared_error = tensor.notes.get(PLAIN_SQUARED_ERROR, 0.0)
        sums.plain_squared_norm = sums.squared_norm
        sums.plain = f"{codes.bits} bits, group {codes.group_size}, no search"
        return
    specs = plan.format.layout(tensor.info, terms)
    nbytes = sum(nbytes_of(s.dtype, s.shape) for s in specs)
    if nbytes >= tensor.info.nbytes:
        return  # nothing was saved: plain storage costs no error at all
    other = baseline.same_bytes(
        _kernel_ready(tensor),
        budget_bits_per_weight=8 * nbytes / tensor.info.size,
        group_size=codes.group_size if codes is not None else 64,
    )
    if other is None:
        return
    sums.plain_squared_error = other.squared_error
    sums.plain_squared_norm = other.squared_norm
    group = "a row" if other.group_size < 0 else f"group {other.group_size}"
    sums.plain = f"{other.bits} bits, {group}, searched scales"


def _kernel_ready(tensor: Tensor) -> Any:
    """The source in a dtype that kernels take: float64 and fp8 are widened to float32."""
    if tensor.info.dtype in ("F32", "F16", "BF16"):
        return np.ascontiguousarray(tensor.source)
    return tensor.source.astype(np.float32)
