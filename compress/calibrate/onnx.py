"""Calibration of an .onnx file: onnxruntime runs it with the inputs of its weights as outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from compress.calibrate.calibrate import Request
from compress.calibrate.collect import SiteSums, unfolded
from compress.calibrate.inputs import IDS, IMAGES
from compress.calibrate.statistics import SITE_KINDS
from compress.calibrate.writer import StatisticsWriter
from compress.checkpoint.onnx_uses import Use
from compress.engines.onnx_graph import OnnxGraph, onnx_graph
from compress.errors import InputError, UsageError, show
from compress.evaluate.onnx_outputs import Onnx
from compress.run import Progress

_SITES = "sites"
_IMAGES = 32  # a batch: all layers' inputs are in memory together
_Key = tuple[Use, ...]


def collect_onnx(request: Request, writer: StatisticsWriter, progress: Progress) -> list[str]:
    """Collect what is wanted of the weights of an .onnx file, by initializer. Returns warnings.

    Raises UsageError for statistics that only an engine with gradients can collect and for weights
    that no MatMul, Gemm or Conv reads; InputError where onnxruntime cannot run the file.
    """
    graph = onnx_graph(request.checkpoint)
    for name, kinds in request.needed.items():
        if other := sorted(kinds - SITE_KINDS):
            raise UsageError(
                f"tensor {show(name)}: {other[0]} cannot be collected from an .onnx file",
                hint="calibrate the checkpoint that it was exported from",
            )
    wanted = {n: k & SITE_KINDS for n, k in request.wanted.items() if k & SITE_KINDS}
    uses = {name: graph.uses[name] for name in wanted if name in graph.uses}
    request.check_reached(uses)
    if uses and _SITES not in writer.steps:
        _sites(graph, uses, request, writer, progress)
        writer.commit(_SITES)
    missing = [name for name in wanted if name not in uses]
    if not missing:
        return []
    return [f"{len(missing)} tensors are no weights that calibration sees, e.g. {missing[0]}"]


def _sites(
    graph: OnnxGraph, uses: dict[str, _Key], request: Request, writer: StatisticsWriter,
    progress: Progress,
) -> None:  # fmt: skip
    """Weights with the same inputs are one site; one that is used often has all of them."""
    infos = {info.name: info for info in request.checkpoint.infos()}
    members: dict[tuple[_Key, int], list[str]] = {}
    for name, key in uses.items():
        members.setdefault((key, infos[name].matrix_shape[1]), []).append(name)
    sums = {}
    for (key, columns), names in members.items():
        kinds = frozenset[str]().union(*(request.wanted[n] & SITE_KINDS for n in names))
        geometry = key[0].geometry
        sums[key, columns] = SiteSums(kinds, columns, 1 if geometry is None else geometry.groups)
    values = sorted({use.value for key in uses.values() for use in key})
    runner = Onnx(graph.path, graph.exposed([v for v in values if v not in graph.inputs]))
    request = _in_batches_that_fit(request, runner)
    batches = request.batches()
    for number, (held_out, _, arrays) in enumerate(batches):
        progress("calibrating", number, len(batches))
        name = IMAGES if IMAGES in arrays else IDS
        found = _values(runner, {name: arrays[name]}, values)
        for (key, _), one in sums.items():
            for use in key:
                one.add(_rows(use, found[use.value]), held_out=held_out)
    progress("calibrating", len(batches), len(batches))
    for site, one in sums.items():
        writer.add_site(members[site], one)


def _values(runner: Onnx, inputs: dict[str, Any], names: list[str]) -> dict[str, torch.Tensor]:
    """Values of one batch by name."""
    feed = runner.feed(inputs)
    made = [name for name in names if name not in feed]
    found = dict(zip(made, runner.outputs_of(feed, made), strict=True)) if made else {}
    arrays = found | {name: feed[name] for name in names if name in feed}
    return {name: torch.from_numpy(np.asarray(a, np.float32)) for name, a in arrays.items()}


def _rows(use: Use, values: torch.Tensor) -> torch.Tensor:
    """What a weight's rows are multiplied with, float32 [blocks, n, columns]."""
    if use.geometry is None:
        rows = values.T if use.transposed else values
        return rows.reshape(1, -1, rows.shape[-1])
    geometry = use.geometry
    padding = geometry.padding(tuple(values.shape[2:]))
    flat = [n for pair in reversed(padding) for n in pair]  # torch begins with the last axis
    values = torch.nn.functional.pad(values, flat)
    return unfolded(values, geometry.kernel, geometry.strides, geometry.dilations, geometry.groups)


def _in_batches_that_fit(request: Request, runner: Onnx) -> Request:
    """Batches of one sample where the graph takes no other number. Raises InputError."""
    fixed = {
        spec.shape[0]
        for spec in runner.inputs.values()
        if spec.shape and type(spec.shape[0]) is int
    }
    if not fixed:
        step = _IMAGES if IMAGES in request.inputs.arrays else request.batch_tokens
        return replace(request, batch_tokens=min(step, request.batch_tokens))
    if fixed != {1}:
        raise InputError(
            f"{show(str(request.checkpoint.path))}: its inputs are fixed to {max(fixed)} samples at"
            " a time",
            hint="export it with a batch axis of any size, or of 1",
        )
    return replace(request, batch_tokens=1)
