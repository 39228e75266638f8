"""The table of passes. A new pass is one module, one line here (or an entry point) and a test."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from compress.passes.base import Pass

# name -> module:class; imported when asked for, so that `--help` stays quick.
_BUILT_IN = {
    "super-weights": "compress.passes.super_weights:SuperWeights",
    "prune": "compress.passes.prune:Prune",
    "quantize": "compress.passes.quantize:Quantize",
    "low-rank": "compress.passes.low_rank:LowRank",
    "recalibrate": "compress.passes.recalibrate:Recalibrate",
}


@cache
def pass_classes() -> dict[str, type[Pass]]:
    """Every known pass by name: the built-in ones, then entry points of `compress.passes`."""
    found: dict[str, type[Pass]] = {}
    for name, path in _BUILT_IN.items():
        module, _, attribute = path.partition(":")
        found[name] = getattr(import_module(module), attribute)
    for point in entry_points(group="compress.passes"):
        found.setdefault(point.name, point.load())
    return found
