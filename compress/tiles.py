"""Cutting a tensor into tiles: the unit that is read, worked on by one thread, and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from compress.buffers import Buffer
from compress.checkpoint import Checkpoint
from compress.passes.base import Pass, Terms
from compress.tensor import DTYPES, Role, Tensor, TensorInfo

TILE_BYTES = 4 << 20  # of source: large enough to amortise Python, small enough for the cache


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor: the indices of its passes, the terms it ends with, a cast."""

    info: TensorInfo
    steps: tuple[int, ...] = ()
    terms: Terms = field(default_factory=Terms)
    cast: str | None = None  # dtype tag that `--untouched` gives it


@dataclass(frozen=True)
class Tile:
    """Rows [start, stop) of a tensor's matrix; bytes [start, stop) of its data where `raw`."""

    tensor: TensorPlan
    start: int
    stop: int
    raw: bool
    cost: int  # bytes of memory while it is worked on, at most


def cut(tensor: TensorPlan, passes: Sequence[Pass], tile_bytes: int = TILE_BYTES) -> list[Tile]:
    """The tiles of one tensor in order; one tile where a pass or the format needs it whole."""
    info = tensor.info
    works = [passes[i] for i in tensor.steps]
    if not tensor.terms.changed and not tensor.terms.outliers[1]:
        starts = range(0, info.nbytes, tile_bytes) if info.nbytes else range(0, 1)
        cost = min(tile_bytes, info.nbytes) * (1 if tensor.cast is None else 6)
        return [Tile(tensor, s, min(s + tile_bytes, info.nbytes), True, cost) for s in starts]
    rows, columns = info.matrix_shape
    terms = tensor.terms
    whole = (
        info.role is Role.CONV1D
        or terms.rank > 0
        or terms.outliers[1] > 0
        or (terms.nonzeros is not None and terms.codes is not None)
        or not all(p.row_wise(info) for p in works)
    )
    row_bytes = max(1, columns * DTYPES[info.dtype].itemsize)
    step = rows if whole else max(1, tile_bytes // row_bytes)
    bounds = [(r, min(r + step, rows)) for r in range(0, rows, max(1, step))] or [(0, 0)]
    extra = sum(one.workspace(info) for one in works)
    return [Tile(tensor, a, b, False, _cost(tensor, b - a) + extra) for a, b in bounds]


def survey_tiles(
    tensor: TensorPlan, tile_bytes: int = TILE_BYTES, *, whole: bool = False
) -> list[Tile]:
    """Row tiles for a survey, one where the pass must see the tensor whole (or transposed)."""
    info = tensor.info
    rows, columns = info.matrix_shape
    row_bytes = max(1, columns * DTYPES[info.dtype].itemsize)
    step = rows if whole or info.role is Role.CONV1D else max(1, tile_bytes // row_bytes)
    bounds = [(r, min(r + step, rows)) for r in range(0, rows, max(1, step))] or [(0, 0)]
    return [Tile(tensor, a, b, False, 2 * (b - a) * row_bytes) for a, b in bounds]


def surveyed(tensor: TensorPlan, one: Pass, tile_bytes: int = TILE_BYTES) -> list[Tile]:
    """The tiles of a tensor in the next sweep of a pass, with what it needs beside them."""
    extra = one.survey_workspace(tensor.info)
    tiles = survey_tiles(tensor, tile_bytes, whole=one.surveys_whole(tensor.info))
    return [replace(tile, cost=tile.cost + extra) for tile in tiles]


def read_tile(checkpoint: Checkpoint, tile: Tile, buffer: Buffer | None = None) -> Tensor:
    """The source weights of a tile, as a matrix in the source's dtype; in `buffer` if they fit."""
    info = tile.tensor.info
    columns = info.matrix_shape[1]
    dtype = DTYPES[info.dtype]
    if info.role is Role.CONV1D and len(info.shape) == 2:
        return Tensor(info, info.to_matrix(checkpoint.read(info)))
    rows = tile.stop - tile.start
    nbytes = rows * columns * dtype.itemsize
    if buffer is None or nbytes > buffer.size:
        buffer = np.empty(nbytes, np.uint8)
    flat = buffer[:nbytes]
    if nbytes:
        checkpoint.read_into(info, tile.start * columns * dtype.itemsize, flat.data)
    return Tensor(info, flat.view(dtype).reshape(rows, columns), first_row=tile.start)


def _cost(tensor: TensorPlan, rows: int) -> int:
    """Bytes that working on `rows` rows takes at most: source, terms, scratch and packed result.

    The factors were set from measured peaks (bench/memory.py) and err on the high side.
    """
    info, terms = tensor.info, tensor.terms
    itemsize = DTYPES[info.dtype].itemsize
    size = rows * info.matrix_shape[1]
    per_weight = float(itemsize)
    if info.dtype not in ("F32", "F16", "BF16"):
        per_weight += 4  # widened to float32 first
    if terms.nonzeros is not None:
        per_weight += 1 + (0 if terms.codes is not None else 8 + itemsize)
    if terms.codes is not None:
        per_weight += 1 + terms.codes.bits / 8 + 8 / max(1, terms.codes.group_size)
        if terms.nonzeros is not None:
            per_weight += 3
    if terms.outliers[1]:
        per_weight += 8
    if terms.rank:
        per_weight += 8
    if tensor.cast is not None:
        per_weight += 2 + 8
    factors = terms.rank * (rows + info.matrix_shape[1]) * 16
    return int(size * per_weight) + factors
