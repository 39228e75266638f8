"""The commands that measure models: `compress eval`. Parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.errors import GateError, UsageError
from compress.options import FailIf, Json, Module, Pickle, ReportFile
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
