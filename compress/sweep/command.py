"""`compress sweep` from its options: every refusal comes before any point is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.calibrate.inputs import Inputs
from compress.calibrate_command import read_inputs
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.errors import UsageError, show
from compress.evaluate.data import Request
from compress.evaluate.finished import Evaluation
from compress.evaluate.metrics import QUALITY, require
from compress.plan import Options
from compress.recipe import FORMATS, Gate, read_recipe
from compress.run import Progress, silent
from compress.sweep.collect import collector
from compress.sweep.grid import parse_axis, points
from compress.sweep.sweep import Job, check_metric, sweep


@dataclass(frozen=True)
class Calibration:
    """Where the data of the one calibration lies; at most one of the files."""

    text: Path | None = None
    sentences: Path | None = None
    ids: Path | None = None
    images: Path | None = None
    length: int | None = None
    samples: int | None = None

    def read(self, checkpoint: Checkpoint, seed: int) -> Inputs | None:
        """The inputs, None where no file is given. Raises UsageError, InputError."""
        given = {
            "text": self.text,
            "sentences": self.sentences,
            "ids": self.ids,
            "images": self.images,
        }
        if all(path is None for path in given.values()):
            return None
        return read_inputs(checkpoint, given, samples=self.samples, length=self.length, seed=seed)


def sweep_model(
    recipe: Path,
    model: Path | None,
    grid: Sequence[str],
    out: Path,
    evaluate_on: Request | None,
    calibration: Calibration,
    *,
    metric: str | None = None,
    module: str | None = None,
    fail_if: Sequence[str] = (),
    seed: int | None = None,
    format: str | None = None,
    resume: bool = False,
    allow_pickle: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Sweep a recipe over a grid; see `sweep` for what it returns and raises."""
    job = read_recipe(recipe)
    if seed is not None:
        job = replace(job, seed=seed)
    job = replace(job, gates=(*job.gates, *(Gate.parse(text) for text in fail_if)))
    source = model or (None if job.model is None else Path(job.model))
    if source is None:
        raise UsageError("no model given", hint="name it, or put `model:` in the recipe")
    if evaluate_on is None:
        raise UsageError(
            "nothing to judge the points by",
            hint="give one of --eval-text, --eval-pairs and --eval-images",
        )
    if format is not None and format not in FORMATS:
        raise UsageError(f"--format {show(format)}: unknown", hint=f"one of {', '.join(FORMATS)}")
    if not grid:
        raise UsageError("no grid given", hint='e.g. --grid "quantize.bits=2,3,4"')
    chosen = metric or QUALITY[evaluate_on.kind]
    check_metric(chosen, evaluate_on.kind)
    require(job.gates, evaluate_on.kind, reference=True, report=True)
    every = points(job, [parse_axis(text, job) for text in grid])
    options = Options(format=format, module=module)
    with open_checkpoint(source, allow_pickle=allow_pickle) as checkpoint:
        inputs = calibration.read(checkpoint, job.seed)
        evaluation = Evaluation(checkpoint, evaluate_on, module=module, threads=options.jobs)
        return sweep(
            Job(
                checkpoint,
                job,
                every,
                options,
                evaluation,
                evaluate_on.kind,
                chosen,
                None if inputs is None else collector(inputs, module=module, seed=job.seed),
                None if inputs is None else inputs.record(),
            ),
            out,
            resume=resume,
            progress=progress,
        )
