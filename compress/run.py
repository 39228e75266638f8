"""The main job: surveys, then the write sweep into a stage, the gates, and one final rename."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress import decoded_hashes, report, resume, survey
from compress.checkpoint import manifest
from compress.checkpoint.destination import check_report_file, refuse_overlap
from compress.checkpoint.small_files import write_whole
from compress.checkpoint.stage import Stage
from compress.checkpoint.writer import SafetensorsWriter
from compress.errors import GateError, Interrupted, from_os_error
from compress.formats.base import MODEL
from compress.layout import Layout, WeightFile, specs_of
from compress.parallel import map_tiles
from compress.plan import Plan
from compress.recipe import Gate
from compress.report import Report
from compress.resume import Finished, State
from compress.spills import Spill, join
from compress.tensor import Array
from compress.tiles import TensorPlan, Tile, cut
from compress.work import Packed, Sums, work_on

if TYPE_CHECKING:
    from compress.evaluate.finished import Evaluation
    from compress.export_onnx.export import Prepared

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True)
class RunOptions:
    """How a run treats its output."""

    overwrite: bool = False
    resume: bool = False
    fsync: bool = True
    report_file: Path | None = None
    content_hash: bool = False
    gates: tuple[Gate, ...] = ()
    evaluation: Evaluation | None = None  # of the finished stage, before it is published
    export: Prepared | None = None  # the graph that is written beside the weights
    samples: Mapping[str, Array] | None = None  # of the calibration, for the proof of the graph
    decoded_hashes: bool = False  # of what the changed tensors decode to, in the manifest


def run(plan: Plan, out: Path, options: RunOptions, progress: Progress = silent) -> Report:
    """Compress the plan's checkpoint into the directory `out`.

    Raises UsageError (OUT exists, another plan to resume), GateError, ResourceError, BusyError,
    InputError. On any of them OUT is as it was before.
    """
    started = time.perf_counter()
    source = plan.checkpoint.path
    refuse_overlap(source, out)
    if options.report_file is not None:
        check_report_file(options.report_file, source, out)
    plan.check_disk(out, 0 if options.export is None else options.export.disk(plan))
    plan.check_memory()
    key = resume.resume_key(plan)
    stage = Stage(out, overwrite=options.overwrite, fsync=options.fsync)
    try:
        kept = stage.open(key=key, resume=options.resume)
        state = resume.resume(stage) if kept else State(stage)
        result = _fill(plan, stage, state, options, progress, started)
        stage.publish()
        return result
    except (Interrupted, KeyboardInterrupt):
        if State.is_in(stage):
            stage.release()  # finished shards stay for --resume
        else:
            stage.abandon()
        raise
    except OSError as error:
        stage.abandon()
        raise from_os_error(error, doing="cannot write the output") from error
    except BaseException:
        stage.abandon()
        raise


def _fill(
    plan: Plan,
    stage: Stage,
    state: State,
    options: RunOptions,
    progress: Progress,
    started: float,
) -> Report:
    """Everything between taking the stage and publishing it."""
    plan = survey.decide_all(plan, progress)
    if any(
        one.follows(info)
        for one, infos in zip(plan.passes, plan.members, strict=True)
        for info in infos
    ):
        from compress.following import follow

        plan = follow(plan, stage.folder / "following.safetensors", progress)
    layout = plan.layout()
    shards = _write_shards(plan, layout, stage, state, progress)
    files = {shard.name: one.record for shard, one in zip(layout.shards, shards, strict=True)}
    rows = [row for one in shards for row in one.rows]
    if plan.following is not None:
        plan.following.close()
    for part in layout.parts:
        files[part.name] = join(part, [one.shares for one in shards], stage)
    plan.checkpoint.check_unchanged()
    for name, content in layout.small.items():
        files[name] = stage.write_file(name, content)
    for name in layout.copies:
        files[name] = stage.copy_file(name, plan.checkpoint.open_sidecar(name))
    exported = None
    if options.export is not None:
        from compress.export_onnx.export import export_into

        exported = export_into(stage, options.export, options.samples, progress)
        files |= exported.files
    seconds, peak = time.perf_counter() - started, peak_memory()
    evaluated, warnings = _evaluate(plan, stage, options, progress)
    result = report.build(
        plan,
        layout,
        rows,
        seconds=seconds,
        peak_memory=peak,
        evaluation=evaluated,
        warnings=warnings,
        exported=exported,
    )
    _check_gates(result, options, None if exported is None else exported.failure)
    files["report.json"] = stage.write_file("report.json", result.to_json())
    source: dict[str, Any] = {"fingerprint": plan.checkpoint.fingerprint()}
    if options.content_hash:
        source["content_sha256"] = plan.checkpoint.content_hash()
    body = manifest.build(
        files,
        source=source,
        recipe=plan.recipe.resolved(),
        format_name=plan.format.name,
        run={
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 3),
        },
        decoded=decoded_hashes.of_output(stage.path) if options.decoded_hashes else None,
    )
    stage.write_file(manifest.NAME, body)
    return result


def _evaluate(
    plan: Plan, stage: Stage, options: RunOptions, progress: Progress
) -> tuple[dict[str, Any] | None, list[str]]:
    """The output's figures on data, and what to say of that data; nothing without data."""
    if options.evaluation is None:
        return None, []
    calibration = None if plan.statistics is None else dict(plan.statistics.record.data)
    return (
        options.evaluation.run(stage.path, progress),
        options.evaluation.warnings(calibration),
    )


