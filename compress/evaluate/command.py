"""`compress eval`: from options to figures; every refusal comes before any model runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from compress.calibrate.inputs import vocabulary_of
from compress.checkpoint import Checkpoint
from compress.checkpoint.destination import check_report_file
from compress.errors import UsageError, show
from compress.evaluate.data import Request, load_data
from compress.evaluate.evaluation import Evaluator, Progress, silent
from compress.evaluate.metrics import TEXT, require
from compress.evaluate.models import check_kind, engine_of, make_runner, open_model
from compress.evaluate.outputs import Runner
from compress.recipe import Gate, failed_gates


def evaluate_model(
    model: Path,
    request: Request,
    *,
    reference: Path | None = None,
    engine: str | None = None,
    module: str | None = None,
    gates: Sequence[Gate] = (),
    report: Path | None = None,
    allow_pickle: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Every figure of a model on data, and which gates failed: the document of `compress eval`.

    model, reference  an output of this tool, a plain checkpoint or an .onnx file
    report            where the document will be written; only checked here
    The reference is run on decoded weights, through onnxruntime, or as the module.
    Raises UsageError (options, gates, data), InputError (what a file holds).
    """
    started = time.perf_counter()
    request.validate()
    require(gates, request.kind, reference=reference is not None, report=False)
    own = engine_of(model, engine, module)
    others = [] if reference is None else [_reference_engine(reference, module)]
    check_kind(request.kind, [own, *others])
    for path in (model, reference):
        if report is not None and path is not None:
            check_report_file(report, path, path)
    with ExitStack() as stack:
        opened = open_model(model, stack, allow_pickle=allow_pickle)
        base = None
        if reference is not None:
            base = open_model(reference, stack, allow_pickle=allow_pickle)
            check_same_vocabulary(opened, base)
        data = load_data(request, _with_tokenizer(opened, base))
        compared = None if base is None else make_runner(base, others[0], module)
        runner = make_runner(opened, own, module)
        check_task(request.kind, [r for r in (runner, compared) if r is not None])
        evaluator = Evaluator(data, compared)
        metrics = evaluator.run(runner, progress)
        return {
            "evaluation_version": 1,
            "model": str(model),
            "reference": None if reference is None else str(reference),
            "metrics": metrics,
            **evaluator.record(runner),
            "gates": [str(gate) for gate in gates],
            "failed_gates": failed_gates(gates, metrics),
            "seconds": round(time.perf_counter() - started, 3),
        }


def check_task(kind: str, runners: Sequence[Runner]) -> None:
    """Refuse (InputError) a text for a model that predicts no tokens."""
    if kind == TEXT:
        for runner in runners:
            runner.require_decoder()


def check_same_vocabulary(a: Checkpoint, b: Checkpoint) -> None:
    """Refuse (UsageError) to compare the predictions of models with different vocabularies."""
    sizes = [vocabulary_of(one.config) for one in (a, b)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise UsageError(
            f"{show(str(a.path))} has a vocabulary of {sizes[0]:,} tokens, the reference"
            f" {show(str(b.path))} of {sizes[1]:,}",
            hint="compare a model with the one that it was made from",
        )


def _reference_engine(reference: Path, module: str | None) -> str:
    is_file = reference.suffix.lower() == ".onnx"
    return engine_of(reference, None, None if is_file else module)


def _with_tokenizer(model: Checkpoint, reference: Checkpoint | None) -> Checkpoint:
    """The model, or its reference where only that has a config beside it (an .onnx file alone)."""
    return model if model.config is not None or reference is None else reference
