"""`compress run --onnx`: from options to the graph that the run takes along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from compress.errors import UsageError, show
from compress.export_onnx.options import ExportOptions, ExportWords
from compress.tensor import Array

if TYPE_CHECKING:
    from compress.calibrate.on_the_way import CalibrateOn
    from compress.calibrate.statistics import Statistics
    from compress.checkpoint import Checkpoint
    from compress.export_onnx.export import Prepared
    from compress.plan import Plan
    from compress.run import Progress


def graph_for(
    draft: Plan,
    words: ExportWords,
    options: ExportOptions,
    calibrate_on: CalibrateOn,
    progress: Progress,
) -> Prepared | None:
    """The graph of a run, None where none is wanted. Raises UsageError, InputError."""
    if not draft.recipe.output.onnx:
        if (lone := words.lone()) is not None:
            raise UsageError(f"{lone}: no ONNX is written", hint="add --onnx")
        return None
    from compress.export_onnx.export import prepare

    refuse_idle(words, options, draft.checkpoint)
    return prepare(draft.checkpoint, with_image_shape(options, calibrate_on), progress)


def refuse_idle(words: ExportWords, options: ExportOptions, checkpoint: Checkpoint) -> None:
    """Refuse (UsageError) what was typed and would change nothing."""
    if words.opset is not None and checkpoint.graph is not None:
        raise UsageError(
            f"--onnx-opset {words.opset}: the graph of an .onnx file keeps its own",
            hint="leave it out: where codes need a newer opset, the graph gets it",
        )
    if words.image_shape is not None and (options.module is None or checkpoint.graph is not None):
        raise UsageError(
            f"--image-shape {show(words.image_shape)}: no --module is captured that takes images",
            hint="leave it out",
        )


def with_image_shape(options: ExportOptions, calibrate_on: CalibrateOn) -> ExportOptions:
    """The options with the shape of the images that were given, where none was named."""
    if options.module is None or options.image_shape is not None or calibrate_on.images is None:
        return options
    from compress.calibrate.inputs import IMAGES, read_images

    shape = read_images(calibrate_on.images, samples=1).arrays[IMAGES].shape
    return replace(options, image_shape=(int(shape[1]), int(shape[2]), int(shape[3])))


def samples_of(
    checkpoint: Checkpoint, statistics: Statistics | None, calibrate_on: CalibrateOn, *, seed: int
) -> Mapping[str, Array] | None:
    """What the model is calibrated on, for the proof and the ranges of activations."""
    found = {} if statistics is None else statistics.inputs()
    if found:
        return found
    if not any(calibrate_on.inputs.values()):
        return None
    from compress.calibrate_command import read_inputs

    return read_inputs(
        checkpoint,
        calibrate_on.inputs,
        documents=calibrate_on.documents,
        samples=calibrate_on.samples,
        length=calibrate_on.length,
        seed=seed,
    ).arrays
