"""Stages that were left and tampered with: `--resume` starts afresh, and touches no other file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toolbox import tiny_llama, tree

from compress import resume
from compress.calibrate.writer import StatisticsWriter
from compress.checkpoint import open_checkpoint
from compress.errors import Interrupted
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass
from compress.run import RunOptions, run

ROOM = 4096
PRECIOUS = b"precious data of somebody else, long enough to be cut"


def writing(folder: Path, *, resume: bool) -> StatisticsWriter:
    return StatisticsWriter(folder / "s", room=ROOM, key="k", resume=resume, fsync=False)


def leave(writer: StatisticsWriter) -> None:
    """As an interruption does."""
    writer.__exit__(KeyboardInterrupt, None, None)


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """What a calibration of one step left: an array, and a file of the engine's own."""
    writer = writing(tmp_path, resume=False)
    writer.add_tensor("w", "output_fisher", np.ones(4, np.float32))
    (writer.folder / "hidden.1").write_bytes(b"states")
    writer.commit("block 0", ["hidden.1"])
    leave(writer)
    (tmp_path / "victim").write_bytes(PRECIOUS)
    return tmp_path / "s.partial"


def steps_found(stage: Path) -> tuple[str, ...]:
    writer = writing(stage.parent, resume=True)
    steps = writer.steps
    if not steps:
        assert (stage / "out" / "s").stat().st_size == ROOM
        assert not (stage / "hidden.1").exists()
    leave(writer)
    return steps


def test_what_was_left_is_taken_up(stage: Path) -> None:
    assert steps_found(stage) == ("block 0",)


def _hard(place: Path, victim: Path) -> None:
    os.link(victim, place)


def _symbolic(place: Path, victim: Path) -> None:
    place.symlink_to(victim)


def _pipe(place: Path, _: Path) -> None:
    os.mkfifo(place)


@pytest.mark.parametrize("name", ["out/s", "hidden.1"])
@pytest.mark.parametrize("link", [_hard, _symbolic, _pipe])
def test_a_link_in_the_stage_is_not_written_through(
    stage: Path, name: str, link: Callable[[Path, Path], None]
) -> None:
    """The bytes behind the link are the right ones: only being a link is wrong."""
    victim = stage.parent / "victim"
    content = (stage / name).read_bytes() + PRECIOUS
    victim.write_bytes(content if name == "out/s" else (stage / name).read_bytes())
    before = victim.read_bytes()
    (stage / name).unlink()
    link(stage / name, victim)
    assert steps_found(stage) == ()
    assert victim.read_bytes() == before


def test_a_folder_that_is_a_link_is_not_written_into(stage: Path) -> None:
    elsewhere = stage.parent / "elsewhere"
    (stage / "out").rename(elsewhere)
    (stage / "out").symlink_to(elsewhere)
    with open(elsewhere / "s", "ab") as file:
        file.write(PRECIOUS)
    before = (elsewhere / "s").read_bytes()
    assert steps_found(stage) == ()
    assert (elsewhere / "s").read_bytes() == before


ODD_STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "empty": lambda _: {},
    "a list": lambda _: [],
    "a number": lambda _: 1,
    "another key": lambda s: s | {"x": 1},
    "a key less": lambda s: {k: v for k, v in s.items() if k != "steps"},
    "no steps": lambda s: s | {"steps": []},
    "steps as text": lambda s: s | {"steps": "block 0"},
    "steps that are none": lambda s: s | {"steps": [1]},
    "end as text": lambda s: s | {"end": "x"},
    "end below zero": lambda s: s | {"end": -5000},
    "end beyond": lambda s: s | {"end": 1 << 70},
    "end as float": lambda s: s | {"end": 16.0},
    "no digest": lambda s: s | {"sha256": None},
    "kept as list": lambda s: s | {"kept": [1]},
    "kept without digest": lambda s: s | {"kept": {"hidden.1": 1}},
    "kept above": lambda s: s | {"kept": {"../victim": hashlib.sha256(PRECIOUS).hexdigest()}},
    "kept deeper": lambda s: s | {"kept": {"out/s": s["sha256"]}},
    "kept with a null": lambda s: s | {"kept": {"a\0b": "0"}},
    "kept with a dot": lambda s: s | {"kept": {"..": "0"}},
    "a shape as text": lambda s: s | {"specs": [["a", "F32", "4"]]},
    "a shape below zero": lambda s: s | {"specs": [["a", "F32", [-2, -2]]]},
    "another type": lambda s: s | {"specs": [["a", "F64", [2]]]},
    "a spec of two": lambda s: s | {"specs": [["a", "F32"]]},
    "an array twice": lambda s: s | {"specs": [["a", "F32", [2]], ["a", "F32", [2]]]},
    "a site of two": lambda s: s | {"sites": [[0, ["w"]]]},
    "a site without tensors": lambda s: s | {"sites": [[0, [], 1, 0, 1]]},
    "a site of another number": lambda s: s | {"sites": [[7, ["w"], 1, 0, 1]]},
    "blocks below one": lambda s: s | {"sites": [[0, ["w"], 1, 0, 0]]},
}


