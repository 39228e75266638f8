"""The commands that bench/kills.py cuts off: what each replaces, and by what.

Every command has a folder of its own with `spare`, the old output, and `new`, what the command
makes of it when it is left alone; `out` is what is at stake.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from damage import onnx_model
from forked_cli import LIGHT, _become
from toolbox import tiny_llama, tree

TOOL = [sys.executable, "-m", "compress"]
CHAIN = ["prune:sparsity=0.3", "quantize:bits=8,group=32,search=none", "low-rank:rank=2"]
PLAIN = ["quantize:bits=8,group=-1"]
SHARDS = ["--max-shard-size", "1MiB"]
WANDA = "version: 1\npasses:\n  - prune: {sparsity: 0.5, score: wanda}\n"
# name -> of a thousand kills; those that import onnxruntime or torch take seconds each
SHARES = {
    "run": 330,
    "run --resume": 330,
    "unpack": 170,
    "export --to dense": 110,
    "run of an .onnx file": 25,
    "export --to onnx -o": 15,
    "export --to onnx": 15,
    "calibrate": 5,
}


class Started:
    """A command that was begun; standard error goes to the file `errors`."""

    def __init__(self, words: list[str], folder: Path, *, fork: bool) -> None:
        self.code: int | None = None
        self._errors = folder / "errors"
        with self._errors.open("wb") as log, open(os.devnull, "wb") as null:
            if fork:
                request = {"environment": os.environ, "umask": 0o022, "cwd": os.getcwd()}
                self.pid = os.fork()
                if self.pid == 0:
                    _become(request | {"arguments": words}, null, log)
            else:
                self.pid = subprocess.Popen([*TOOL, *words], stdout=null, stderr=log).pid

    def poll(self) -> bool:
        """Whether it has ended; its exit code, or minus the signal, is in `code` then."""
        if self.code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if found else None
        return self.code is not None

    def send(self, number: int) -> None:
        """A signal, if it still runs."""
        if not self.poll():
            os.kill(self.pid, number)

    def wait(self, seconds: float = 300) -> int:
        """Its exit code. Raises TimeoutError."""
        until = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"still running after {seconds} s")
            time.sleep(0.001)
        assert self.code is not None
        return self.code

    def errors(self) -> str:
        """What it wrote to standard error."""
        return self._errors.read_text(errors="replace")


@dataclass
class Command:
    """One command line that replaces `out`.

    words    what follows `compress`
    seconds  it takes when it is left alone, as a fork; its stage exists for `writing` of them
    """

    name: str
    words: list[str]
    folder: Path
    seconds: float = 0.0
    writing: float = 0.0
    importing: float = 1.0  # seconds more that an interpreter of its own takes

    @property
    def out(self) -> Path:
        """The output at stake."""
        return self.folder / "out"

    @property
    def stage(self) -> Path:
        """Where it is prepared."""
        return self.folder / "out.partial"

    @property
    def lock(self) -> Path:
        """The file that is locked meanwhile."""
        return self.folder / ".out.lock"

    def start(self, *, fork: bool = True) -> Started:
        """Begin, in an interpreter of its own or in a fork of this one, which saves the imports."""
        return Started(self.words, self.folder, fork=fork)

    def put_back(self) -> None:
        """The old output again."""
        remove(self.out)
        copy(self.folder / "spare", self.out)

    def touched(self) -> tuple[int, ...]:
        """Changes when a process takes the stage, also one that was left there."""
        found = []
        for path in (self.stage, self.stage / "out"):
            with contextlib.suppress(FileNotFoundError):
                found.append(path.stat().st_ctime_ns)
        return tuple(found)

    def litter(self) -> list[str]:
        """What lies beside the output that no finished command leaves."""
        known = ("spare", "new", "out", "errors")
        return sorted(path.name for path in self.folder.iterdir() if path.name not in known)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """A file or a folder."""
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def content(path: Path) -> dict[str, str]:
    """What an output holds, figures of time left out: name -> SHA-256; {} if nothing is there."""
    if path.is_dir():
        return tree(path)
    return {"": hashlib.sha256(path.read_bytes()).hexdigest()} if path.exists() else {}


def prepare(root: Path) -> dict[str, Command]:
    """Every command with its old output in place, timed once, and its new one known."""
    for module in (*LIGHT, "onnx"):  # what forks need not import; nothing that starts a thread
        importlib.import_module(module)
    model = tiny_llama(root / "model", hidden=256, ffn=512, shards=2)
    graph = onnx_model(root / "source" / "model.onnx")
    ids, recipe = root / "ids.npy", root / "recipe.yaml"
    np.save(ids, np.random.default_rng(0).integers(0, 96, (8, 32)))
    recipe.write_text(WANDA)
    packed = {bits: root / f"packed-{bits}" for bits in (4, 8)}
    graphs = {bits: root / f"graph-{bits}" for bits in (4, 8)}
    for bits in (4, 8):
        words = f"quantize:bits={bits},group=32"
        tool("run", model, "-o", packed[bits], words, *SHARDS)
        tool("run", graph, "-o", graphs[bits], words)
    calibrate = ["calibrate", model, "--for", recipe, "--ids", ids]
    old: dict[str, list[str | Path]] = {
        "run": ["run", model, *PLAIN, *SHARDS],
        "run --resume": ["run", model, *PLAIN, *SHARDS],
        "unpack": ["unpack", packed[8]],
        "export --to dense": ["export", packed[8], "--to", "dense"],
        "run of an .onnx file": ["run", graph, "quantize:bits=8,group=32"],
        "export --to onnx -o": ["export", graphs[8], "--to", "onnx"],
        "export --to onnx": ["run", graph, "quantize:bits=4,group=32"],
        "calibrate": [*calibrate, "--samples", "2"],
    }
    new: dict[str, list[str | Path]] = {
        "run": ["run", model, *CHAIN, *SHARDS],
        "run --resume": ["run", model, *CHAIN, *SHARDS, "--resume"],
        "unpack": ["unpack", packed[4]],
        "export --to dense": ["export", packed[4], "--to", "dense"],
        "run of an .onnx file": ["run", graph, "quantize:bits=4,group=32", "low-rank:rank=2"],
        "export --to onnx -o": ["export", graphs[4], "--to", "onnx"],
        "export --to onnx": [],
        "calibrate": [*calibrate, "--samples", "8"],
    }
    commands = {}
    for name in SHARES:
        folder = root / name.replace(" ", "_").replace("/", "")
        folder.mkdir()
        tool(*old[name], "-o", folder / "spare")
        commands[name] = _command(name, folder, new[name])
        _time(commands[name])
    return commands


def _command(name: str, folder: Path, words: list[str | Path]) -> Command:
    if name == "export --to onnx":  # into the output itself, always in place of what was there
        line = ["export", str(folder / "out"), "--to", "onnx", "--onnx-style", "qdq"]
    else:
        line = [*map(str, words), "-o", str(folder / "out"), "--overwrite"]
    return Command(name, line, folder)


def _time(command: Command) -> None:
    """Run it undisturbed; what it made is the new output."""
    command.put_back()
    started = time.perf_counter()
    process = command.start()
    began = None
    while not process.poll():
        if began is None and command.stage.exists():
            began = time.perf_counter()
        time.sleep(0.001)
    ended = time.perf_counter()
    if process.code or began is None:
        sys.exit(f"{command.name} failed: {process.errors()}")
    command.seconds, command.writing = ended - started, ended - began
    os.rename(command.out, command.folder / "new")
    command.put_back()


def tool(*words: str | Path) -> None:
    """A command that must succeed."""
    folder = Path(tempfile.mkdtemp())
    process = Started([*map(str, words)], folder, fork=True)
    if process.wait():
        sys.exit(f"{' '.join(map(str, words))} failed: {process.errors()}")
    shutil.rmtree(folder)
