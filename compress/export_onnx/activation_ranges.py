"""Ranges of values inside an ONNX graph, from running it on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError, ResourceError, UsageError, show
from compress.tensor import Array

_BINS = 8192  # over both signs, so that 256 codes have some bins each
_SHRINK = np.arange(1.0, 0.29, -0.02)  # how much of the range seen is tried
_MAX_BYTES = (1 << 31) - 1  # of a protobuf message


@dataclass(frozen=True)
class Bounds:
    """What a value is clipped to, low <= 0 <= high; `highest` is the code of `high`."""

    low: float
    high: float
    highest: int = 255

    def affine(self) -> tuple[float, int]:
        """(scale, zero point): codes 0 to `highest` for [low, high], 0 exactly one of them."""
        scale = max((self.high - self.low) / self.highest, 2.0**-100)
        zero = int(np.clip(np.rint(-self.low / scale), 0, self.highest))
        return float(np.float32(scale)), zero


@dataclass(frozen=True)
class Ranges:
    """The bounds of values of a graph by name."""

    bounds: Mapping[str, Bounds]


def collect_ranges(
    graph: bytes,
    feeds: Iterable[Mapping[str, Array]],
    values: Mapping[str, int],
    folder: Path,
    *,
    search: bool = True,
) -> Ranges:
    """The ranges of float values of a graph (a serialized ModelProto) over all feeds.

    values  their names, and the highest code each will have
    folder  where the data of its initializers lies that is not inline
    search  clip to the range of least squared rounding error over a histogram, else take all that
            was seen (Migacz 2017 and Nagel et al. 2021, section 3.1, have both)
    Each value takes the memory of one batch while that runs. The same feeds give the same ranges.
    Raises UsageError without feeds, InputError where onnxruntime cannot run the graph, or where a
    value is not finite (it is named).
    """
    from compress.evaluate.onnx_outputs import Onnx

    runner = Onnx(folder / "model.onnx", exposed(graph, list(values)))
    found = {value: _Histogram() for value in values}
    for feed in feeds:
        made = [name for name in values if name not in feed]
        outputs = runner.outputs_of(feed, made) if made else []
        arrays = dict(feed) | dict(zip(made, outputs, strict=True))
        for value, histogram in found.items():
            histogram.add(value, np.asarray(arrays[value], np.float32))
    if values and not any(len(histogram.counts) for histogram in found.values()):
        raise UsageError(
            "no calibration inputs: activations have no ranges", hint="give --images or a sample"
        )
    return Ranges({v: h.bounds(values[v], search) for v, h in found.items()})


def exposed(graph: bytes, values: Sequence[str]) -> bytes:
    """A graph with values as further outputs. Raises ResourceError over 2 GB."""
    from onnx import ModelProto, ValueInfoProto

    model: Any = ModelProto()
    model.ParseFromString(graph)
    present = {one.name for one in (*model.graph.output, *model.graph.input)}
    model.graph.output.extend(ValueInfoProto(name=v) for v in values if v not in present)
    if model.ByteSize() > _MAX_BYTES:
        raise ResourceError("a graph with weights inside does not fit 2 GB")
    return bytes(model.SerializeToString())


class _Histogram:
    """Counts of values in `_BINS` bins over [-reach, reach); reach is a power of two and grows."""

    def __init__(self) -> None:
        self.counts = np.zeros(0, np.int64)
        self.reach, self.low, self.high = 0.0, 0.0, 0.0

    def add(self, name: str, values: NDArray[np.float32]) -> None:
        """Count a batch. Raises InputError where a value is not finite."""
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError(
                f"value {show(name)} of the graph is not finite on the calibration inputs",
                hint="activations of that size cannot be rounded to 8 bits: leave them float",
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._grow(max(-low, high, 2.0**-126))
        places = np.floor(values.ravel() * np.float32(_BINS / 2 / self.reach)).astype(np.int32)
        np.clip(places + _BINS // 2, 0, _BINS - 1, out=places)
        self.counts += np.bincount(places, minlength=_BINS)

    def _grow(self, largest: float) -> None:
        """Let the bins reach `largest`; each doubling joins pairs of bins."""
        if not len(self.counts):
            self.counts = np.zeros(_BINS, np.int64)
            self.reach = 2.0 ** np.ceil(np.log2(largest))
        while self.reach < largest:
            joined = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.zeros(_BINS, np.int64)
            self.counts[_BINS // 4 : 3 * _BINS // 4] = joined
            self.reach *= 2

    def bounds(self, highest: int, search: bool) -> Bounds:
        """All that was seen, or what of it loses least with codes from 0 to `highest`."""
        seen = Bounds(self.low, self.high, highest)
        if not search or self.high <= self.low:
            return seen
        used = np.flatnonzero(self.counts)
        centers = (used - _BINS / 2 + 0.5) * (2 * self.reach / _BINS)
        centers, counts = np.clip(centers, self.low, self.high), self.counts[used]

        def loss(one: Bounds) -> float:
            scale, zero = one.affine()
            codes = np.clip(np.rint(centers / scale) + zero, 0, highest)
            return float(counts @ np.square((codes - zero) * scale - centers))

        best = min((replace(seen, low=seen.low * s, high=seen.high * s) for s in _SHRINK), key=loss)
        if self.low < 0 < self.high:
            best = min((replace(best, high=seen.high * s) for s in _SHRINK), key=loss)
            best = min((replace(best, low=seen.low * s) for s in _SHRINK), key=loss)
        return best
