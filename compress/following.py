"""Statistics of inputs as the compressed layers before give them, and of what dense ones gave.

A layer of a compressed model reads other inputs X_q than the dense layer's X_d. What it should
compute is still W X_d, so its best weights are W X_d X_q^T (X_q X_q^T)^-1, and those are what
`quantize follow=true` approximates (asymmetric calibration: GPTAQ, arXiv:2504.02692). Sites are
worked through in the order of the network; the passes are applied to each as soon as its moments
are known, and the model goes on with what they made.

Everything follows in one order from the source, the plan's decided passes and the inputs, so the
passes make the same of a tensor again when it is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.calibrate.collect import SiteSums, module_inputs
from compress.calibrate.inputs import batches_of
from compress.calibrate.statistics import (
    CROSS_MOMENT,
    SECOND_MOMENT,
    Record,
    Site,
    TensorStatistics,
    open_statistics,
)
from compress.calibrate.writer import StatisticsWriter, header_room
from compress.engines.blocks import Batch, BlockModel
from compress.errors import UsageError
from compress.passes.base import Context, Pass
from compress.plan import Plan
from compress.run import Progress
from compress.tensor import Array
from compress.tiles import TensorPlan, Tile, read_tile
from compress.trial import TrialCheckpoint

_BATCH_TOKENS = 2048


def followers(plan: Plan) -> list[TensorPlan]:
    """The tensors with a pass that wants to follow the compressed layers before."""
    chosen = {
        info.name
        for one, infos in zip(plan.passes, plan.members, strict=True)
        for info in infos
        if one.follows(info)
    }
    return [tensor for tensor in plan.tensors if tensor.info.name in chosen]


def follow(plan: Plan, file: Path, progress: Progress) -> Plan:
    """The plan with statistics, written to `file`, of the inputs that its tensors will meet.

    Its passes must have decided. Raises UsageError where there are no inputs to run the model on,
    or the model is no single stack of blocks.
    """
    if plan.statistics is None or not plan.statistics.inputs():
        raise UsageError(
            "quantize: follow=true has to run the model, and the statistics hold no inputs",
            hint="give --text F, or calibrate again with --for and this recipe",
        )
    names = [tensor.info.name for tensor in followers(plan)]
    with StatisticsWriter(file, room=header_room(names, {}), overwrite=True, fsync=False) as writer:
        _Walk(plan, writer, progress).run()
        writer.finish(
            Record(
                fingerprint=plan.statistics.record.fingerprint,
                engine="hf",
                sites=writer.sites(),
                kinds=frozenset({SECOND_MOMENT, CROSS_MOMENT}),
            )
        )
    opened = open_statistics(file)
    opened.beneath = plan.statistics
    return replace(plan, following=opened)


class _Stop(Exception):
    """Ends a block's forward pass at the site that is looked at."""


@dataclass
class _Site:
    """Weights of a block that read one input, in the block's order."""

    names: list[str]
    modules: list[nn.Module]