@pytest.mark.parametrize("odd", ODD_STATES)
def test_a_state_of_another_shape_starts_afresh(stage: Path, odd: str) -> None:
    """Its digest is right: whoever wrote it knew how."""
    file = stage / ".calibration.json"
    _, _, body = file.read_bytes().partition(b"\n")
    forged = json.dumps(ODD_STATES[odd](json.loads(body))).encode()
    file.write_bytes(hashlib.sha256(forged).hexdigest().encode() + b"\n" + forged)
    assert steps_found(stage) == ()
    assert (stage.parent / "victim").read_bytes() == PRECIOUS


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000], ids=["cut", "no text", "deep"])
def test_a_state_that_is_no_json_starts_afresh(stage: Path, body: bytes) -> None:
    content = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    (stage / ".calibration.json").write_bytes(content)
    assert steps_found(stage) == ()


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    return tiny_llama(folder / "m", hidden=64, ffn=128, layers=1, vocabulary=64)


def compressed(model: Path, out: Path, *, again: bool) -> None:
    recipe = Recipe(passes=(parse_pass("quantize:bits=4,group=32"), parse_pass("low-rank:rank=2")))
    with open_checkpoint(model) as checkpoint:
        plan = make_plan(checkpoint, recipe, Options(jobs=1, max_shard_bytes=20_000))
        run(plan, out, RunOptions(fsync=False, resume=again))


@pytest.fixture(scope="module")
def whole(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("whole") / "out"
    compressed(sharded, out, again=False)
    return tree(out)


def interrupted(model: Path, out: Path) -> Path:
    """The stage of a run that was interrupted behind its first shard."""
    add = resume.State.add

    def cut(self: resume.State, name: str, finished: resume.Finished) -> None:
        add(self, name, finished)
        raise Interrupted(2)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(resume.State, "add", cut)
        compressed(model, out, again=False)
    return out.with_name("out.partial")


@pytest.fixture
def run_stage(sharded: Path, tmp_path: Path) -> Path:
    return interrupted(sharded, tmp_path / "out")


def _row(**changed: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda one: one | {"rows": [one["rows"][0] | changed, *one["rows"][1:]]}


ODD_SHARDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "untouched": lambda one: one,
    "empty rows": lambda one: one | {"rows": [{}]},
    "no rows": lambda one: one | {"rows": []},
    "rows of text": lambda one: one | {"rows": [dict.fromkeys(one["rows"][0], "\x1b[31m")]},
    "a row of another tensor": _row(name="elsewhere"),
    "a row of another key": _row(another=1),
    "an error as text": _row(squared_error="0"),
    "a shape of texts": _row(shape=["64"]),
    "no passes": _row(passes=None),
    "a flag for a number": _row(rank=True),
    "another number": lambda one: one | {"number": 3, "shares": {}},
    "another share": lambda one: one | {"shares": {"zz": one["record"]}},
    "a share above": lambda one: one | {"shares": {"..": one["record"]}},
    "no record": lambda one: one | {"record": {}},
}


def forge(folder: Path, odd: str) -> str:
    """Change the first shard of the state, with a right digest; its name."""
    file = folder / ".resume.json"
    _, _, body = file.read_bytes().partition(b"\n")
    (name, shard), *_ = json.loads(body).items()
    forged = json.dumps({name: ODD_SHARDS[odd](shard), f"{name}\0": shard}).encode()
    file.write_bytes(hashlib.sha256(forged).hexdigest().encode() + b"\n" + forged)
    return str(name)


# What only the plan can tell to be odd, one that the state shows itself, and none.
WHOLE_RUNS = (
    "untouched",
    "no rows",
    "a row of another tensor",
    "another number",
    "another share",
    "empty rows",
)


@pytest.mark.parametrize("odd", WHOLE_RUNS)
def test_a_shard_of_another_shape_is_made_afresh(
    sharded: Path, whole: Any, run_stage: Path, odd: str
) -> None:
    """A link in the shard's place is not written through."""
    name = forge(run_stage, odd)
    victim = run_stage.parent / "victim"
    os.link(run_stage / "out" / name, victim)
    before, inode = victim.read_bytes(), victim.stat().st_ino
    compressed(sharded, run_stage.parent / "out", again=True)
    assert tree(run_stage.parent / "out") == whole
    assert victim.read_bytes() == before
    kept = (run_stage.parent / "out" / name).stat().st_ino == inode
    assert kept == (odd == "untouched")


@pytest.fixture(scope="module")
def state_of_a_run(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("state")
    return (interrupted(sharded, folder / "out") / ".resume.json").read_bytes()


@pytest.mark.parametrize("odd", [*sorted({*ODD_SHARDS} - {*WHOLE_RUNS}), "untouched"])
def test_a_state_of_odd_rows_is_not_read(state_of_a_run: bytes, tmp_path: Path, odd: str) -> None:
    (tmp_path / ".resume.json").write_bytes(state_of_a_run)
    name = forge(tmp_path, odd)
    found = resume._read(tmp_path)
    assert set(found) == ({name} if odd == "untouched" else set())
