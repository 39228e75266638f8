"""Faults at every step of writing: OUT is what it was or the complete result, never a mixture."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from faults import CODES, Faults
from toolbox import tiny_llama, tool, tool_json, tree, write_safetensors

import compress.run as run_module
from compress import interrupts, resume, unpacking, verification
from compress.checkpoint import (
    Checkpoint,
    destination,
    manifest,
    open_checkpoint,
    renames,
    stage,
)
from compress.checkpoint.small_files import write_whole
from compress.checkpoint.stage import MARKER, Stage
from compress.errors import (
    BusyError,
    InputError,
    Interrupted,
    ResourceError,
    UsageError,
    VerifyError,
)
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass
from compress.run import RunOptions, run

OLD = "quantize:bits=8,group=-1"
NEW = "quantize:bits=4,group=32"
FACTORS = "low-rank:rank=2"
SHARD = 20_000  # bytes: makes four shards of the model called `sharded`


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model", hidden=32, ffn=32, layers=1, vocabulary=32)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "big", hidden=64, ffn=128, layers=3, vocabulary=64)


def compress(model: Path, out: Path, *words: str, shard: int = 5 * 10**9, **options: Any) -> None:
    """A run in this process."""
    recipe = Recipe(passes=tuple(parse_pass(word) for word in words))
    with open_checkpoint(model) as checkpoint:
        plan = make_plan(checkpoint, recipe, Options(jobs=1, max_shard_bytes=shard))
        run(plan, out, RunOptions(**options))


def litter(folder: Path) -> list[str]:
    """Stages and locks that a run left."""
    return sorted(p.name for p in folder.iterdir() if p.name.endswith((".partial", ".lock")))


def resumable(model: Path, out: Path, *words: str) -> Path:
    """The stage of a run that was cut off when its second shard was done."""
    add = resume.State.add
    count = 0

    def cut(self: resume.State, name: str, finished: resume.Finished) -> None:
        nonlocal count
        add(self, name, finished)
        count += 1
        if count == 2:
            raise Interrupted(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(resume.State, "add", cut)
        compress(model, out, *words, shard=SHARD)
    return out.with_name(out.name + ".partial")


def replace(out: Path, content: bytes, *, overwrite: bool = True, fsync: bool = False) -> None:
    """A tiny run: three files staged, and published in place of what is there."""
    one = Stage(out, overwrite=overwrite, fsync=fsync)
    try:
        one.open(key="k")
        records = {n: one.write_file(n, content) for n in ("a", "b", "adapter/c")}
        body = manifest.build(records, source={}, recipe={}, format_name="dense", run={})
        one.write_file(manifest.NAME, body)
        one.publish()
    except BaseException:
        one.abandon()
        raise


# -- whose stage it is -----------------------------------------------------------------------


def test_a_source_where_the_stage_would_be_is_refused(tmp_path: Path, model: Path) -> None:
    source = model.rename(tmp_path / "m.partial")
    before = tree(source)
    done = tool("run", source, "-o", tmp_path / "m", NEW)
    assert done.returncode == 2
    assert "overlap" in done.stderr
    assert tree(source) == before
    assert litter(tmp_path) == ["m.partial"]


@pytest.mark.parametrize("flags", [[], ["--resume"]])
@pytest.mark.parametrize(
    "kind", ["folder", "file", "symlink", "foreign marker", "another name", "other output"]
)
def test_what_no_run_made_is_not_touched(
    tmp_path: Path, model: Path, kind: str, flags: list[str]
) -> None:
    folder, elsewhere = tmp_path / "m.partial", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("precious")
    if kind == "symlink":
        marker = {"tool": manifest.TOOL, "out": "m", "key": ""}
        (elsewhere / MARKER).write_text(json.dumps(marker))
        folder.symlink_to(elsewhere)
    elif kind == "file":
        folder.write_text("precious")
    else:
        elsewhere.rename(folder)
        if kind == "foreign marker":
            (folder / MARKER).write_text(json.dumps({"tool": "other", "out": "m"}))
        if kind == "another name":
            (folder / MARKER).write_text(json.dumps({"tool": manifest.TOOL, "out": "n"}))
        if kind == "other output":
            (folder / "mine.txt").unlink()
            folder.rmdir()
            compress(model, folder, OLD)
    before = tree(tmp_path)
    done = tool("run", model, "-o", tmp_path / "m", NEW, *flags)
    assert done.returncode == 2
    assert "in the way" in done.stderr and "hint: " in done.stderr
    assert tree(tmp_path) == before
    assert not (tmp_path / "m").exists() and not (tmp_path / ".m.lock").exists()


@pytest.mark.parametrize("content", [None, "", "torn"])
def test_a_stage_that_was_killed_at_birth_is_taken_over(
    tmp_path: Path, model: Path, content: str | None
) -> None:
    folder = tmp_path / "m.partial"
    folder.mkdir()
    if content is not None:
        (folder / f"{MARKER}.tmp").write_text(content)
    compress(model, tmp_path / "m", NEW, resume=True)
    assert litter(tmp_path) == []


def test_unpack_refuses_to_write_into_its_source(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    compress(model, out, NEW)
    before = tree(tmp_path)
    for target in (out / "dense", out, tmp_path):
        assert tool("unpack", out, "-o", target, "--overwrite").returncode == 2
    staged = out.rename(tmp_path / "m.partial")
    assert tool("unpack", staged, "-o", tmp_path / "m").returncode == 2
    staged.rename(out)
    assert tree(tmp_path) == before


# -- resume ----------------------------------------------------------------------------------


def test_resume_keeps_only_what_it_verified(tmp_path: Path, sharded: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    compress(sharded, whole, NEW, FACTORS, shard=SHARD)
    folder = resumable(sharded, out, NEW, FACTORS)
    finished = sorted((folder / "out").glob("*.safetensors"))
    assert len(finished) == 2
    kept = finished[0].stat().st_ino
    finished[1].write_bytes(finished[1].read_bytes()[:-1] + b"?")
    (folder / "stray").write_text("")
    (folder / "out" / "stray.json").write_text("")
    (folder / "out" / "folder").mkdir()
    (folder / "out" / "folder" / "stray").symlink_to(sharded)
    compress(sharded, out, NEW, FACTORS, shard=SHARD, resume=True)
    assert tree(out) == tree(whole)
    assert (out / finished[0].name).stat().st_ino == kept
    assert litter(tmp_path) == []
    assert tool("verify", out).returncode == 0


def test_resume_without_a_finished_shard_starts_afresh(tmp_path: Path, sharded: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    compress(sharded, whole, NEW, shard=SHARD)
    folder = resumable(sharded, out, NEW)
    (folder / resume.STATE).unlink()
    (folder / "out" / "stray.json").write_text("")
    with pytest.raises(UsageError, match="another model, recipe or version"):
        compress(sharded, out, OLD, shard=SHARD, resume=True)
    compress(sharded, out, NEW, shard=SHARD, resume=True)
    assert tree(out) == tree(whole)


@pytest.mark.parametrize("damage", ["flip", "missing", "link"])
def test_resume_hashes_what_shards_gave_to_side_files(
    tmp_path: Path, sharded: Path, damage: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    compress(sharded, whole, NEW, FACTORS, shard=SHARD)
    folder = resumable(sharded, out, NEW, FACTORS)
    spilled = sorted((folder / ".parts").iterdir())
    assert len(spilled) == 2
    content = bytearray(spilled[0].read_bytes())
    content[5] ^= 1
    spilled[0].unlink()
    if damage == "flip":
        spilled[0].write_bytes(content)
    elif damage == "link":
        (folder / ".parts").rename(tmp_path / "elsewhere")
        (folder / ".parts").symlink_to(tmp_path / "elsewhere")
    compress(sharded, out, NEW, FACTORS, shard=SHARD, resume=True)
    assert tree(out) == tree(whole)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff\xfe", b"{", b'{"key": 1, "shards": {"a": 1}}', "forged"]
)
def test_a_damaged_state_starts_afresh(tmp_path: Path, sharded: Path, content: bytes | str) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    compress(sharded, whole, NEW, shard=SHARD)
    folder = resumable(sharded, out, NEW)
    if isinstance(content, str):
        body = json.dumps({"../../big/config.json": 1, "a": {"record": []}, "b": []}).encode()
        content = sha256(body).hexdigest().encode() + b"\n" + body
    (folder / resume.STATE).write_bytes(content)
    compress(sharded, out, NEW, shard=SHARD, resume=True)
    assert tree(out) == tree(whole)
    assert litter(tmp_path) == []


def test_a_state_that_cannot_be_loaded_leaves_no_lock(
    tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    resumable(sharded, out, NEW)

    def fail(folder: Path) -> dict[str, resume.Finished]:
        raise MemoryError

    monkeypatch.setattr(resume, "_read", fail)
    with pytest.raises(MemoryError):
        compress(sharded, out, NEW, shard=SHARD, resume=True)
    assert litter(tmp_path) == []


# -- publishing ------------------------------------------------------------------------------


def appearing(out: Path, make: Callable[[Path], object]) -> Callable[[str, int, int], None]:
    """A progress callback under which OUT comes to exist in the middle of a run."""

    def progress(what: str, done: int, total: int) -> None:
        if what == "write" and not out.exists():
            make(out)

    return progress


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("native", [True, False], ids=["renameat2", "renames"])
def test_an_output_that_appeared_meanwhile_is_not_replaced(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, native: bool
) -> None:
    if not native:
        monkeypatch.setattr(renames, "_renameat2", lambda *_: False)
    out = tmp_path / "out"

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "mine.txt").write_text("precious")

    recipe = Recipe(passes=(parse_pass(NEW),))
    with open_checkpoint(model) as checkpoint, pytest.raises(UsageError, match="output"):
        plan = make_plan(checkpoint, recipe, Options())
        run(plan, out, RunOptions(overwrite=overwrite), appearing(out, make))
    assert os.listdir(out) == ["mine.txt"]
    assert litter(tmp_path) == []


@pytest.mark.parametrize("native", [True, False], ids=["renameat2", "renames"])
def test_a_name_taken_at_the_last_moment_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    if not native:
        monkeypatch.setattr(renames, "_renameat2", lambda *_: False)
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir(), target.mkdir()
    with pytest.raises(FileExistsError):
        renames.rename_new(source, target)
    assert source.exists()


def test_overwrite_looks_into_the_old_output(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    compress(model, out, OLD)
    whole = (out / manifest.NAME).read_text()
    (out / "notes.txt").write_text("mine")
    done = tool("run", model, "-o", out, NEW, "--overwrite")
    assert done.returncode == 2
    assert "notes.txt" in done.stderr
    (out / "notes.txt").unlink()
    for text in ("{}", "[]", "", "{", whole.replace(manifest.TOOL, "webpack"), "\0", "[" * 99999):
        (out / manifest.NAME).write_text(text)
        with pytest.raises(UsageError, match="not written by this tool"):
            compress(model, out, NEW, overwrite=True)
        assert (out / "model.safetensors").exists()
    (out / manifest.NAME).write_text(whole)
    compress(model, out, NEW, overwrite=True)


def test_an_exchange_by_renames_that_was_cut_off_is_put_back(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compress(model, out, OLD)
    old = tree(out)
    process = Stage(out, overwrite=True)
    process.open(key="k")
    os.rename(out, process.folder / "old")  # killed between the two renames
    process._lock.path.unlink()
    os.close(process._lock.descriptor)
    with pytest.raises(UsageError, match="exists"):
        compress(model, out, NEW)
    assert tree(out) == old
    monkeypatch.setattr(renames, "_renameat2", lambda *_: False)
    compress(model, out, NEW, overwrite=True)
    assert tree(out) != old
    assert litter(tmp_path) == []


def test_trouble_after_the_rename_is_no_failure(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compress(model, out, OLD)
    old = tree(out)

    prune, calls = stage._prune, []

    def fail_later(folder: Path, prefix: str, kept: Any) -> None:
        calls.append(folder)
        if len(calls) > 1:
            raise PermissionError(errno.EACCES, "no")
        prune(folder, prefix, kept)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_prune", fail_later)
        compress(model, out, NEW, overwrite=True)
    assert len(calls) == 2
    assert tree(out) != old
    assert tool("verify", out).returncode == 0
    compress(model, out, OLD, overwrite=True)
    assert tree(out) == old
    assert litter(tmp_path) == []


# -- faults at the Nth operation of the commit; of commands: robust/test_faults.py -------------


@pytest.mark.parametrize("native", [True, False], ids=["renameat2", "renames"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
def test_a_fault_at_every_operation_of_the_commit(
    tmp_path: Path, native: bool, overwrite: bool, for_good: bool
) -> None:
    out, spare = tmp_path / "out", tmp_path / "spare"
    replace(spare, b"new")
    new = tree(spare)
    replace(spare, b"old")
    old = tree(spare) if overwrite else {}
    outcomes = set()
    for due in range(1, 1000):
        if out.exists():
            shutil.rmtree(out)
        if overwrite:
            shutil.copytree(spare, out)
        faults = Faults(CODES[due % len(CODES)], due, for_good=for_good)
        with pytest.MonkeyPatch.context() as patch:
            faults.install(patch, native=native)
            try:
                replace(out, b"new", fsync=True)
            except (ResourceError, OSError) as error:
                said = str(error)
            else:
                break
        now = tree(out) if out.exists() else {}
        if for_good and overwrite and not native and not now:
            # Neither the renames nor their way back worked: the old output waits in the stage.
            assert litter(tmp_path) == ["out.partial"]
            with pytest.raises(UsageError, match="exists"):
                replace(out, b"new", overwrite=False)
            assert tree(out) == old
            replace(out, b"new")
            outcomes.add("put back")
        elif for_good and now == new:
            assert "is complete" in said, due
            outcomes.add("complete")
        else:
            assert now == old, due
            outcomes.add("old")
        assert litter(tmp_path) == [], due
    assert tree(out) == new
    expected = {"old"} | ({"complete"} if for_good else set())
    assert outcomes == expected | ({"put back"} if for_good and overwrite and not native else set())


# -- signals at any line ---------------------------------------------------------------------


class Raiser:
    """Sends a signal to this process when the Nth line of the commit routine is about to run."""

    FILES = frozenset(m.__file__ for m in (stage, renames, interrupts, destination))

    def __init__(self, due: int) -> None:
        self.due, self.count = due, 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in self.FILES:
            return None
        if event == "line":
            self.count += 1
            if self.count == self.due:
                signal.raise_signal(signal.SIGTERM)
        return self


@pytest.fixture
def stopping() -> Iterator[None]:
    """The command line's own handlers."""

    def stop(number: int, _frame: object) -> None:
        raise Interrupted(number)

    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("native", [True, False], ids=["renameat2", "renames"])
