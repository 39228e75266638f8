"""What an interrupted run leaves for `--resume`: its finished shards, re-hashed before reuse."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from compress import __version__
from compress.checkpoint.files import open_inside
from compress.checkpoint.manifest import FileRecord, read_record, record_of
from compress.checkpoint.stage import Stage
from compress.errors import InputError, ResourceError
from compress.plan import Plan
from compress.spills import spill_name

STATE = ".resume.json"
_MAX_STATE = 1 << 30


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
        files = {f"{stage.path.name}/{name}": finished.record}
        files |= {spill_name(p, finished.number): r for p, r in finished.shares.items()}
        if all(_intact(stage.folder, path, record) for path, record in files.items()):
            state.shards[name] = finished
            kept |= files.keys()
    stage.keep_only(kept | {STATE} if kept else kept)
    return state


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
    found = {name: _parse(one) for name, one in shards.items() if "/" not in name}
    return {name: one for name, one in found.items() if one is not None}


def _parse(body: Any) -> Finished | None:
    if not isinstance(body, dict):
        return None
    number, rows, shares = body.get("number"), body.get("rows"), body.get("shares")
    record = read_record(body.get("record"))
    if type(number) is not int or record is None or not isinstance(shares, dict):
        return None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return None
    parts: dict[str, FileRecord] = {}
    for part, spelled in shares.items():
        share = read_record(spelled)
        if share is None or "/" in part:
            return None
        parts[part] = share
    return Finished(number, record, parts, rows)


def _intact(folder: Path, relative: str, record: FileRecord) -> bool:
    try:
        return record_of(folder, relative) == record
    except (InputError, ResourceError):
        return False
