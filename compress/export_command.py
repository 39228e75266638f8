"""`compress export`: an output as ONNX, as onnxruntime-genai's layout, or as a plain checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.errors import InputError, UsageError, show
from compress.export_onnx.options import ExportWords
from compress.options import (
    CalibrateIds,
    CalibrateImages,
    CalibrateSamples,
    ImageShape,
    Json,
    Module,
    OnnxActivations,
    OnnxLevel,
    OnnxOpset,
    OnnxStyle,
    OnnxTolerance,
    SelfContained,
)
from compress.terminal import console, emit, progress_bar

if TYPE_CHECKING:
    from compress.checkpoint import Checkpoint
    from compress.checkpoint.manifest import FileRecord
    from compress.checkpoint.stage import Stage

ONNX, GENAI, DENSE = "onnx", "genai", "dense"
TARGETS = (ONNX, GENAI, DENSE)
_CPU = "cpu"
_OF_GENAI = ("--build", "--builder-option", "--execution-provider")


def export(
    out: Annotated[Path, typer.Argument(help="An output of this tool.", metavar="OUT")],
    to: Annotated[str, typer.Option(help="onnx, genai or dense.", metavar="KIND")],
    target: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Another directory; without it, OUT gets model.onnx."),
    ] = None,
    onnx_style: OnnxStyle = None,
    onnx_accuracy_level: OnnxLevel = None,
    onnx_opset: OnnxOpset = None,
    onnx_tolerance: OnnxTolerance = None,
    onnx_activations: OnnxActivations = None,
    self_contained: SelfContained = False,
    module: Module = None,
    image_shape: ImageShape = None,
    ids: CalibrateIds = None,
    images: CalibrateImages = None,
    samples: CalibrateSamples = None,
    execution_provider: Annotated[
        str, typer.Option(help="genai: what the graph is made for: cpu, cuda, dml, webgpu.")
    ] = _CPU,
    build: Annotated[
        bool | None,
        typer.Option("--build/--no-build", help="genai: call its builder [default: if installed]."),
    ] = None,
    builder_option: Annotated[
        list[str] | None,
        typer.Option(help="genai: KEY=VALUE for its builder.", metavar="KEY=VALUE"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    no_fsync: Annotated[bool, typer.Option("--no-fsync", help="Do not wait for the disk.")] = False,
    json: Json = False,
) -> None:
    """Write an output in another form: a graph for onnxruntime, genai's layout, plain tensors."""
    if to not in TARGETS:
        raise UsageError(f"--to {show(to)}: unknown", hint=f"one of {', '.join(TARGETS)}")
    words = ExportWords(
        to == ONNX, onnx_style, onnx_accuracy_level, onnx_opset, onnx_tolerance, onnx_activations,
        self_contained, image_shape,
    )  # fmt: skip
    if to != ONNX and target is None:
        raise UsageError(f"--to {to}: no directory to write", hint="add -o DIR")
    _refuse_idle(
        to,
        {
            "--module": module, "--ids": ids, "--images": images, "--samples": samples,
            "--build": build, "--builder-option": builder_option,
            "--execution-provider": None if execution_provider == _CPU else execution_provider,
        },
        words,
    )  # fmt: skip
    if to == ONNX:
        body = _export_onnx(
            out, target, words, module=module, ids=ids, images=images, samples=samples,
            overwrite=overwrite, fsync=not no_fsync,
        )  # fmt: skip
    elif to == GENAI:
        from compress.export_onnx.genai import write_genai
        from compress.export_onnx.genai_builder import BuilderOptions

        options = BuilderOptions(
            provider=execution_provider,
            accuracy_level=onnx_accuracy_level,
            extra=tuple(builder_option or ()),
        )
        with progress_bar() as progress:
            body = write_genai(
                out, target or out, options=options, call_builder=build, overwrite=overwrite,
                fsync=not no_fsync, progress=progress,
            )  # fmt: skip
    else:
        from compress.unpacking import unpack_output

        with progress_bar() as progress:
            body = unpack_output(
                out, target or out, overwrite=overwrite, fsync=not no_fsync, progress=progress
            )
    emit(body, json, lambda: _show(body))


def _refuse_idle(to: str, given: dict[str, Any], words: ExportWords) -> None:
    """Refuse (UsageError) options that belong to another kind of export."""
    typed = [name for name, value in given.items() if value is not None]
    alone = words if to != GENAI else replace(words, accuracy_level=None)  # its builder has one
    if to == ONNX:
        idle = next((name for name in typed if name in _OF_GENAI), None)
    elif to == GENAI:
        idle = next((name for name in typed if name not in _OF_GENAI), alone.lone())
    else:
        idle = next(iter(typed), alone.lone())
    if idle is not None:
        raise UsageError(f"{idle}: it means nothing with --to {to}", hint="leave it out")


