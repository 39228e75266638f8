"""The commands that measure models, `eval` and `sweep`: parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.errors import GateError, UsageError
from compress.options import (
    EvalImages,
    EvalPairs,
    EvalSamples,
    EvalText,
    EvalWindow,
    FailIf,
    Json,
    Module,
    Pickle,
    ReportFile,
)
from compress.terminal import console, emit, leave_threads_to_torch, progress_bar, write_json


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(help="An output, a checkpoint or an .onnx file.", metavar="MODEL"),
    ],
    reference: Annotated[
        Path | None, typer.Option(help="The model to compare with.", metavar="REF")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text.", metavar="FILE")] = None,
    ids: Annotated[
        Path | None, typer.Option(help="Token ids (.npy, one row a sequence).", metavar="FILE")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="sentence1,sentence2,score (.csv).", metavar="FILE")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="images and labels (.npz).", metavar="FILE")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of a sequence, BOS included.", min=2)
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens to move on by; windows overlap.", min=1)
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Sequences, pairs or images at most.", min=1)
    ] = None,
    documents: Annotated[
        bool, typer.Option("--documents", help="A sequence a document: cut at blank lines.")
    ] = False,
    engine: Annotated[
        str | None, typer.Option(help="decoded, kernels, onnx or module.", metavar="NAME")
    ] = None,
    module: Module = None,
    fail_if: FailIf = None,
    report: ReportFile = None,
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Measure a model on data, alone or beside a reference; gates."""
    from compress.recipe import Gate

    gates = [Gate.parse(text) for text in fail_if or []]
    given = {"text": text, "ids": ids, "pairs": pairs, "images": images}
    chosen = [(name, path) for name, path in given.items() if path is not None]
    if len(chosen) != 1:
        raise UsageError(
            " and ".join(f"--{name}" for name, _ in chosen) + ": one kind of data at a time"
            if chosen
            else "no data to evaluate on",
            hint="give one of --text, --ids, --pairs and --images",
        )
    leave_threads_to_torch()
    from compress.evaluate.command import evaluate_model
    from compress.evaluate.data import Request
    from compress.evaluate.show import print_evaluation

    name, path = chosen[0]
    kind = "text" if name == "ids" else name
    request = Request(kind, path, name == "ids", window, stride, samples, documents)
    with progress_bar() as progress:
        body = evaluate_model(
            model,
            request,
            reference=reference,
            engine=engine,
            module=module,
            gates=gates,
            report=report,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if report is not None:
        write_json(body, report)
    emit(body, json, lambda: print_evaluation(body, console()))
    if body["failed_gates"]:
        raise GateError("; ".join(body["failed_gates"]))


def sweep(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")],
    model: Annotated[
        Path | None, typer.Argument(help="The checkpoint; else the recipe's.", metavar="MODEL")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for results, picture, best.yaml.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help='e.g. "quantize.bits=2,3,4"; off leaves a pass out.', metavar="AXIS"),
    ] = None,
    eval_text: EvalText = None,
    eval_pairs: EvalPairs = None,
    eval_images: EvalImages = None,
    eval_window: EvalWindow = None,
    eval_samples: EvalSamples = None,
    text: Annotated[
        Path | None, typer.Option(help="Calibrate once on this text.", metavar="FILE")
    ] = None,
    sentences: Annotated[
        Path | None, typer.Option(help="Calibrate once on sentences.", metavar="FILE")
    ] = None,
    ids: Annotated[
        Path | None, typer.Option(help="Calibrate once on token ids (.npy).", metavar="FILE")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Calibrate once on images (.npz).", metavar="FILE")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a calibration sample.", min=2)
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples at most.", min=1)] = None,
    metric: Annotated[
        str | None, typer.Option(help="What points are compared by, e.g. kl.", metavar="NAME")
    ] = None,
    module: Module = None,
    fail_if: FailIf = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random numbers.", min=0)] = None,
    format: Annotated[
        str | None, typer.Option(help="The format of every point.", metavar="NAME")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted sweep.")
    ] = False,
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Run a recipe with many settings: size against quality, and the winner's recipe."""
    if out is None:
        raise UsageError("no output directory given", hint="add -o DIR")
    import numpy  # noqa: F401 (its BLAS keeps the one thread that it was started with)

    leave_threads_to_torch()
    from compress.evaluate.data import request_of
    from compress.sweep.command import Calibration, sweep_model
    from compress.sweep.show import print_sweep

    evaluate_on = request_of(
        eval_text, eval_pairs, eval_images, window=eval_window, samples=eval_samples
    )
    with progress_bar() as progress:
        body = sweep_model(
            recipe,
            model,
            grid or [],
            out,
            evaluate_on,
            Calibration(text, sentences, ids, images, length, samples),
            metric=metric,
            module=module,
            fail_if=fail_if or [],
            seed=seed,
            format=format,
            resume=resume,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    emit(body, json, lambda: print_sweep(body, str(out), console()))
    if body["best"] is None:
        raise GateError("no point passes the gates", hint="the figures are in results.json")
