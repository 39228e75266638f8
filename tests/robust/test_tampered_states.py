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

from compress.calibrate.writer import StatisticsWriter

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
