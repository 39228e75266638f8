"""How much memory a run takes at most, from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress import layout, tiles
from compress.checkpoint.writer import nbytes_of

if TYPE_CHECKING:
    from compress.plan import Plan

# Python with the libraries a data-free run imports, and what its allocator keeps (measured).
_BASE_MEMORY = 104 << 20
# The child that reads PyTorch files: torch itself, beside twice the file.
_TORCH_MEMORY = 280 << 20
# torch, imported for linear algebra with statistics, and the statistics of the last sites (below).
_SOLVER_MEMORY = 220 << 20


def peak_memory(plan: Plan) -> int:
    """Bytes of resident memory that the run stays under."""
    workers = plan.options.workers
    costs, results, waiting = [], [], [0]
    for tensor in plan.tensors:
        specs = layout.specs_of(tensor, plan.format)
        sizes = sorted(nbytes_of(s.dtype, s.shape) for s in specs)
        waiting.append(sum(sizes[:-1]))  # all arrays but the largest wait for its end
        cut = tiles.cut(tensor, plan.passes, plan.tile_bytes)
        costs += [tile.cost for tile in cut]
        results += [sum(sizes) // len(cut)] * len(cut)
    # At any moment at most `workers` tiles are worked on and two more wait to be written.
    in_flight = 0
    for i in range(len(costs)):
        window = sorted(costs[i : i + workers + 2])[-workers:]
        done = sorted(results[i : i + workers + 2])[-2:]
        in_flight = max(in_flight, min(sum(window), max(plan.options.memory, costs[i])) + sum(done))
    torch_child = 0
    if any(t.info.offset < 0 for t in plan.tensors):
        torch_child = _TORCH_MEMORY + 2 * sum(t.info.nbytes for t in plan.tensors)
    solvers = _SOLVER_MEMORY if any(one.needs for one in plan.passes) else 0
    in_flight = max(in_flight + max(waiting), _survey_memory(plan))
    return max(_BASE_MEMORY + solvers + in_flight, torch_child)


def _survey_memory(plan: Plan) -> int:
    """Bytes of tiles that surveys look at, at most."""
    by_name = {t.info.name: t for t in plan.tensors}
    costs = [
        tile.cost
        for one, infos in zip(plan.passes, plan.members, strict=True)
        if one.wants_survey
        for info in infos
        if one.survey_workspace(info)
        for tile in tiles.surveyed(by_name[info.name], one, plan.tile_bytes)
    ]
    costs.sort(reverse=True)
    largest = costs[0] if costs else 0
    return min(sum(costs[: plan.options.workers]), max(plan.options.memory, largest))
