"""The main job: surveys, then the write sweep into a stage, the gates, and one final rename."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from compress import __version__, report, survey
from compress.checkpoint import manifest
from compress.checkpoint.writer import FileRecord, SafetensorsWriter, Stage
from compress.errors import GateError, Interrupted, UsageError, from_os_error, show
from compress.formats.base import MODEL
from compress.layout import Layout, WeightFile, specs_of
from compress.parallel import map_tiles
from compress.plan import Plan
from compress.recipe import Gate
from compress.report import Report
from compress.tiles import TensorPlan, Tile, cut
from compress.work import Packed, Sums, work_on

Progress = Callable[[str, int, int], None]
_STATE = ".resume.json"
_PARTS = ".parts"


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


def run(plan: Plan, out: Path, options: RunOptions, progress: Progress = silent) -> Report:
    """Compress the plan's checkpoint into the directory `out`.

    Raises UsageError (OUT exists, another plan to resume), GateError, ResourceError, BusyError,
    InputError. On any of them OUT is as it was before.
    """
    started = time.perf_counter()
    _refuse_inside_source(plan, out)
    plan.check_disk(out)
    plan.check_memory()
    stage = Stage(out, overwrite=options.overwrite, resume=options.resume, fsync=options.fsync)
    try:
        state = _State.load(stage.path, _resume_key(plan))
    except UsageError:
        stage.release()  # another plan's stage is not ours to remove
        raise
    try:
        result = _fill(plan, stage, state, options, progress, started)
        stage.publish()
        return result
    except (Interrupted, KeyboardInterrupt):
        if (stage.path / _STATE).exists():
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
    state: _State,
    options: RunOptions,
    progress: Progress,
    started: float,
) -> Report:
    """Everything between taking the stage and publishing it."""
    plan = survey.decide_all(plan, progress)
    layout = plan.layout()
    files, rows = _write_shards(plan, layout, stage, state, progress)
    for part in layout.parts:
        files[part.name] = _assemble(part, layout, stage)
    plan.checkpoint.check_unchanged()
    for name, content in layout.small.items():
        files[name] = stage.write_file(name, content)
    folder = plan.checkpoint.directory or plan.checkpoint.path
    for name in layout.copies:
        files[name] = stage.copy_file(name, folder / name)
    shutil.rmtree(stage.path / _PARTS, ignore_errors=True)
    (stage.path / _STATE).unlink(missing_ok=True)
    seconds = time.perf_counter() - started
    result = report.build(plan, layout, rows, seconds=seconds, peak_memory=peak_memory())
    _check_gates(result, options)
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
    )
    stage.write_file(manifest.NAME, body)
    return result


def _check_gates(result: Report, options: RunOptions) -> None:
    """Write the report where asked; on a failed gate raise, so that nothing is published."""
    if options.report_file is not None:
        try:
            options.report_file.write_bytes(result.to_json())
        except OSError as error:
            raise from_os_error(error, doing="cannot write the report") from error
    if failed := result.failed(options.gates):
        raise GateError("; ".join(failed), hint="nothing was published")


def _write_shards(
    plan: Plan, layout: Layout, stage: Stage, state: _State, progress: Progress
) -> tuple[dict[str, FileRecord], list[dict[str, Any]]]:
    files: dict[str, FileRecord] = {}
    rows: list[dict[str, Any]] = []
    total = sum(t.info.nbytes for t in plan.tensors)
    done = 0
    for number, shard in enumerate(layout.shards):
        finished = state.shards.get(shard.name)
        if finished is None:
            before = done

            def show_bytes(own: int, before: int = before) -> None:
                progress("write", before + own, total)

            record, own_rows = _write_shard(plan, shard, number, stage, show_bytes)
            if len(layout.shards) > 1:
                state.add(stage, shard.name, record, own_rows)
        else:
            record, own_rows = finished
        files[shard.name] = record
        rows += own_rows
        done += sum(t.info.nbytes for t in shard.tensors)
        progress("write", done, total)
    return files, rows


def _write_shard(
    plan: Plan, shard: WeightFile, number: int, stage: Stage, progress: Callable[[int], None]
) -> tuple[FileRecord, list[dict[str, Any]]]:
    """Stream one shard; arrays for the side files are spilled beside it."""
    writer = SafetensorsWriter(stage, shard.name, shard.header_specs, shard.metadata)
    spill = _Spill(stage.path / _PARTS, number)
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
        record = writer.finish()
        spill.close(stage)
    finally:
        writer.close()
        spill.abort()
    return record, rows


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
            return
        for key, array in packed.arrays.items():
            if key == (MODEL, self._first):
                writer.write(_bytes_of(array))
            else:
                self._waiting[key].append(array)

    def finish(self, writer: SafetensorsWriter, spill: _Spill) -> list[dict[str, Any]]:
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


class _Spill:
    """Raw bytes for the side files (adapter, super weights), one small file a shard and part."""

    def __init__(self, folder: Path, shard: int) -> None:
        self._folder, self._shard = folder, shard
        self._open: dict[str, Any] = {}

    def write(self, part: str, data: Any) -> None:
        if part not in self._open:
            self._folder.mkdir(exist_ok=True)
            self._open[part] = open(spill_path(self._folder, part, self._shard), "wb")  # noqa: SIM115
        self._open[part].write(data)

    def close(self, stage: Stage) -> None:
        for file in self._open.values():
            file.flush()
            stage.sync(file.fileno())
            file.close()
        self._open = {}

    def abort(self) -> None:
        for file in self._open.values():
            file.close()


def spill_path(folder: Path, part: str, shard: int) -> Path:
    """Where the bytes of a side file wait that one shard's tensors gave."""
    return folder / f"{part}.{shard}"