class _InMemory:
    """The moments of the site at hand, as a statistics file would give them."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays = arrays
        self.path = Path("calibration")

    def has_array(self, name: str) -> bool:
        return name in self.arrays

    def array(self, name: str) -> Array:
        return self.arrays[name]

    def damaged(self, what: str) -> UsageError:
        return UsageError(what)


class _Walk:
    """The dense and the compressed model side by side, block by block and site by site."""

    def __init__(self, plan: Plan, writer: StatisticsWriter, progress: Progress) -> None:
        self.plan, self.writer, self.progress = plan, writer, progress
        self.wanted = {t.info.name: t for t in followers(plan)}
        self.dense = BlockModel(plan.checkpoint)
        self.other = BlockModel(TrialCheckpoint(plan, dense=frozenset(self.wanted)))

    @torch.no_grad()
    def run(self) -> None:
        """Every block in turn."""
        statistics = self.plan.statistics
        arrays = {} if statistics is None else statistics.inputs()
        given = [
            {name: torch.from_numpy(values) for name, values in batch.items()}
            for _, batch in batches_of(arrays, _BATCH_TOKENS)
        ]
        pairs = [(self.dense.start(inputs), self.other.start(inputs)) for inputs in given]
        for index in range(self.dense.depth):
            self.progress("following", index, self.dense.depth)
            with self.dense.loaded(index), self.other.loaded(index):
                for site in self._sites(index, pairs[0][1]):
                    self._settle(index, site, pairs)
                for dense, other in pairs:
                    self.dense.advance(index, dense)
                    self.other.advance(index, other)
            self.writer.commit(f"block {index}")
        self.progress("following", self.dense.depth, self.dense.depth)

    def _sites(self, index: int, batch: Batch) -> list[_Site]:
        """The block's sites in the order in which they are reached."""
        seen: list[tuple[torch.Tensor, _Site]] = []

        def note(name: str) -> Any:
            def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
                for inputs, site in seen:
                    if inputs is arguments[0]:
                        site.names.append(name)
                        site.modules.append(module)
                        return
                seen.append((arguments[0], _Site([name], [module])))

            return hook

        modules = self.other.linears(index)
        handles = [
            module.register_forward_pre_hook(note(name))
            for name, module in modules.items()
            if name in self.wanted and _is_linear(module)
        ]
        self.other.call_block(index, batch, batch.hidden)
        for handle in handles:
            handle.remove()
        return [site for _, site in seen]

    def _settle(self, index: int, site: _Site, pairs: list[tuple[Batch, Batch]]) -> None:
        """Measure a site's inputs, and give its modules the weights that the passes make."""
        first = self.dense.linears(index)[site.names[0]]
        columns = self.plan.checkpoint.info(site.names[0]).matrix_shape[1]
        sums = SiteSums(frozenset({SECOND_MOMENT}), columns)
        cross = np.zeros((columns, columns), np.float64)
        for dense, other in pairs:
            x_dense = self._input(self.dense, index, dense, first)
            x_other = self._input(self.other, index, other, site.modules[0])
            sums.add(x_other)
            cross += (x_dense[0].T @ x_other[0]).numpy()
        moment = np.concatenate(list(sums.pieces(SECOND_MOMENT))).reshape(1, columns, columns)
        crossed = (cross / sums.count).astype(np.float32)[None]
        self.writer.add_site(site.names, sums)
        self.writer.add_site_array(CROSS_MOMENT, crossed)
        record = Site(0, tuple(site.names), sums.count)
        memory = _InMemory({record.key(SECOND_MOMENT): moment, record.key(CROSS_MOMENT): crossed})
        for name, module in zip(site.names, site.modules, strict=True):
            made = self._made(self.wanted[name], memory, record)
            module.weight = nn.Parameter(torch.from_numpy(made), requires_grad=False)

    def _input(
        self, model: BlockModel, index: int, batch: Batch, module: nn.Module
    ) -> torch.Tensor:
        """What a module of a block reads, float32 [1, n, columns]."""
        caught: list[torch.Tensor] = []

        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            caught.append(module_inputs(module, arguments[0]))
            raise _Stop

        with _hooked(module, hook), suppress(_Stop):
            model.call_block(index, batch, batch.hidden)
        return caught[0]

    def _made(self, tensor: TensorPlan, memory: _InMemory, site: Site) -> Array:
        """A tensor's decoded weights in float32, as the passes make them with these moments."""
        info = tensor.info
        rows = info.matrix_shape[0]
        made = read_tile(self.plan.checkpoint, Tile(tensor, 0, rows, False, 0))
        bound: list[Pass] = []
        for step in tensor.steps:
            known = TensorStatistics(memory, info, site, self.plan.statistics_of(info))
            context = Context(self.plan.format.base_stands_alone, known)
            bound.append(self.plan.passes[step].bind(info, bound, context))
        for one in bound:
            made = one.apply(made)
        return np.ascontiguousarray(info.from_matrix(made.decode()))


def _is_linear(module: nn.Module) -> bool:
    return not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
