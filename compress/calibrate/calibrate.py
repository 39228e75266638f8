"""`compress calibrate`: what a recipe's passes want to know, collected by the engine that fits.

An engine is a function with the signature of `Collector`: it runs the model on the request's
inputs and hands sites and arrays to the writer. What it did not reach is found out here.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.calibrate.inputs import IDS, Inputs, split
from compress.calibrate.statistics import (
    DIAGONAL,
    HELD_OUT,
    INPUTS,
    KINDS,
    SECOND_MOMENT,
    Record,
)
from compress.checkpoint import Checkpoint
from compress.errors import UsageError, show
from compress.run import Progress, peak_memory, silent

if TYPE_CHECKING:
    from compress.calibrate.writer import StatisticsWriter
    from compress.plan import Plan

Kinds = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Request:
    """What an engine has to collect.

    wanted    kinds by tensor, of those that passes need or welcome; no INPUTS
    needed    the part of it that passes cannot do without
    held_out  numbers of the samples whose second moments are kept apart, at tensors that want
              HELD_OUT; at others they count like the rest
    module    FILE.py:FACTORY of the user's own torch module
    seed      of labels that are drawn for OUTPUT_FISHER
    fisher_tokens  to take for it at most (at least one sample)
    batch_tokens   a batch, or images
    """

    checkpoint: Checkpoint
    wanted: Kinds
    needed: Kinds
    inputs: Inputs
    held_out: frozenset[int] = frozenset()
    module: str | None = None
    seed: int = 0
    fisher_tokens: int = 4096
    batch_tokens: int = 2048

    def batches(self) -> list[tuple[bool, list[int], dict[str, Any]]]:
        """(kept apart, sample numbers, arrays) of every batch, in one fixed order."""
        learn = [n for n in range(self.inputs.samples) if n not in self.held_out]
        found = []
        for apart, numbers in ((False, learn), (True, sorted(self.held_out))):
            for chosen, arrays in self.inputs.batches(self.batch_tokens, numbers):
                found.append((apart, chosen, arrays))
        return found

    def fisher_batches(self) -> list[dict[str, Any]]:
        """Arrays of the first samples, up to `fisher_tokens`, one sample a batch."""
        taken = 0
        numbers: list[int] = []
        for number, length in enumerate(self.inputs.lengths.tolist()):
            if numbers and taken + length > self.fisher_tokens:
                break
            numbers.append(number)
            taken += length
        return [arrays for _, arrays in self.inputs.batches(1, numbers)]

    def of_kind(self, kind: str) -> list[str]:
        """The tensors for which a kind is wanted."""
        return [name for name, kinds in self.wanted.items() if kind in kinds]

    def check_reached(self, reachable: Mapping[str, object] | set[str]) -> None:
        """Refuse (UsageError) tensors whose inputs are needed and that the engine cannot see."""
        missing = [name for name in self.needed if name not in reachable]
        if missing:
            raise UsageError(
                f"tensor {show(missing[0])}: calibration does not reach its inputs"
                + (f" (nor those of {len(missing) - 1} more)" if len(missing) > 1 else ""),
                hint="leave it out with ignore",
            )


# (request, writer, progress) -> warnings
Collector = Callable[[Request, "StatisticsWriter", Progress], list[str]]


@dataclass(frozen=True)
class Settings:
    """How to calibrate."""

    overwrite: bool = False
    resume: bool = False
    fsync: bool = True
    seed: int = 0
    module: str | None = None
    fisher_tokens: int = 4096
    batch_tokens: int = 2048


@dataclass(frozen=True)
class Calibrated:
    """What `calibrate` made."""

    path: Path
    record: Record
    nbytes: int
    seconds: float
    tensors: int  # of which something was collected
    warnings: tuple[str, ...] = field(default=())

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "path": str(self.path),
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": peak_memory(),
            "engine": self.record.engine,
            "kinds": sorted(self.record.kinds),
            "sites": len(self.record.sites),
            "tensors": self.tensors,
            "data": dict(self.record.data),
            "warnings": list(self.warnings),
        }


def wanted_by(plan: Plan) -> tuple[Kinds, Kinds]:
    """Kinds by tensor that the plan's passes want, and those that they need among them.

    Raises UsageError where they want nothing.
    """
    wanted: dict[str, frozenset[str]] = {}
    needed: dict[str, frozenset[str]] = {}
    for one, members in zip(plan.passes, plan.members, strict=True):
        for info in members:
            wanted[info.name] = wanted.get(info.name, frozenset()) | one.needs | one.welcomes
            needed[info.name] = needed.get(info.name, frozenset()) | one.needs
    wanted = {name: kinds & KINDS for name, kinds in wanted.items() if kinds}
    if not wanted:
        raise UsageError(
            "no pass of the recipe makes use of statistics",
            hint="run it without a calibration; or see the options of its passes",
        )
    return wanted, {name: kinds for name, kinds in needed.items() if kinds}


def calibrate(
    plan: Plan, inputs: Inputs, out: Path, settings: Settings, progress: Progress = silent
) -> Calibrated:
    """Collect what the plan's passes want of the model's inputs, into the file `out`.

    plan  of the recipe, made with `calibrated=True`
    Raises UsageError (OUT exists, nothing to collect, another calibration to resume, a tensor that
    calibration does not reach), InputError, ResourceError, BusyError. OUT is then as it was.
    """
    from compress.calibrate.writer import StatisticsWriter, header_room

    started = time.perf_counter()
    request, notes = _request(plan, inputs, settings)
    engine, collect = engine_of(plan.checkpoint, settings.module, inputs)
    data = {**inputs.record(), "calibration": _settings_of(request)}
    keeps_inputs = any(INPUTS in one.needs | one.welcomes for one in plan.passes)
    with StatisticsWriter(
        out,
        room=header_room(request.wanted, data),
        key=_key(request, engine, keeps_inputs),
        overwrite=settings.overwrite,
        resume=settings.resume,
        fsync=settings.fsync,
    ) as writer:
        warnings = [*notes, *(collect(request, writer, progress) if request.wanted else ())]
        reached = writer.reached()
        _check_needs(request, reached)
        if keeps_inputs:
            writer.add_inputs(inputs.arrays)
        kinds = frozenset(kind for found in reached.values() for kind in found)
        record = Record(
            fingerprint=plan.checkpoint.sample_hash(),
            engine=engine,
            sites=writer.sites(),
            kinds=kinds | ({INPUTS} if keeps_inputs else set()),
            data=data,
        )
        plan.checkpoint.check_unchanged()
        writer.finish(record)
    warnings += _rank_warnings(plan, record, reached)
    seconds = time.perf_counter() - started
    return Calibrated(out, record, out.stat().st_size, seconds, len(reached), tuple(warnings))


def engine_of(checkpoint: Checkpoint, module: str | None, inputs: Inputs) -> tuple[str, Collector]:
    """The engine's name and its function. Raises UsageError where none fits."""
    name = "module" if module is not None else "hf"
    if module is None and checkpoint.graph is not None:
        name = "onnx"
    if name == "hf" and IDS not in inputs.arrays:
        raise UsageError(
            f"{show(str(checkpoint.path))}: nothing here knows how images get into this model",
            hint="use --module FILE.py:FACTORY, or an ONNX export",
        )
    collect: Collector = getattr(import_module(f"compress.calibrate.{name}"), f"collect_{name}")
    return name, collect


