"""What one thread does with one tile: read, apply the passes, measure, pack."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compress import formats, kernels
from compress.buffers import Buffer
from compress.checkpoint.writer import nbytes_of
from compress.errors import InputError, show
from compress.formats.arrays import plain
from compress.formats.base import MODEL, Named
from compress.layer_outputs import OutputSums, measure_outputs, moment_of
from compress.passes.base import CodesSpec
from compress.passes.quantize import PLAIN_SQUARED_ERROR, SQUARED_ERROR, SQUARED_NORM
from compress.plan import Plan
from compress.solvers import baseline
from compress.tensor import DTYPES, Array, Tensor
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
    cast_squared_error: float = 0.0  # of `--untouched`, kept apart from what passes cost
    cast_squared_norm: float = 0.0
    plain: str = ""  # what the plain rounding was, e.g. "4 bits, group 32"
    outputs: OutputSums = field(default_factory=OutputSums)
    extra: dict[str, float] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Fold in the next tile."""
        self.squared_error += other.squared_error
        self.squared_norm += other.squared_norm
        self.plain_squared_error += other.plain_squared_error
        self.plain_squared_norm += other.plain_squared_norm
        self.cast_squared_error += other.cast_squared_error
        self.cast_squared_norm += other.cast_squared_norm
        self.nonzeros += other.nonzeros
        self.seconds += other.seconds
        self.plain = self.plain or other.plain
        self.outputs.add(other.outputs)
        for key, value in other.extra.items():
            self.extra[key] = self.extra.get(key, 0.0) + value


@dataclass
class Packed:
    """A finished tile: its arrays by (part, name), or raw bytes; and what was measured.

    `buffer` goes back to the plan's pool once `raw` is written.
    """

    arrays: Named
    raw: Buffer | None = None
    sums: Sums | None = None
    buffer: Buffer | None = None


def work_on(plan: Plan, tile: Tile) -> Packed:
    """Everything that happens to one tile between reading and writing."""
    started = time.perf_counter()
    if tile.raw:
        return _untouched(plan, tile)
    terms = tile.tensor.terms
    buffer = plan.buffers.take()
    tensor = read_tile(plan.checkpoint, tile, buffer)
    for one in plan.bound(tile.tensor):
        tensor = one.apply(tensor)
    if terms.changed:
        recoded = tensor.codes is not None or tensor.factors is not None
        sums = _measure(tensor, rounded=recoded and plan.format.name == "dense")
        arrays = plan.format.pack(tensor, terms)
        _compare_with_plain(plan, tile, tensor, sums)
    else:  # super weights alone: the tensor goes as it is, its exact entries beside it
        values = tensor.info.from_matrix(tensor.source)
        sums = Sums(nonzeros=tensor.source.size)
        if tile.tensor.cast is not None:
            values = _cast(values, tile, sums)
        arrays = {(MODEL, tensor.info.name): values} | formats.pack_super_weights(tensor)
    arrays = {
        key: array.copy() if np.may_share_memory(array, buffer) else array
        for key, array in arrays.items()
    }
    plan.buffers.give(buffer)
    sums.seconds = time.perf_counter() - started
    return Packed(arrays, sums=sums)