def _check_gates(result: Report, options: RunOptions, failure: str | None) -> None:
    """Write the report where asked; on a failed gate raise, so that nothing is published."""
    if options.report_file is not None:
        try:
            write_whole(options.report_file, result.to_json())
        except OSError as error:
            raise from_os_error(error, doing="cannot write the report") from error
    failed = [*result.failed(options.gates), *([] if failure is None else [failure])]
    if failed:
        raise GateError("; ".join(failed), hint="nothing was published")


def _write_shards(
    plan: Plan, layout: Layout, stage: Stage, state: State, progress: Progress
) -> list[Finished]:
    """Every shard in order, those of an interrupted run as they are."""
    shards: list[Finished] = []
    total = sum(t.info.nbytes for t in plan.tensors)
    done = 0
    parts = {part.part for part in layout.parts}
    for number, shard in enumerate(layout.shards):
        names = [t.info.name for t in shard.tensors]
        finished = state.take(shard.name, number, names, parts)
        if finished is None:
            before = done

            def show_bytes(own: int, before: int = before) -> None:
                progress("write", before + own, total)

            finished = _write_shard(plan, shard, number, stage, show_bytes)
            if len(layout.shards) > 1:
                state.add(shard.name, finished)
        shards.append(finished)
        done += sum(t.info.nbytes for t in shard.tensors)
        progress("write", done, total)
    return shards


def _write_shard(
    plan: Plan, shard: WeightFile, number: int, stage: Stage, progress: Callable[[int], None]
) -> Finished:
    """Stream one shard; arrays for the side files are spilled beside it."""
    writer = SafetensorsWriter(stage, shard.name, shard.header_specs, shard.metadata)
    spill = Spill(stage, number)
    rows = []
    done = 0
    try:
        tiles = [tile for t in shard.tensors for tile in cut(t, plan.passes, plan.tile_bytes)]
        current = _Assembly(plan)
        for tile, packed in map_tiles(
            lambda tile: work_on(plan, tile),
            tiles,
            workers=plan.options.workers,
            memory=plan.options.memory,
        ):
            if current.tensor is not tile.tensor:
                rows += current.finish(writer, spill)
                current = _Assembly(plan, tile.tensor)
            current.add(tile, packed, writer)
            done += _source_bytes(tile)
            progress(done)
        rows += current.finish(writer, spill)
        return Finished(number, writer.finish(), spill.finish(), rows)
    finally:
        writer.close()
        spill.abort()


class _Assembly:
    """One tensor on its way into a shard: the first array streams, the others wait."""

    def __init__(self, plan: Plan, tensor: TensorPlan | None = None) -> None:
        self.tensor = tensor
        self._plan = plan
        self._sums = Sums()
        self._measured = False
        self._specs = [] if tensor is None else specs_of(tensor, plan.format)
        self._waiting: dict[tuple[str, str], list[Any]] = {
            (s.part, s.name): [] for s in self._specs
        }
        model = [s.name for s in self._specs if s.part == MODEL]
        self._first = model[0] if model else None

    def add(self, tile: Tile, packed: Packed, writer: SafetensorsWriter) -> None:
        """Take the next tile, in order."""
        if packed.sums is not None:
            self._measured = True
            self._sums.add(packed.sums)
        if packed.raw is not None:
            writer.write(packed.raw)
            if packed.buffer is not None:
                self._plan.buffers.give(packed.buffer)
            return
        for key, array in packed.arrays.items():
            if key == (MODEL, self._first):
                writer.write(_bytes_of(array))
            else:
                self._waiting[key].append(array)

    def finish(self, writer: SafetensorsWriter, spill: Spill) -> list[dict[str, Any]]:
        """Write the arrays that waited; returns the tensor's row of the report."""
        if self.tensor is None:
            return []
        for spec in self._specs:
            for array in self._waiting[(spec.part, spec.name)]:
                if spec.part == MODEL:
                    writer.write(_bytes_of(array))
                else:
                    spill.write(spec.part, _bytes_of(array))
        if not self._measured:
            self._sums.nonzeros = self.tensor.info.size
        return [report.row(self._plan, self.tensor, self._sums)]


def _bytes_of(array: Any) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _source_bytes(tile: Tile) -> int:
    if tile.raw:
        return tile.stop - tile.start
    info = tile.tensor.info
    rows = max(1, info.matrix_shape[0])
    return info.nbytes * (tile.stop - tile.start) // rows


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes.

    Linux keeps it for the program alone; ru_maxrss would also count what started it.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
