"""`compress sweep`: every point of a grid is run, judged and thrown away; the figures stay.

In the folder of the sweep lie `results.json` (rewritten after each point, so that an interrupted
sweep goes on), `stats.safetensors` where there was a calibration, and at the end `sweep.svg` and
the winner's recipe `best.yaml`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.checkpoint import Checkpoint, strict_json
from compress.checkpoint.destination import check_place, refuse_overlap
from compress.checkpoint.files import open_inside
from compress.checkpoint.out_lock import OutLock
from compress.checkpoint.small_files import write_whole
from compress.errors import InputError, UsageError, from_os_error, show
from compress.evaluate.finished import Evaluation
from compress.evaluate.metrics import METRICS, evaluated, require
from compress.plan import Options, Plan, make_plan, recipe_yaml
from compress.recipe import Recipe
from compress.report import human, without_nan
from compress.run import Progress, RunOptions, run, silent
from compress.sweep import choice
from compress.sweep.grid import Point
from compress.sweep.picture import Dot, draw
from compress.sweep.results import read_rows

if TYPE_CHECKING:
    from compress.calibrate.statistics import Statistics

RESULTS, PICTURE, BEST = "results.json", "sweep.svg", "best.yaml"
_POINT = ".point-"  # folders of points that are being run
_MAX_RESULTS = 1 << 28
# (plan of every pass of every point, where to write) -> the statistics, and what to say of them
Calibrate = Callable[[Plan, Path, Progress], tuple["Statistics", list[str]]]


@dataclass(frozen=True)
class Job:
    """What to sweep.

    evaluation  the data to judge every point on; its reference is the source
    metric      what points are compared by, beside their size
    calibrate   collects statistics where passes want some; None: there is no data for it
    data        a record of the calibration's data, for the key of a resumed sweep
    """

    checkpoint: Checkpoint
    recipe: Recipe
    points: Sequence[Point]
    options: Options
    evaluation: Evaluation
    kind: str
    metric: str
    calibrate: Calibrate | None = None
    data: Any = None


def check_metric(name: str, kind: str) -> None:
    """Refuse (UsageError) a metric that points cannot be compared by."""
    there = [n for n in evaluated(kind, reference=True) if METRICS[n].better]
    if name not in there:
        raise UsageError(
            f"--metric {show(name)}: points cannot be compared by it",
            hint=f"one of {', '.join(there)}",
        )


def sweep(
    job: Job, out: Path, *, resume: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Run the points that are not done; the document of the sweep, which `results.json` holds.

    Raises BusyError where another sweep is at work in OUT, UsageError where OUT exists (without
    `resume`) or holds another sweep, and where no point can be run. A point that is refused is
    listed with the reason; the others go on.
    """
    require(job.recipe.gates, job.kind, reference=True, report=True)
    refuse_overlap(job.checkpoint.path, out)
    plans = _plans(job)
    with _locked(out):
        return _sweep(job, plans, out, resume, progress)


def _sweep(
    job: Job, plans: Sequence[Plan | UsageError], out: Path, resume: bool, progress: Progress
) -> dict[str, Any]:
    done = _open(job, out, resume)
    statistics, warnings = _calibrated(job, plans, out, progress)
    try:
        rows: list[dict[str, Any]] = []
        for number, point in enumerate(job.points, 1):
            row = done.get(point.key)
            if row is None:
                title = f"point {number} of {len(job.points)}"
                row = _row(job, point, plans[number - 1], statistics, out, _titled(progress, title))
            rows.append({"number": number, **row})
            _save(_body(job, rows, warnings), out)
    finally:
        if statistics is not None:
            statistics.close()
    body = _body(job, rows, warnings)
    _finish(job, body, out)
    return body


# ------------------------------------------------------------ one point