@pytest.mark.usefixtures("stopping")
def test_a_signal_at_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    if not native:
        monkeypatch.setattr(renames, "_renameat2", lambda *_: False)
    out = tmp_path / "out"
    replace(out, b"new")
    new = tree(out)
    replace(out, b"old")
    old = tree(out)
    outcomes = {"old": 0, "new": 0}
    usual = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for due in range(1, 5000):
        raiser = Raiser(due)
        tracing = sys.gettrace()
        try:
            sys.settrace(raiser)
            replace(out, b"new")
        except Interrupted:
            pass
        finally:
            sys.settrace(tracing)
        now = tree(out)
        assert now in (old, new), due
        outcomes["new" if now == new else "old"] += 1
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == usual
        replace(out, b"old")
        assert litter(tmp_path) == [], due
        if raiser.count < due:
            break
    assert outcomes["old"] > 50
    assert outcomes["new"] > 10


@pytest.mark.usefixtures("stopping")
def test_a_deferred_signal_comes_when_the_block_ends() -> None:
    steps = []
    with pytest.raises(Interrupted), interrupts.deferred():
        with interrupts.deferred():
            signal.raise_signal(signal.SIGTERM)
            steps.append("inner")
        steps.append("outer")
    assert steps == ["inner", "outer"]
    with pytest.raises(Interrupted), interrupts.deferred():
        signal.raise_signal(signal.SIGTERM)
        raise OSError  # an error does not swallow the signal
    thread = threading.Thread(target=lambda: interrupts.deferred().__enter__())
    thread.start(), thread.join()


