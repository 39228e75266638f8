"""The command `compress calibrate`: parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.errors import UsageError, show

if TYPE_CHECKING:
    from compress.calibrate.inputs import Inputs
    from compress.checkpoint import Checkpoint

SAMPLES, SENTENCES = 128, 512


def calibrate(
    model: Annotated[Path, typer.Argument(help="A checkpoint, or an .onnx file.", metavar="MODEL")],
    recipe: Annotated[Path, typer.Option("--for", help="The recipe that will be run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The statistics file to write.")],
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text, read as windows of tokens.")
    ] = None,
    sentences: Annotated[
        Path | None, typer.Option(help="A sentence a line, or a .csv of pairs: for encoders.")
    ] = None,
    ids: Annotated[Path | None, typer.Option(help="Token ids, .npy [samples, length].")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images, .npz: uint8 [n, height, width, channels].")
    ] = None,
    documents: Annotated[
        bool, typer.Option("--documents", help="Cut --text at blank lines, not every N tokens.")
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            help=f"Samples to take at most: {SAMPLES} ({SENTENCES} sentences, all images).", min=1
        ),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sample: 512, or what the model takes.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.", min=0)] = 0,
    module: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FACTORY",
            help="Your own torch module: FILE.py is run, with your rights.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads; 0 = as torch decides.", min=0)] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing statistics file.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted calibration.")
    ] = False,
    no_fsync: Annotated[bool, typer.Option("--no-fsync", help="Do not wait for the disk.")] = False,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read .pt/.pth/.th/.bin files, in a limited child."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Measure a model's inputs: what the passes of a recipe want to know."""
    from compress.calibrate.calibrate import Settings
    from compress.calibrate.calibrate import calibrate as run
    from compress.checkpoint import open_checkpoint
    from compress.plan import Options, make_plan
    from compress.recipe import read_recipe
    from compress.terminal import emit, leave_threads_to_torch, progress_bar

    leave_threads_to_torch()
    if threads:
        import torch

        torch.set_num_threads(threads)
    given = {"text": text, "sentences": sentences, "ids": ids, "images": images}
    with open_checkpoint(model, allow_pickle=allow_pickle) as checkpoint:
        plan = make_plan(checkpoint, read_recipe(recipe), Options(module=module), calibrated=True)
        inputs = read_inputs(
            checkpoint, given, documents=documents, samples=samples, length=length, seed=seed
        )
        settings = Settings(overwrite, resume, not no_fsync, seed, module)
        with progress_bar() as progress:
            result = run(plan, inputs, out, settings, progress)
    for warning in (*plan.warnings, *result.warnings):
        typer.echo(f"warning: {warning}", err=True)
    body = result.body
    emit(body, json, lambda: typer.echo(_summary(body, inputs.description)))


def read_inputs(
    model: Checkpoint,
    given: dict[str, Path | None],
    *,
    documents: bool = False,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
) -> Inputs:
    """The inputs of the one option that was given: text, sentences, ids or images.

    Raises UsageError where it is none or several, and what reading them raises.
    """
    from compress.calibrate import data, inputs

    chosen = [(name, path) for name, path in given.items() if path is not None]
    options = ", ".join(f"--{name}" for name in given)
    if len(chosen) != 1:
        raise UsageError(
            "no inputs given" if not chosen else f"{len(chosen)} kinds of inputs given",
            hint=f"give one of {options}",
        )
    ((name, path),) = chosen
    if documents and name != "text":
        raise UsageError("--documents: only of a text", hint="leave it out, or give --text")
    if length is not None and name in ("ids", "images"):
        raise UsageError(f"--length: not with --{name}", hint="the file says how long samples are")
    if name == "images":
        return inputs.read_images(path, samples=samples, seed=seed)
    if name == "ids":
        return inputs.read_ids(path, model.config, samples=samples or SAMPLES, seed=seed)
    if name == "sentences":
        return data.sentence_ids(
            path, model, length=length, samples=samples or SENTENCES, seed=seed
        )
    return data.text_ids(
        path, model, length=length, samples=samples or SAMPLES, seed=seed, documents=documents
    )


def _summary(body: dict[str, Any], description: str) -> str:
    return (
        f"{show(body['path'], 400)}: {', '.join(body['kinds'])} of {body['tensors']} tensors at"
        f" {body['sites']} inputs, {body['bytes'] / 1e6:,.1f} MB, from {show(description, 400)};"
        f" {body['seconds']:,.0f} s, peak memory {body['peak_memory_bytes'] / 1e6:,.0f} MB"
    )