def _row(
    job: Job,
    point: Point,
    plan: Plan | UsageError,
    statistics: Statistics | None,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """One point's figures, or why it was refused."""
    row: dict[str, Any] = {
        "settings": dict(point.settings),
        "label": point.label,
        "key": point.key,
        "error": None,
        "metrics": None,
    }
    started = time.perf_counter()
    try:
        if isinstance(plan, UsageError):
            raise plan
        if statistics is not None:
            plan = make_plan(job.checkpoint, plan.recipe, job.options, statistics)
        options = RunOptions(fsync=False, evaluation=job.evaluation)
        with tempfile.TemporaryDirectory(prefix=_POINT, dir=out) as folder:
            report = run(plan, Path(folder) / "out", options, progress)
    except (UsageError, InputError) as error:
        return row | {"error": error.message}
    return row | {
        "metrics": report.metrics,
        "format": report.body["format"],
        "verdict": report.body["verdict"],
        "seconds": round(time.perf_counter() - started, 3),
    }


def _titled(progress: Progress, title: str) -> Progress:
    def show_it(what: str, done: int, total: int) -> None:
        progress(f"{title}: {what}", done, total)

    return show_it


def _plans(job: Job) -> list[Plan | UsageError]:
    """A plan for each point, or why there is none. Raises UsageError where all are refused."""
    plans: list[Plan | UsageError] = []
    for point in job.points:
        try:
            if point.recipe is None:
                raise UsageError(point.error or "no recipe")
            plans.append(
                make_plan(
                    job.checkpoint,
                    point.recipe,
                    job.options,
                    calibrated=job.calibrate is not None,
                )
            )
        except UsageError as error:
            plans.append(error)
    refused = [plan for plan in plans if isinstance(plan, UsageError)]
    if len(refused) == len(plans):
        raise UsageError(f"every point is refused; the first: {refused[0].message}",
                         hint=refused[0].hint)  # fmt: skip
    return plans


def _calibrated(
    job: Job, plans: Sequence[Plan | UsageError], out: Path, progress: Progress
) -> tuple[Statistics | None, list[str]]:
    """What all points' passes want to know, collected once; and what to say of the data."""
    if job.calibrate is None:
        return None, []
    made = [plan for plan in plans if isinstance(plan, Plan)]
    every = replace(
        made[0],
        passes=tuple(one for plan in made for one in plan.passes),
        members=tuple(infos for plan in made for infos in plan.members),
    )
    if not any(one.needs | one.welcomes for one in every.passes):
        return None, []
    found, warnings = job.calibrate(every, out / "stats.safetensors", progress)
    return found, [*warnings, *job.evaluation.warnings(dict(found.record.data))]


# ------------------------------------------------------------ the folder


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """No other sweep in this folder meanwhile. Raises BusyError, UsageError, ResourceError."""
    check_place(out.absolute())
    lock = OutLock(out)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        lock.take()
    except OSError as error:
        raise from_os_error(error, doing="cannot use") from error
    try:
        yield
    finally:
        lock.give_back()


def _open(job: Job, out: Path, resume: bool) -> dict[str, dict[str, Any]]:
    """Take the folder; rows of points that an earlier sweep finished, by key."""
    results = out / RESULTS
    if not resume and os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"output {show(str(out))} exists", hint="--resume goes on with it; or choose another"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        is_new = not any(out.iterdir())
    except OSError as error:
        raise from_os_error(error, doing="cannot use") from error
    if is_new:
        # From here on the folder is known as a sweep's, wherever this one is cut off.
        _save(_body(job, [], []), out)
        return {}
    if not os.path.lexists(results):
        raise UsageError(
            f"{show(str(out))} holds no sweep (no {RESULTS})", hint="choose another output"
        )
    file = open_inside(os.path.realpath(out), RESULTS)
    try:
        body = strict_json.loads(file.read_all(_MAX_RESULTS), str(results))
    finally:
        file.close()
    needed = {"bits_per_weight", job.metric, *(gate.metric for gate in job.recipe.gates)}
    kept = read_rows(body, needed)
    if kept is None:
        raise InputError(
            f"{show(str(results))}: not the results of a sweep", hint="choose another output"
        )
    if body["key"] != _key(job):
        raise UsageError(
            f"{show(str(out))} holds a sweep of another model, data or version",
            hint="choose another output",
        )
    _remove_left(out)
    return kept


def _remove_left(out: Path) -> None:
    """Remove the point that a killed sweep was at. Raises ResourceError."""
    try:
        for left in out.glob(f"{_POINT}*"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
    except OSError as error:
        raise from_os_error(error, doing="cannot clean the folder") from error


def _key(job: Job) -> str:
    """What rows of one folder have in common."""
    parts = {
        "version": __version__,
        "source": job.checkpoint.fingerprint(),
        "evaluation": dict(job.evaluation.data.record),
        "calibration": job.data,
        "format": job.options.format,
        "untouched": job.options.untouched,
        "module": job.options.module,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _body(job: Job, rows: list[dict[str, Any]], warnings: list[str]) -> dict[str, Any]:
    finished = [row for row in rows if row["metrics"] is not None]
    ahead = choice.frontier(finished, job.metric)
    best = choice.winner(finished, job.metric, job.recipe.gates)
    return {
        "sweep_version": 1,
        "key": _key(job),
        "model": str(job.checkpoint.path),
        "metric": job.metric,
        "gates": [str(gate) for gate in job.recipe.gates],
        "data": dict(job.evaluation.data.record),
        "warnings": warnings,
        "points": rows,
        "frontier": [finished[i]["number"] for i in ahead],
        "best": None if best is None else finished[best]["number"],
    }


def _save(body: dict[str, Any], out: Path) -> None:
    _write(out / RESULTS, (json.dumps(without_nan(body), indent=1) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content, is_named=False)
    except OSError as error:
        raise from_os_error(error, doing="cannot write") from error


def _finish(job: Job, body: dict[str, Any], out: Path) -> None:
    """The picture, and the winner's recipe; an old one goes where nothing passes the gates."""
    dots = [
        Dot(
            row["number"],
            row["label"],
            row["metrics"]["bytes"],
            row["metrics"][job.metric],
            row["number"] in body["frontier"],
            row["number"] == body["best"],
        )
        for row in body["points"]
        if row["metrics"] is not None
    ]
    title = f"{Path(body['model']).name or 'model'}: {job.metric} on {body['data']['file']}"
    _write(out / PICTURE, draw(dots, title, job.metric, human).encode())
    if body["best"] is None:
        (out / BEST).unlink(missing_ok=True)
        return
    recipe = job.points[body["best"] - 1].recipe
    if recipe is not None:
        _write(out / BEST, recipe_yaml(recipe))