def test_a_second_signal_leaves_the_clean_up_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(interrupts, "_arrived", [])
    monkeypatch.setattr(interrupts, "_until", [0.0])
    try:
        interrupts.catch()
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # while what the first one interrupted is put in order
        assert interrupts.arrived() == signal.SIGTERM
        monkeypatch.setattr(interrupts, "_until", [0.0])  # it took too long
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


NUMPY_CORE = "numpy.core" if np.__version__.startswith("1.") else "numpy._core"
# A program that is the command line, but for a signal that comes while a module is imported.
INTERRUPTED_IMPORT = """
import importlib.abc, runpy, signal, sys

class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == WHERE:
            sys.meta_path.remove(self)
            signal.raise_signal(NUMBER)

WHERE, NUMBER = sys.argv.pop(1), int(sys.argv.pop(1))
sys.meta_path.insert(0, Interrupting())
runpy.run_module("compress", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "where", ["typer", f"{NUMPY_CORE}.multiarray", f"{NUMPY_CORE}._multiarray_umath"]
)
def test_a_signal_while_libraries_are_imported(
    tmp_path: Path, model: Path, where: str, number: int
) -> None:
    """numpy would print what interrupts its import, and make an ImportError of it."""
    words = ["run", str(model), "-o", str(tmp_path / "out"), NEW]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT, where, str(int(number)), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == "error: interrupted\n"
    assert not (tmp_path / "out").exists() and litter(tmp_path) == []


def test_a_signal_keeps_finished_shards(tmp_path: Path, sharded: Path) -> None:
    folder = resumable(sharded, tmp_path / "out", NEW)
    assert len(list((folder / "out").glob("*.safetensors"))) == 2
    assert litter(tmp_path) == ["out.partial"]
    compress(sharded, tmp_path / "out", OLD)  # another run without --resume starts afresh
    assert litter(tmp_path) == []


@pytest.mark.usefixtures("stopping")
def test_a_signal_after_the_rename_leaves_the_output_and_no_stage(
    tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    compress(sharded, whole, NEW, shard=SHARD)
    compress(sharded, out, OLD)
    commit = Stage._commit

    def commit_and_stop(self: Stage) -> None:
        commit(self)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Stage, "_commit", commit_and_stop)
    with pytest.raises(Interrupted):
        compress(sharded, out, NEW, shard=SHARD, overwrite=True)
    assert tree(out) == tree(whole)
    assert litter(tmp_path) == []


def test_a_busy_output_keeps_the_other_runs_stage(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    first = Stage(out, overwrite=False)
    first.open(key="k")
    with pytest.raises(BusyError):
        compress(model, out, NEW)
    assert litter(tmp_path) == [".out.lock", "out.partial"]
    first.abandon()
    assert litter(tmp_path) == []


# -- what comes in from outside --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "fifo"])
@pytest.mark.parametrize("command", ["run", "unpack"])
def test_a_sidecar_that_became_something_else_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, command: str, kind: str
) -> None:
    (tmp_path / "secret").write_text("secret")
    source, target = model, tmp_path / "target"
    module: Any = run_module
    name = "_write_shards"
    if command == "unpack":
        source, module, name = tmp_path / "out", unpacking, "_write"
        compress(model, source, NEW)
    real = getattr(module, name)

    def write_and_swap(*arguments: Any) -> Any:
        done = real(*arguments)
        sidecar = source / "generation_config.json"
        sidecar.unlink()
        if kind == "link":
            sidecar.symlink_to(tmp_path / "secret")
        else:
            os.mkfifo(sidecar)
        return done

    monkeypatch.setattr(module, name, write_and_swap)
    with pytest.raises(InputError):
        if command == "run":
            compress(source, target, NEW)
        else:
            unpacking.unpack_output(source, target)
    assert not target.exists()
    assert litter(tmp_path) == []


def test_a_report_follows_no_link_beside_it(tmp_path: Path) -> None:
    """The name that the new content has for a moment may be taken, by a killed run or by others."""
    report, other = tmp_path / "report.json", tmp_path / "other"
    report.write_text("old")
    other.write_text("not ours")
    (tmp_path / ".report.json.new").symlink_to(other)
    write_whole(report, b"new")
    assert report.read_text() == "new" and other.read_text() == "not ours"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "report.json"]


def test_a_report_that_cannot_be_written_is_refused_first(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    before = tree(model)
    for report, code in (
        (tmp_path / "none" / "report.json", 2),
        (tmp_path, 2),
        (model / "config.json", 2),
        (Path("/proc/report.json"), 6),
    ):
        done = tool("run", model, "-o", out, NEW, "--report", report, "--memory", "1MiB")
        assert done.returncode == code, (report, done.stderr)
        assert "report" in done.stderr
        assert not out.exists() and litter(tmp_path) == []
    assert tree(model) == before
    compress(model, out, OLD)
    old = tree(out)
    inside = tool("run", model, "-o", out, NEW, "--overwrite", "--report", out / "report.json")
    assert inside.returncode == 2
    assert tree(out) == old


@pytest.mark.parametrize("kind", ["symlink", "linked folder", "fifo", "linked manifest"])
def test_verify_follows_no_link(tmp_path: Path, model: Path, kind: str) -> None:
    out = tmp_path / "out"
    compress(model, out, NEW, FACTORS)
    if kind == "symlink":
        (out / "model.safetensors").rename(tmp_path / "weights")
        (out / "model.safetensors").symlink_to(tmp_path / "weights")
    elif kind == "linked folder":
        (out / "adapter").rename(tmp_path / "adapter")
        (out / "adapter").symlink_to(tmp_path / "adapter")
    elif kind == "fifo":
        os.mkfifo(out / "pipe")
    else:
        (out / manifest.NAME).rename(tmp_path / "m")
        (out / manifest.NAME).symlink_to(tmp_path / "m")
    done = tool("verify", out)
    assert done.returncode == 5, done.stderr


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("files", []),
        ("files", {"config.json": 7}),
        ("files", {"config.json": {"bytes": "2", "sha256": "x"}}),
        ("files", {"config.json": {}}),
        ("tool", "compress-checkpoints"),
        ("format", 7),
        ("manifest_version", "1"),
    ],
)
def test_a_manifest_of_wrong_types_is_a_mismatch(
    tmp_path: Path, model: Path, field: str, value: object
) -> None:
    out = tmp_path / "out"
    compress(model, out, NEW)
    body = json.loads((out / manifest.NAME).read_text())
    body[field] = value
    del body["digest"]
    body["digest"] = manifest.digest_of(body)
    (out / manifest.NAME).write_text(json.dumps(body))
    done = tool("verify", out)
    assert done.returncode == 5, done.stderr


@pytest.mark.parametrize("text", ["[]", "{}", '{"tensors": [1]}', "{", '{"tensors": 1}'])
def test_a_report_of_wrong_types_is_a_mismatch(tmp_path: Path, model: Path, text: str) -> None:
    out = tmp_path / "out"
    compress(model, out, NEW)
    (out / "report.json").write_text(text)
    body = json.loads((out / manifest.NAME).read_text())
    record = manifest.record_of(out, "report.json")
    body["files"]["report.json"] = {"bytes": record.nbytes, "sha256": record.sha256}
    del body["digest"]
    body["digest"] = manifest.digest_of(body)
    (out / manifest.NAME).write_text(json.dumps(body))
    done = tool("verify", out)
    assert done.returncode == 5, done.stderr


# -- dense outputs, memory -------------------------------------------------------------------


@pytest.mark.parametrize("shards", [[], ["--max-shard-size", "1MiB"]], ids=["one", "many"])
def test_a_dense_output_unpacks_as_it_is(tmp_path: Path, shards: list[str]) -> None:
    model = tiny_llama(tmp_path / "model", hidden=256, ffn=640, layers=1)
    out, dense = tmp_path / "out", tmp_path / "dense"
    tool_json("run", model, "-o", out, NEW, "--format", "dense", *shards)
    tool_json("unpack", out, "-o", dense)
    assert tool_json("diff", out, dense)["equal"] == len(tool_json("inspect", dense)["tensors"])
    assert tool("verify", dense).returncode == 0
    assert not (dense / "report.json").exists() and not (dense / "recipe.yaml").exists()
    assert (dense / "generation_config.json").exists()
    assert tool("unpack", model, "-o", tmp_path / "other").returncode == 2


def test_verify_reads_by_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    out = tmp_path / "out"
    compress(model, out, "prune:sparsity=0.5")
    monkeypatch.setattr(verification, "_BLOCK", 1000)
    sizes = []
    read, read_bytes = Checkpoint.read, Checkpoint.read_bytes

    def counting(self: Checkpoint, info: Any, *span: Any) -> Any:
        values = read(self, info, *span)
        sizes.append(values.nbytes)
        return values

    def counting_bytes(self: Checkpoint, info: Any, *span: Any) -> Any:
        data = read_bytes(self, info, *span)
        sizes.append(data.nbytes)
        return data

    monkeypatch.setattr(Checkpoint, "read", counting)
    monkeypatch.setattr(Checkpoint, "read_bytes", counting_bytes)
    body = verification.verify_output(out, source=model)
    assert body["untouched_compared"] > 0
    assert sizes and max(sizes) <= 1024


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_verify_names_the_first_value_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    monkeypatch.setattr(verification, "_BLOCK", 100)
    weight = np.full((40, 8), 1e30, dtype)
    if dtype == np.float64:
        weight[:] = 1e300  # finite, though not in float32
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"fc.weight": weight})
    with open_checkpoint(path) as checkpoint:
        info = checkpoint.info("fc.weight")
        verification._check_finite(checkpoint, info, frozenset({"fc.weight"}))
    weight[33, 5] = np.nan
    write_safetensors(path, {"fc.weight": weight})
    with open_checkpoint(path) as checkpoint, pytest.raises(VerifyError, match="index 269"):
        verification._check_finite(checkpoint, info, frozenset({"fc.weight"}))
