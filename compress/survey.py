"""The sweeps before the write: every surveying pass reads its targets, then decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compress.parallel import map_tiles
from compress.passes.base import Pass
from compress.plan import Plan
from compress.tiles import TensorPlan, Tile, read_tile, surveyed

Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


def decide_all(plan: Plan, progress: Progress) -> Plan:
    """Run every survey in order and return the plan with decided passes and exact terms."""
    for index in range(len(plan.passes)):
        while plan.passes[index].wants_survey:
            plan = plan.decided(index, _sweep(plan, index, progress))
    for tensor in plan.tensors:
        if not tensor.terms.exact:
            passes = ", ".join(tensor.terms.passes)
            raise RuntimeError(f"{tensor.info.name}: {passes} left its size open after the surveys")
    return plan


def _sweep(plan: Plan, index: int, progress: Progress) -> Pass:
    """One sweep of one pass over its targets."""
    one = plan.passes[index]
    infos = list(plan.members[index])
    by_name = {t.info.name: t for t in plan.tensors}
    chosen = [by_name[i.name] for i in infos if one.surveys(i)]

    def work(tile: Tile) -> Any:
        buffer = plan.buffers.take()
        tensor = read_tile(plan.checkpoint, tile, buffer)
        for earlier in _before(plan, tile.tensor, index):
            tensor = earlier.apply(tensor)
        statistic = _bound(plan, tile.tensor, index).survey(tensor)
        plan.buffers.give(buffer)  # a statistic is made of sums, never of the weights themselves
        return statistic

    total = sum(t.info.nbytes for t in chosen)
    done = 0
    merged: Any = None
    tiles = [tile for t in chosen for tile in surveyed(t, one, plan.tile_bytes)]
    for tile, statistic in map_tiles(
        work, tiles, workers=plan.options.workers, memory=plan.options.memory
    ):
        merged = statistic if merged is None else one.merge(merged, statistic)
        done += min(tile.tensor.info.nbytes, tile.cost // 2)
        progress(f"{one.name}: survey", min(done, total), total)
    return one.foresee(plan.outlook(index, progress)).decide(merged, infos)


def _before(plan: Plan, tensor: TensorPlan, index: int) -> list[Pass]:
    bound = plan.bound(tensor)
    return [p for step, p in zip(tensor.steps, bound, strict=True) if step < index]


def _bound(plan: Plan, tensor: TensorPlan, index: int) -> Pass:
    return plan.bound(tensor)[tensor.steps.index(index)]
