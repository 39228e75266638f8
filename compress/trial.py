"""A checkpoint as a plan would make it, decoded on the way: nothing is written."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from compress.checkpoint import Checkpoint
from compress.formats.arrays import plain
from compress.tensor import Array, Role, TensorInfo
from compress.tiles import TensorPlan, Tile, read_tile

if TYPE_CHECKING:
    from compress.plan import Plan


class TrialCheckpoint(Checkpoint):
    """The source with the plan's passes applied as tensors are read; they must have decided.

    `last` is the index of the last pass that takes part; `dense` tensors stay as they are. Values
    come in the source's dtype.
    Closing it leaves the source open.
    """

    def __init__(
        self, plan: Plan, *, last: int | None = None, dense: frozenset[str] = frozenset()
    ) -> None:
        source = plan.checkpoint
        super().__init__(source.path, source.directory, {})
        self.config, self.config_bytes = source.config, source.config_bytes
        self.aliases, self.sidecars = dict(source.aliases), list(source.sidecars)
        self._source, self._plan, self._dense = source, plan, dense
        self._last = len(plan.passes) if last is None else last
        self._infos = source.infos()
        self._tensors = {t.info.name: t for t in plan.tensors}
        self._last_read: tuple[str, Array] | None = None

    def info(self, name: str) -> TensorInfo:
        """The tensor called `name`."""
        return self._source.info(name)

    def read(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Array:
        """Rows of the first axis as they would decode from the output."""
        tensor = self._tensors[info.name]
        if not self._steps(tensor):
            return self._source.read(info, start, stop)
        last = self._last_read
        if last is None or last[0] != info.name:  # a table is read row by row
            last = self._last_read = info.name, self._decoded(tensor)
        return np.array(last[1][start:stop])

    def _steps(self, tensor: TensorPlan) -> list[int]:
        if tensor.info.name in self._dense:
            return []
        return [step for step in tensor.steps if step <= self._last]

    def _decoded(self, tensor: TensorPlan) -> Array:
        info = tensor.info
        rows = info.matrix_shape[0]
        if info.role is not Role.CONV1D and len(info.shape) < 2:
            rows = 1
        made = read_tile(self._source, Tile(tensor, 0, rows, False, 0))
        for step, one in zip(tensor.steps, self._plan.bound(tensor), strict=True):
            if step <= self._last:
                made = one.apply(made)
        return np.ascontiguousarray(info.from_matrix(plain(made))).reshape(info.shape)


class RememberedTrial(Checkpoint):
    """A trial whose tensors are decoded once for each way they may come out.

    forms   name -> the form of a tensor in this trial (hashable); others are read from the source
    memory  (name, form) -> values, shared by trials; it is filled up to `limit` bytes
    """

    def __init__(
        self,
        trial: Checkpoint,
        forms: Mapping[str, Hashable],
        memory: dict[tuple[str, Hashable], Array],
        limit: int,
    ) -> None:
        super().__init__(trial.path, trial.directory, {})
        self.config, self.config_bytes = trial.config, trial.config_bytes
        self.aliases, self.sidecars = dict(trial.aliases), list(trial.sidecars)
        self._trial, self._forms, self._memory, self._limit = trial, forms, memory, limit
        self._infos = trial.infos()

    def info(self, name: str) -> TensorInfo:
        """The tensor called `name`."""
        return self._trial.info(name)

    def read(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> Array:
        """Rows of the first axis as they would decode from the output."""
        if info.name not in self._forms:
            return self._trial.read(info, start, stop)
        key = info.name, self._forms[info.name]
        if key not in self._memory:
            values = self._trial.read(info)
            if sum(v.nbytes for v in self._memory.values()) + values.nbytes > self._limit:
                return values[start:stop]
            self._memory[key] = values
        return self._memory[key][start:stop]