def _untouched(plan: Plan, tile: Tile) -> Packed:
    """A range of bytes as it is, with the values a pass gave it, or as another float dtype."""
    info = tile.tensor.info
    buffer: Buffer | None = None
    if tile.tensor.terms.values:
        raw = _estimated(plan, tile)
    else:
        buffer = plan.buffers.take()
        raw = buffer[: tile.stop - tile.start]
        if raw.size:
            plan.checkpoint.read_into(info, tile.start, raw.data)
    if tile.tensor.cast is None:
        return Packed({}, raw=raw, buffer=buffer)
    sums = Sums(nonzeros=raw.size // DTYPES[info.dtype].itemsize)
    narrow = _cast(raw.view(DTYPES[info.dtype]), tile, sums)
    if buffer is not None:
        plan.buffers.give(buffer)
    return Packed({}, raw=narrow.view(np.uint8), sums=sums)


def _estimated(plan: Plan, tile: Tile) -> Buffer:
    """The tile's bytes of a vector with the values that a pass gave it."""
    info = tile.tensor.info
    tensor = Tensor(info, info.to_matrix(plan.checkpoint.read(info)))
    for one in plan.bound(tile.tensor):
        tensor = one.apply(tensor)
    values = tensor.source if tensor.values is None else tensor.values
    flat = np.ascontiguousarray(values, DTYPES[info.dtype]).reshape(-1).view(np.uint8)
    return flat[tile.start : tile.stop]


def _cast(values: Array, tile: Tile, sums: Sums) -> Array:
    """`--untouched`: another float dtype, refused where a finite weight would overflow."""
    tag = tile.tensor.cast or tile.tensor.info.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = values.astype(DTYPES[tag])
        lost = np.isinf(narrow.astype(np.float32)) & np.isfinite(values.astype(np.float64))
    if bool(lost.any()):
        raise InputError(
            f"tensor {show(tile.tensor.info.name)}: a weight of {values[lost].flat[0]:g} does not "
            f"fit {tag}",
            hint="use --untouched bf16 or keep",
        )
    error = values.astype(np.float64) - narrow.astype(np.float64)
    finite = np.isfinite(error)
    sums.cast_squared_error = float(np.square(error[finite]).sum())
    sums.cast_squared_norm = float(np.square(values[finite].astype(np.float64)).sum())
    return narrow


def _measure(tensor: Tensor, *, rounded: bool) -> Sums:
    """Squared error against the source; the quantizer has measured it on the way.

    `rounded`: of the values as they are stored in the source's dtype (the dense format).
    """
    notes = tensor.notes
    sums = Sums(extra={k: v for k, v in notes.items() if k not in _SUM_NOTES})
    if SQUARED_ERROR in notes and not rounded:
        sums.squared_error = notes[SQUARED_ERROR]
        sums.squared_norm = notes[SQUARED_NORM]
    else:
        error = np.zeros(2)
        decoded = plain(tensor).astype(np.float32) if rounded else tensor.decode()
        kernels.error_sums(_kernel_ready(tensor), np.ascontiguousarray(decoded), error)
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
        _measure_outputs(plan, tensor, sums, codes)
        return
    specs = plan.format.layout(tensor.info, terms)
    nbytes = sum(nbytes_of(s.dtype, s.shape) for s in specs)
    if nbytes >= tensor.info.nbytes:  # nothing was saved: plain storage costs no error at all
        _measure_outputs(plan, tensor, sums)
        return
    other = baseline.same_bytes(
        _kernel_ready(tensor),
        budget_bits_per_weight=8 * nbytes / tensor.info.size,
        group_size=codes.group_size if codes is not None else 64,
    )
    if other is None:
        _measure_outputs(plan, tensor, sums)
        return
    sums.plain_squared_error = other.squared_error
    sums.plain_squared_norm = other.squared_norm
    columns = other.group_size if other.group_size > 0 else tensor.source.shape[1]
    _measure_outputs(plan, tensor, sums, CodesSpec(other.bits, columns, True, "F16"), search="mse")
    group = "a row" if other.group_size < 0 else f"group {other.group_size}"
    sums.plain = f"{other.bits} bits, {group}, searched scales"


def _measure_outputs(
    plan: Plan, tensor: Tensor, sums: Sums, rounding: CodesSpec | None = None, search: str = "none"
) -> None:
    """What the layer's outputs lose, beside plain rounding, where calibration knows its inputs."""
    moment = moment_of(plan.statistics_of(tensor.info), tensor)
    if moment is not None:
        source, decoded = _kernel_ready(tensor), tensor.decode()
        sums.outputs = measure_outputs(source, decoded, moment, rounding, search=search)


def _kernel_ready(tensor: Tensor) -> Any:
    """The source in a dtype that kernels take: float64 and fp8 are widened to float32."""
    if tensor.info.dtype in ("F32", "F16", "BF16"):
        return np.ascontiguousarray(tensor.source)
    return tensor.source.astype(np.float32)
