"""The sweeps before the write: every surveying pass reads its targets, then decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from compress.checkpoint import Checkpoint
from compress.parallel import map_tiles
from compress.passes.base import Pass
from compress.plan import Plan
from compress.tiles import TensorPlan, Tile, cut, read_tile, survey_tiles

Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


def decide_all(plan: Plan, progress: Progress) -> Plan:
    """Run every survey in order and return the plan with decided passes and exact terms."""
    for index in range(len(plan.passes)):
        while plan.passes[index].wants_survey:
            plan = plan.decided(index, _sweep(plan, index, progress))
    return _count_open(plan, progress)


def _sweep(plan: Plan, index: int, progress: Progress) -> Pass:
    """One sweep of one pass over its targets."""
    one = plan.passes[index]
    infos = list(plan.members[index])
    by_name = {t.info.name: t for t in plan.tensors}
    chosen = [by_name[i.name] for i in infos if one.surveys(i)]

    def work(tile: Tile) -> Any:
        tensor = read_tile(plan.checkpoint, tile)
        for earlier in _before(plan, tile.tensor, index):
            tensor = earlier.apply(tensor)
        return one.survey(tensor)

    total = sum(t.info.nbytes for t in chosen)
    done = 0
    merged: Any = None
    tiles = [tile for t in chosen for tile in survey_tiles(t, plan.tile_bytes)]
    for tile, statistic in map_tiles(
        work, tiles, workers=plan.options.workers, memory=plan.options.memory
    ):
        merged = statistic if merged is None else one.merge(merged, statistic)
        done += tile.cost // 2
        progress(f"{one.name}: survey", min(done, total), total)
    return one.decide(merged, infos)


def _before(plan: Plan, tensor: TensorPlan, index: int) -> list[Pass]:
    bound = plan.bound(tensor)
    return [p for step, p in zip(tensor.steps, bound, strict=True) if step < index]


def _count_open(plan: Plan, progress: Progress) -> Plan:
    """Count kept weights where a mask's size follows from the values alone (N:M over zeros)."""
    if plan.exact:
        return plan
    still_open = [t for t in plan.tensors if not t.terms.exact]
    checkpoint: Checkpoint = plan.checkpoint
    kept: dict[str, int] = {}

    def work(tile: Tile) -> int:
        tensor = read_tile(checkpoint, tile)
        for one in plan.bound(tile.tensor):
            if one.writes in ("outliers", "mask"):
                tensor = one.apply(tensor)
        return tensor.source.size if tensor.mask is None else int(np.count_nonzero(tensor.mask))

    tiles = [tile for t in still_open for tile in cut(t, plan.passes, plan.tile_bytes)]
    for tile, count in map_tiles(
        work, tiles, workers=plan.options.workers, memory=plan.options.memory
    ):
        name = tile.tensor.info.name
        kept[name] = kept.get(name, 0) + count
        progress("counting", len(kept), len(still_open))
    return replace(
        plan,
        tensors=tuple(
            replace(t, terms=replace(t.terms, nonzeros=(kept[t.info.name],) * 2))
            if t.info.name in kept
            else t
            for t in plan.tensors
        ),
    )