def _request(plan: Plan, inputs: Inputs, settings: Settings) -> tuple[Request, list[str]]:
    wanted, needed = wanted_by(plan)
    notes: list[str] = []
    held = frozenset(split(inputs.samples)[1])
    if not held:
        short = [name for name, kinds in needed.items() if HELD_OUT in kinds]
        if short:
            raise UsageError(
                f"tensor {show(short[0])}: inputs have to be kept apart, and there is one sample",
                hint="give more text, or a smaller --length",
            )
        if any(HELD_OUT in kinds for kinds in wanted.values()):
            notes.append("one sample: no inputs are kept apart")
            wanted = {name: kinds - {HELD_OUT} for name, kinds in wanted.items()}
    request = Request(
        checkpoint=plan.checkpoint,
        wanted=_collected(wanted),
        needed=_collected(needed),
        inputs=inputs,
        held_out=held,
        module=settings.module,
        seed=settings.seed,
        fisher_tokens=settings.fisher_tokens,
        batch_tokens=settings.batch_tokens,
    )
    return request, notes


def _collected(kinds_by_tensor: Kinds) -> Kinds:
    """What an engine has to run the model for: all but the inputs themselves."""
    collected = {name: kinds - {INPUTS} for name, kinds in kinds_by_tensor.items()}
    return {name: kinds for name, kinds in collected.items() if kinds}


def _settings_of(request: Request) -> dict[str, Any]:
    return {
        "held_out_samples": len(request.held_out),
        "seed": request.seed,
        "fisher_tokens": request.fisher_tokens,
        "batch_tokens": request.batch_tokens,
    }


def _key(request: Request, engine: str, keeps_inputs: bool) -> str:
    """What must be equal for a resumed calibration to give the same bytes."""
    what = {
        "source": request.checkpoint.fingerprint(),
        "wanted": {name: sorted(kinds) for name, kinds in request.wanted.items()},
        "inputs": [request.inputs.record(), keeps_inputs],
        "settings": _settings_of(request),
        "engine": [engine, request.module],
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _check_needs(request: Request, reached: Mapping[str, set[str]]) -> None:
    for name, kinds in request.needed.items():
        found = reached.get(name, set())
        implied = {DIAGONAL} if SECOND_MOMENT in found else set()
        if missing := sorted(kinds - found - implied):
            raise UsageError(
                f"tensor {show(name)}: the inputs gave no {missing[0]} for it",
                hint="give more inputs, or leave it out with ignore",
            )


def _rank_warnings(plan: Plan, record: Record, reached: Mapping[str, set[str]]) -> list[str]:
    """A matrix of more columns than inputs is singular: say so once, for the widest."""
    columns = {info.name: info.matrix_shape[1] for info in plan.checkpoint.infos()}
    worst = max(
        (site for site in record.sites if SECOND_MOMENT in reached[site.tensors[0]]),
        key=lambda site: columns[site.tensors[0]] - site.count,
        default=None,
    )
    if worst is None or worst.count >= columns[worst.tensors[0]]:
        return []
    return [
        f"{worst.count:,} inputs for {columns[worst.tensors[0]]:,} columns of"
        f" {show(worst.tensors[0])}: fewer than its second moments need for full rank;"
        " give more of them (--samples, --length)"
    ]