def _assemble(part: WeightFile, layout: Layout, stage: Stage) -> FileRecord:
    """Join what the shards spilled into one safetensors file."""
    writer = SafetensorsWriter(stage, part.name, part.header_specs, part.metadata)
    try:
        for number in range(len(layout.shards)):
            path = spill_path(stage.path / _PARTS, part.part, number)
            if path.exists():
                with path.open("rb") as file:
                    while chunk := file.read(8 << 20):
                        writer.write(chunk)
        return writer.finish()
    finally:
        writer.close()


@dataclass
class _State:
    """The finished shards of an interrupted run, kept in the stage."""

    shards: dict[str, tuple[FileRecord, list[dict[str, Any]]]]
    key: str

    @classmethod
    def load(cls, folder: Path, key: str) -> _State:
        """Finished shards whose bytes are still what was written; another plan is refused."""
        try:
            body = json.loads((folder / _STATE).read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            return cls({}, key)
        if body.get("key") != key:
            raise UsageError(
                f"{show(str(folder))} was begun with another model, recipe or version",
                hint="run without --resume to start afresh",
            )
        shards = {}
        for name, kept in body["shards"].items():
            record = FileRecord(**kept["record"])
            path = folder / name
            intact = path.is_file() and path.stat().st_size == record.nbytes
            if intact and manifest.hash_file(path) == record.sha256:
                shards[name] = (record, kept["rows"])
        return cls(shards, key)

    def add(self, stage: Stage, name: str, record: FileRecord, rows: list[dict[str, Any]]) -> None:
        """Record a finished shard; written atomically."""
        self.shards[name] = (record, rows)
        body: Mapping[str, Any] = {
            "key": self.key,
            "shards": {n: {"record": asdict(r), "rows": w} for n, (r, w) in self.shards.items()},
        }
        stage.write_file(_STATE, json.dumps(body).encode())


def _resume_key(plan: Plan) -> str:
    """What must be equal for a resumed run to give the same bytes."""
    what = {
        "source": plan.checkpoint.fingerprint(),
        "recipe": plan.recipe.resolved(),
        "format": plan.format.name,
        "untouched": plan.options.untouched,
        "shard_bytes": plan.options.max_shard_bytes,
        "version": __version__,
    }
    return sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _refuse_inside_source(plan: Plan, out: Path) -> None:
    source = Path(os.path.realpath(plan.checkpoint.path))
    target = Path(os.path.realpath(out))
    if target == source or source in target.parents or target in source.parents:
        raise UsageError(
            f"output {show(str(out))} and model {show(str(plan.checkpoint.path))} overlap",
            hint="choose an output directory outside the model's",
        )


def _bytes_of(array: Any) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _source_bytes(tile: Tile) -> int:
    if tile.raw:
        return tile.stop - tile.start
    info = tile.tensor.info
    rows = max(1, info.matrix_shape[0])
    return info.nbytes * (tile.stop - tile.start) // rows


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