def _show(body: dict[str, Any]) -> None:
    if "onnx" in body:
        from compress.export_onnx.show import lines_of

        for line in lines_of(body["onnx"]):
            console().print(line, markup=False, highlight=False)
    for note in body.get("notes", []):
        typer.echo(f"note: {note}")
    typer.echo(body["summary"])


def _export_onnx(
    out: Path,
    target: Path | None,
    words: ExportWords,
    *,
    module: str | None,
    ids: Path | None,
    images: Path | None,
    samples: int | None,
    overwrite: bool,
    fsync: bool,
) -> dict[str, Any]:
    """model.onnx into OUT itself, all or nothing; or a directory that needs nothing of OUT."""
    from compress.calibrate.on_the_way import CalibrateOn
    from compress.checkpoint.destination import refuse_overlap
    from compress.checkpoint.stage import staged
    from compress.errors import GateError
    from compress.export_onnx.export import export_into, prepare
    from compress.export_onnx.on_the_way import refuse_idle, samples_of, with_image_shape
    from compress.output import open_any

    given = CalibrateOn(ids=ids, images=images, samples=samples)
    given.check()
    if target is not None:
        words = replace(words, self_contained=True)
        refuse_overlap(out, target)
    options = with_image_shape(words.options(module), given)
    with open_any(out) as checkpoint, progress_bar() as progress:
        if target is None:
            _require_own(out, checkpoint)
        refuse_idle(words, options, checkpoint)
        prepared = prepare(checkpoint, options, progress)
        known = samples_of(checkpoint, None, given, seed=0)
        with staged(
            target or out,
            overwrite=overwrite or target is None,
            fsync=fsync,
            doing="cannot write the export",
        ) as stage:
            files = _keep(out, stage) if target is None else _surroundings(checkpoint, stage)
            exported = export_into(
                stage, prepared, known, progress, weights=None if target is None else checkpoint
            )
            if exported.failure is not None:
                raise GateError(exported.failure, hint="nothing was published")
            checkpoint.check_unchanged()
            body = _manifest(
                out, files | dict(exported.files), exported.section, checkpoint,
                in_place=target is None,
            )  # fmt: skip
            stage.write_file("manifest.json", body)
    where = target or out
    return {
        "onnx": dict(exported.section),
        "files": exported.sizes,
        "summary": f"exported to {show(str(where / 'model.onnx'))}, {exported.nbytes:,} bytes more",
    }


def _require_own(out: Path, checkpoint: Checkpoint) -> None:
    """Only an output of this tool gets a file into its own directory.

    Raises UsageError, InputError where a newer version wrote it.
    """
    from compress.checkpoint import manifest

    try:
        manifest.load(out)
    except manifest.NewerManifest:
        raise
    except InputError as error:
        raise UsageError(
            f"{show(str(checkpoint.path))}: not an output of this tool, which could get a file"
            f" ({error.message})",
            hint="add -o DIR, which gets everything that the graph needs",
        ) from None


def _keep(out: Path, stage: Stage) -> dict[str, FileRecord]:
    """Every file of the output but those of an earlier export, in the stage."""
    from compress.checkpoint import manifest
    from compress.checkpoint.files import is_own_file
    from compress.export_onnx.builder import DATA_FILE
    from compress.export_onnx.export import MODEL_FILE

    kept = {}
    for name, record in manifest.load(out)["files"].items():
        if name in (MODEL_FILE, DATA_FILE):
            continue
        found = manifest.read_record(record)
        if found is None or not is_own_file(out, name):
            raise InputError(f"{show(name)}: missing, or no regular file", hint="compress verify")
        stage.take_file(name, out / name, found)
        kept[name] = found
    return kept


def _surroundings(checkpoint: Checkpoint, stage: Stage) -> dict[str, FileRecord]:
    """The config and the files that travel with the model."""
    from compress.formats import OWN_FILES

    files = {}
    if checkpoint.config_bytes is not None:
        files["config.json"] = stage.write_file("config.json", checkpoint.config_bytes)
    for name in checkpoint.sidecars:
        if name not in OWN_FILES and name != "config.json":
            files[name] = stage.copy_file(name, checkpoint.open_sidecar(name))
    return files


def _manifest(
    out: Path, files: dict[str, FileRecord], section: Any, checkpoint: Checkpoint, *, in_place: bool
) -> bytes:
    """The output's manifest with the new files, or one of a directory of its own."""
    from compress.checkpoint import manifest

    try:
        body = manifest.load(out)
    except manifest.NewerManifest:
        raise
    except InputError:
        body = {"source": {"fingerprint": checkpoint.fingerprint()}, "recipe": {}, "run": {}}
    return manifest.build(
        files,
        source=body["source"],
        recipe=body["recipe"],
        format_name=body["format"] if in_place else manifest.GRAPH,
        run={**body["run"], "onnx": {"seconds": section["seconds"]}},
        decoded=body.get("decoded") if in_place else None,
    )
