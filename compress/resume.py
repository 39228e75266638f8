"""What an interrupted run leaves for `--resume`: its finished shards, re-hashed before reuse."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from compress import __version__
from compress.checkpoint.files import is_plain_name, open_inside
from compress.checkpoint.manifest import FileRecord, read_record, record_of
from compress.checkpoint.stage import Stage
from compress.errors import InputError, ResourceError
from compress.plan import Plan
from compress.spills import spill_name

STATE = ".resume.json"
_MAX_STATE = 1 << 30
_NUMBER, _NOTHING = (int, float), type(None)
# The fields of a row of the report (`compress.report.row`): what each may hold.
_ROW: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "role", "dtype"), (str,)),
    **dict.fromkeys(("shape", "passes"), (list,)),
    **dict.fromkeys(("changed", "estimated"), (bool,)),
    **dict.fromkeys(("cast", "plain"), (str, _NOTHING)),
    **dict.fromkeys(("bits", "group_size"), (int, _NOTHING)),
    **dict.fromkeys(("rank", "outliers", "bytes_before", "bytes_after"), (int,)),
    **dict.fromkeys(("bits_per_weight", "sparsity", "relative_error", "seconds"), _NUMBER),
    **dict.fromkeys(("cast_relative_error", "squared_error", "squared_norm"), _NUMBER),
    **dict.fromkeys(
        ("plain_relative_error", "output_error", "plain_output_error"), (*_NUMBER, _NOTHING)
    ),
    "extra": (dict,),
}


@dataclass(frozen=True)
class Finished:
    """A written shard: its file, its shares of the side files, its rows of the report."""

    number: int
    record: FileRecord
    shares: Mapping[str, FileRecord]
    rows: Sequence[dict[str, Any]]


class State:
    """The finished shards of a run by name, on disk in the stage after each one."""

    def __init__(self, stage: Stage) -> None:
        self.shards: dict[str, Finished] = {}
        self._stage = stage

    def add(self, name: str, finished: Finished) -> None:
        """Record a finished shard; written atomically."""
        self.shards[name] = finished
        body = json.dumps({name: _spell(one) for name, one in self.shards.items()}).encode()
        # A digest before the content: what passes it is what was written here, NaN included.
        self._stage.write_own(STATE, sha256(body).hexdigest().encode() + b"\n" + body)

    def take(
        self, name: str, number: int, tensors: Sequence[str], parts: Set[str]
    ) -> Finished | None:
        """A shard that was finished; None, and nothing left of it, where there is none.

        number, tensors, parts  what the plan says of it: a state of other ones is not of this run
        """
        finished = self.shards.get(name)
        if finished is None:
            return None
        rows = [row["name"] for row in finished.rows]
        if finished.number == number and rows == list(tensors) and finished.shares.keys() <= parts:
            return finished
        for path in files_of(self._stage, name, finished):  # links too: they would be written to
            (self._stage.folder / path).unlink(missing_ok=True)
        del self.shards[name]
        return None

    @staticmethod
    def is_in(stage: Stage) -> bool:
        """Whether `stage` holds anything worth keeping."""
        return os.path.lexists(stage.folder / STATE)


def resume(stage: Stage) -> State:
    """What is intact in a stage that was left; everything else in it is removed.

    A shard counts only if it and its spilled shares hash to what was recorded. Anything odd in
    the state means to start afresh.
    """
    state = State(stage)
    kept: set[str] = set()
    for name, finished in _read(stage.folder).items():
        files = files_of(stage, name, finished)
        if all(_intact(stage.folder, path, record) for path, record in files.items()):
            state.shards[name] = finished
            kept |= files.keys()
    stage.keep_only(kept | {STATE} if kept else kept)
    return state


def files_of(stage: Stage, name: str, finished: Finished) -> dict[str, FileRecord]:
    """The files of a finished shard, relative to the stage: itself and its shares."""
    shares = {spill_name(p, finished.number): r for p, r in finished.shares.items()}
    return {f"{stage.path.name}/{name}": finished.record} | shares


def resume_key(plan: Plan) -> str:
    """What must be equal for a resumed run to give the same bytes."""
    what = {
        "source": plan.checkpoint.fingerprint(),
        "recipe": plan.recipe.resolved(),
        "format": plan.format.name,
        "untouched": plan.options.untouched,
        "shard_bytes": plan.options.max_shard_bytes,
        "version": __version__,
    }
    if plan.statistics is not None:
        what["statistics"] = plan.statistics.record.to_json()
    return sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _spell(finished: Finished) -> dict[str, Any]:
    def spell(record: FileRecord) -> dict[str, Any]:
        return {"bytes": record.nbytes, "sha256": record.sha256}

    return {
        "number": finished.number,
        "record": spell(finished.record),
        "shares": {part: spell(record) for part, record in finished.shares.items()},
        "rows": list(finished.rows),
    }


def _read(folder: Path) -> dict[str, Finished]:
    """The recorded shards; none where the state is missing, damaged or not as we write it."""
    try:
        file = open_inside(os.path.realpath(folder), STATE)
        try:
            digest, _, body = file.read_all(_MAX_STATE).partition(b"\n")
        finally:
            file.close()
        if digest != sha256(body).hexdigest().encode():
            return {}
        shards = json.loads(body)
    except (InputError, ResourceError, ValueError, RecursionError):
        return {}
    if not isinstance(shards, dict):
        return {}
    found = {name: _parse(one) for name, one in shards.items() if is_plain_name(name)}
    return {name: one for name, one in found.items() if one is not None}


def _parse(body: Any) -> Finished | None:
    if not isinstance(body, dict):
        return None
    number, rows, shares = body.get("number"), body.get("rows"), body.get("shares")
    record = read_record(body.get("record"))
    if type(number) is not int or record is None or not isinstance(shares, dict):
        return None
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        return None
    parts: dict[str, FileRecord] = {}
    for part, spelled in shares.items():
        share = read_record(spelled)
        if share is None or not is_plain_name(part):
            return None
        parts[part] = share
    return Finished(number, record, parts, rows)


def _is_row(row: Any) -> bool:
    """Whether it is a row of a report as `compress.report.row` makes them."""
    return (
        isinstance(row, dict)
        and row.keys() == _ROW.keys()
        and all(type(row[key]) in kinds for key, kinds in _ROW.items())
        and all(type(size) is int for size in row["shape"])
        and all(isinstance(one, str) for one in row["passes"])
        and all(type(value) in _NUMBER for value in row["extra"].values())
    )


def _intact(folder: Path, relative: str, record: FileRecord) -> bool:
    try:
        return record_of(folder, relative) == record
    except (InputError, ResourceError):
        return False
