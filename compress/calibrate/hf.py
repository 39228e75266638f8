"""Calibration of a transformers model, one block's weights in memory at a time.

For each block: every batch runs through it while its linear layers are watched, what was summed
goes to the writer, and the hidden states become the next block's. They are also kept beside the
file, so that an interrupted calibration goes on with the block that it was at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.calibrate.calibrate import Request
from compress.calibrate.fisher import output_fisher
from compress.calibrate.sites import SiteCollector
from compress.calibrate.statistics import OUTPUT_FISHER, SITE_KINDS
from compress.calibrate.writer import StatisticsWriter
from compress.engines.blocks import Batch, BlockModel
from compress.run import Progress

_OUTSIDE, _FISHER = "outside", "fisher"


def collect_hf(request: Request, writer: StatisticsWriter, progress: Progress) -> list[str]:
    """Collect what is wanted of a checkpoint of transformers' models. Returns warnings.

    Raises UsageError where the model has no single stack of blocks or a tensor that needs
    statistics is no layer of it, InputError where checkpoint and config do not fit.
    """
    sweep = _Sweep(request, writer, progress)
    sweep.run()
    return sweep.unreached()


class _Sweep:
    """One calibration."""

    def __init__(self, request: Request, writer: StatisticsWriter, progress: Progress) -> None:
        self.request, self.writer, self.progress = request, writer, progress
        self.model = BlockModel(request.checkpoint)
        self.inside = [self._wanted(self.model.linears(i)) for i in range(self.model.depth)]
        self.outside = self._wanted(self.model.outside_linears())
        self.reachable = {name for part in (*self.inside, self.outside) for name in part}
        request.check_reached(self.reachable)
        # Blocks behind the last one that is watched need not run.
        watched = [
            index
            for index, modules in enumerate(self.inside)
            if any(request.wanted[name] & SITE_KINDS for name in modules)
        ]
        self._around_too = any(request.wanted[name] & SITE_KINDS for name in self.outside)
        self._depth = self.model.depth if self._around_too else max(watched, default=-1) + 1
        self._total = self._depth + self._around_too + bool(request.of_kind(OUTPUT_FISHER))

    def run(self) -> None:
        """All steps that were not committed before."""
        done = set(self.writer.steps)
        blocks = sum(_block(index) in done for index in range(self._depth))
        if self._depth and not {_FISHER, _OUTSIDE} & done:
            self._sites(blocks)
        fisher = [name for name in self.request.of_kind(OUTPUT_FISHER) if name in self.reachable]
        if fisher and _FISHER not in done:
            self.progress("calibrating", self._total - 1, self._total)
            found = output_fisher(self.model, self.request, fisher, self.writer.folder)
            for name, values in found.items():
                self.writer.add_tensor(name, OUTPUT_FISHER, values)
            self.writer.commit(_FISHER)
        self.progress("calibrating", self._total, self._total)

    def unreached(self) -> list[str]:
        """A warning where some wanted tensors are no layers of the model."""
        missing = [name for name in self.request.wanted if name not in self.reachable]
        if not missing:
            return []
        return [f"{len(missing)} tensors are no layers that calibration sees, e.g. {missing[0]}"]

    def _wanted(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {name: m for name, m in modules.items() if self.request.wanted.get(name)}

    def _sites(self, done: int) -> None:
        """Blocks from number `done`, then what lies around them."""
        given = self.request.batches()
        batches = [
            self.model.start({name: torch.from_numpy(a) for name, a in arrays.items()})
            for _, _, arrays in given
        ]
        if done:
            _load(batches, self.writer.folder / _hidden(done))
        for index in range(done, self._depth):
            self.progress("calibrating", index, self._total)
            self._one_block(index, batches, given)
            name = _hidden(index + 1)
            _save(batches, self.writer.folder / name)
            self.writer.commit(_block(index), [name])
        if self._around_too:
            self.progress("calibrating", self._depth, self._total)
            self._around(batches, given)
        self.writer.commit(_OUTSIDE)

    @torch.no_grad()
    def _one_block(self, index: int, batches: Sequence[Batch], given: Sequence[Any]) -> None:
        collector = SiteCollector(self.inside[index], self.request.wanted)
        with self.model.loaded(index), collector.attached():
            for batch, (held_out, _, _) in zip(batches, given, strict=True):
                with collector.batch(held_out=held_out):
                    self.model.advance(index, batch)
        collector.write(self.writer)

    @torch.no_grad()
    def _around(self, batches: Sequence[Batch], given: Sequence[Any]) -> None:
        """Layers that belong to no block: a pooler, a head, what embeddings go through."""
        collector = SiteCollector(self.outside, self.request.wanted)
        with collector.attached():
            for batch, (held_out, _, _) in zip(batches, given, strict=True):
                with collector.batch(held_out=held_out):
                    self.model.finish(batch)
        collector.write(self.writer)


def _block(index: int) -> str:
    return f"block {index}"


def _hidden(index: int) -> str:
    """The file of the hidden states that block `index` reads."""
    return f"hidden.{index}"


def _save(batches: Sequence[Batch], path: Path) -> None:
    with open(path, "wb") as file:
        for batch in batches:
            file.write(np.ascontiguousarray(batch.hidden.numpy()).data)


def _load(batches: Sequence[Batch], path: Path) -> None:
    """The states that `_save` wrote; the writer has checked that they are the same bytes."""
    with open(path, "rb") as file:
        for batch in batches:
            values = np.empty(tuple(batch.hidden.shape), np.float32)
            file.readinto(values.reshape(-1).view(np.uint8).data)
            batch.hidden = torch.from_numpy(values)
