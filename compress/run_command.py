"""What `run`, `plan` and the commands of one pass do with what was typed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from compress.calibrate.on_the_way import CalibrateOn
from compress.errors import UsageError, show
from compress.evaluate.on_the_way import EvaluateOn, prepared
from compress.export_onnx.options import ExportWords
from compress.terminal import console, emit, progress_bar

if TYPE_CHECKING:
    from compress.plan import Options, Plan
    from compress.recipe import Recipe


def job_of(words: list[str], recipe_file: Path | None, seed: int | None) -> tuple[Path, Recipe]:
    """MODEL and the recipe, from words or a file."""
    from dataclasses import replace

    from compress.recipe import Recipe, parse_pass, read_recipe

    if recipe_file is not None:
        job = read_recipe(recipe_file)
        if len(words) > 1:
            raise UsageError(
                f"{show(words[1])}: with --recipe the one argument is MODEL",
                hint="put the passes in the recipe",
            )
        model = words[0] if words else job.model
        if model is None:
            raise UsageError("no model given", hint="name it, or put `model:` in the recipe")
    else:
        if not words:
            raise UsageError("no model given", hint="compress run MODEL -o OUT PASS...")
        model = words[0]
        job = Recipe(passes=tuple(parse_pass(word) for word in words[1:]))
    return Path(model), job if seed is None else replace(job, seed=seed)


def options_of(
    format: str | None,
    untouched: str | None,
    jobs: int,
    memory: str,
    shard: str,
    onnx: bool = False,
) -> Options:
    """How to run, from flags. Raises UsageError for a format, dtype or size that is none."""
    from compress.plan import Options
    from compress.recipe import FORMATS, UNTOUCHED
    from compress.sizes import parse_size

    for flag, value, known in (
        ("--format", format, FORMATS),
        ("--untouched", untouched, UNTOUCHED),
    ):
        if value is not None and value not in known:
            raise UsageError(f"{flag} {show(value)}: unknown", hint=f"one of {', '.join(known)}")
    return Options(
        format=format,
        untouched=untouched,
        jobs=jobs,
        memory=parse_size("--memory", memory, least=1 << 20),
        max_shard_bytes=parse_size("--max-shard-size", shard, least=1 << 20),
        onnx=onnx,
    )


def plan_job(
    model: Path,
    job: Recipe,
    options: Options,
    *,
    stats: Path | None,
    survey: bool,
    allow_pickle: bool,
    export: ExportWords | None = None,
) -> dict[str, Any]:
    """What `compress plan` prints, as JSON types. Raises UsageError for what `run` refuses.

    Statistics that passes need may still be missing, but not for a survey that makes use of them.
    """
    from contextlib import ExitStack
    from dataclasses import replace

    from compress.calibrate.statistics import open_statistics
    from compress.checkpoint import open_checkpoint
    from compress.export_onnx.on_the_way import graph_for
    from compress.plan import make_plan
    from compress.show_plan import plan_body
    from compress.survey import decide_all

    export = export or ExportWords()
    options = replace(options, onnx=options.onnx or export.wanted)
    wanted = export.options(options.module)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(model, allow_pickle=allow_pickle))
        statistics = None
        if stats is not None:
            statistics = stack.enter_context(open_statistics(stats))
            statistics.check_model(checkpoint)
        calibrated = statistics is None and not survey
        made = make_plan(checkpoint, job, options, statistics, calibrated=calibrated)
        progress = stack.enter_context(progress_bar())
        if survey:
            made = decide_all(made, progress)
        body = plan_body(made)
        graph = graph_for(made, export, wanted, CalibrateOn(), progress)
        body["onnx_bytes"] = None
        if graph is not None:
            body["onnx_bytes"] = [graph.size(made, end) for end in (0, 1)]
    kinds = frozenset[str]().union(*(one.needs for one in made.passes))
    if calibrated and kinds:
        missing = ", ".join(sorted(kinds))
        body["notes"].append(f"a run needs a calibration ({missing}): --text F, or --stats F")
    return body


def run_job(
    model: Path,
    job: Recipe,
    out: Path,
    *,
    options: Options,
    fail_if: list[str],
    report: Path | None,
    overwrite: bool,
    resume: bool,
    allow_pickle: bool,
    fsync: bool,
    content_hash: bool,
    decoded_hashes: bool,
    json: bool,
    calibrate_on: CalibrateOn,
    evaluate_on: EvaluateOn,
    module: str | None = None,
    export: ExportWords | None = None,
) -> None:
    """Everything that `compress run` does, and the commands of one pass."""
    from dataclasses import replace

    from compress.calibrate.on_the_way import statistics_for
    from compress.checkpoint import open_checkpoint
    from compress.checkpoint.destination import check_out
    from compress.evaluate.metrics import require
    from compress.export_onnx.on_the_way import graph_for, samples_of
    from compress.plan import make_plan
    from compress.recipe import Gate
    from compress.report import print_report
    from compress.run import RunOptions
    from compress.run import run as run_plan

    job = replace(job, gates=(*job.gates, *(Gate.parse(text) for text in fail_if)))
    request = evaluate_on.request()
    kind = None if request is None else request.kind
    require(job.gates, kind, reference=True, report=True)
    export = export or ExportWords()
    options = replace(options, module=module, onnx=options.onnx or export.wanted)
    wanted = export.options(module)
    check_out(Path(os.path.abspath(out)), overwrite=overwrite)
    calibrate_on.check()
    with (
        open_checkpoint(model, allow_pickle=allow_pickle) as checkpoint,
        progress_bar() as progress,
    ):
        draft: Plan = make_plan(checkpoint, job, options, calibrated=calibrate_on.is_given)
        evaluation = prepared(checkpoint, request, options)
        graph = graph_for(draft, export, wanted, calibrate_on, progress)
        with statistics_for(
            draft, calibrate_on, out, resume=resume, fsync=fsync, progress=progress
        ) as known:
            made = make_plan(checkpoint, job, options, known.statistics)
            made = replace(made, warnings=(*made.warnings, *known.warnings))
            for warning in made.warnings:
                if json:
                    typer.echo(f"warning: {warning}", err=True)
            samples = None
            if graph is not None:
                samples = samples_of(checkpoint, made.statistics, calibrate_on, seed=job.seed)
            settings = RunOptions(
                overwrite, resume, fsync, report, content_hash, job.gates, evaluation,
                graph, samples, decoded_hashes,
            )  # fmt: skip
            result = run_plan(made, out, settings, progress)
    emit(result.body, json, lambda: print_report(result, console()), raw=result.to_json)


def run_one(model: Path, one: Any, common: dict[str, Any]) -> None:
    """The command of one pass, with the options that such commands share."""
    from compress.pass_command import CALIBRATION, EVALUATION, EXPORT
    from compress.recipe import Recipe

    run_job(
        model,
        Recipe(passes=(one,), seed=common["seed"] or 0),
        common["out"],
        options=options_of(
            common["format"], common["untouched"], common["jobs"], common["memory"], "5GB"
        ),
        fail_if=common["fail_if"] or [],
        report=common["report"],
        overwrite=common["overwrite"],
        resume=common["resume"],
        allow_pickle=common["allow_pickle"],
        fsync=not common["no_fsync"],
        content_hash=False,
        decoded_hashes=False,
        calibrate_on=CalibrateOn(**{key: common[key] for key in CALIBRATION}),
        module=common["module"],
        export=ExportWords(*(common[key] for key in EXPORT)),
        evaluate_on=EvaluateOn(*(common[key] for key in EVALUATION)),
        json=common["json"],
    )
