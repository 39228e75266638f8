"""The command line for the price of a fork: a helper process imports once, each command is a child.

    python forked_cli.py MODULE...

The helper imports the modules, then reads one request a line on standard input and answers each
with one line on standard output. A command has its own `sys.argv`, environment, working
directory, descriptors and exit code, as `python -m compress` has. What differs: modules are
imported already, and the interpreter is not torn down at the end. Where that, a signal or a
variable that is read while importing is what a test is about, it takes a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

# Modules that commands import when they run. A module whose import starts a thread (onnxruntime)
# may not be among them: a fork copies no thread, but the locks that it holds.
LIGHT = (
    "compress.cli",  # first: it limits the threads that numpy starts
    "numpy", "ml_dtypes", "rich.console", "rich.table", "ruamel.yaml", "msgspec",
    "compress.comparison", "compress.inspection", "compress.report",
    "compress.resume", "compress.run", "compress.show_plan", "compress.survey",
    "compress.unpacking", "compress.verification", "compress.pass_command",
    "compress.formats.compressed_tensors", "compress.formats.native", "compress.formats.dense",
    "compress.formats.onnx", "compress.checkpoint.torch_file", "compress.passes.low_rank",
    "compress.passes.prune", "compress.passes.quantize", "compress.passes.recalibrate",
)  # fmt: skip
HEAVY = (*LIGHT, "torch", "transformers.models.auto", "onnx", "compress.runtime.generate")
# What runs on HEAVY; with the light modules it works as well, and slower.
HEAVY_WORDS = frozenset({
    "calibrate", "eval", "sweep", "generate", "bench", "--allow-pickle",
    "--text", "--sentences", "--ids", "--images", "--eval-text", "--eval-pairs", "--eval-images",
})  # fmt: skip


class Finished(subprocess.CompletedProcess[str]):
    """A command that ended: beside code and output its seconds and its peak memory in bytes.

    The peak counts what the helper had in memory when it forked.
    """

    def __init__(self, arguments: Sequence[str], answer: Mapping[str, Any]) -> None:
        super().__init__(arguments, answer["code"], answer["stdout"], answer["stderr"])
        self.seconds: float = answer["seconds"]
        self.peak_bytes: int = answer["peak_bytes"]


class Server:
    """A helper process that runs commands one after another; started by the first of them."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = modules
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def run(self, arguments: Sequence[str], *, timeout: float, cwd: Path | None = None) -> Finished:
        """`compress ARGUMENTS` with this process's environment. Raises TimeoutExpired."""
        request = {
            "arguments": list(arguments),
            "environment": dict(os.environ),
            "cwd": str(cwd or Path.cwd()),
            "umask": _umask(),
            "timeout": timeout,
        }
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        assert line, f"the helper process ended with {process.wait()}"
        answer = json.loads(line)
        if answer["code"] is None:
            raise subprocess.TimeoutExpired(arguments, timeout, answer["stdout"], answer["stderr"])
        return Finished(arguments, answer)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *self.modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._process

    def close(self) -> None:
        """End the helper: it stops where its input does."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


def _umask() -> int:
    now = os.umask(0o077)
    os.umask(now)
    return now


_servers: dict[bool, Server] = {}


def forked(arguments: Sequence[str], *, timeout: float = 120, cwd: Path | None = None) -> Finished:
    """`compress ARGUMENTS` as a child of the helper that fits. Raises TimeoutExpired."""
    heavy = not HEAVY_WORDS.isdisjoint(arguments)
    if heavy not in _servers:
        _servers[heavy] = Server(HEAVY if heavy else LIGHT)
    return _servers[heavy].run(arguments, timeout=timeout, cwd=cwd)


def close_servers() -> None:
    """End the helper processes."""
    while _servers:
        _servers.popitem()[1].close()


# -- in the helper -------------------------------------------------------------------------------


def serve(modules: Sequence[str]) -> None:
    """Answer requests until standard input ends."""
    import gc
    import importlib

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of the input is what stops this process
    sys.path[0] = str(Path.cwd())  # as under `python -m`
    for name in modules:
        importlib.import_module(name)
    _warm_up()
    tasks = Path("/proc/self/task")
    assert len(list(tasks.iterdir())) == 1, "an import started a thread: it would not be forked"
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


def _warm_up() -> None:
    """One command of each kind of outcome: the libraries import more when they first parse."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    from compress import cli

    for words in (["--version"], ["verify", "--help"], ["inspect", ""]):
        with (
            redirect_stdout(StringIO()), redirect_stderr(StringIO()),
            contextlib.suppress(SystemExit, cli.CompressError),
        ):  # fmt: skip
            cli.app(words, prog_name="compress", standalone_mode=False)


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            _become(request, out, errors)
        with contextlib.suppress(OSError):  # the child does it too: whoever is first
            os.setpgid(child, child)
        code, peak = _wait(child, started + request["timeout"])
        seconds = time.perf_counter() - started
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return {
        "code": code,
        "stdout": texts[0],
        "stderr": texts[1],
        "seconds": seconds,
        "peak_bytes": peak,
    }


def _wait(child: int, until: float) -> tuple[int | None, int]:
    """(exit code, or -signal, or None after `until`; peak memory in bytes)."""
    pause = 0.0005
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
        if time.perf_counter() > until:
            with contextlib.suppress(OSError):  # one without a group of its own
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            os.wait4(child, 0)
            return None, 0
        time.sleep(pause)
        pause = min(2 * pause, 0.01)


def _run_script(
    command: Sequence[str], *, env: Mapping[str, str], timeout: float, **_: object
) -> subprocess.CompletedProcess[bytes]:
    """`subprocess.run` for the process that reads PyTorch files: torch is imported already.

    test_corpus_read.py and test_torch_file.py read with a real one.
    """
    import runpy

    assert list(command[:2]) == [sys.executable, "-I"]
    child = os.fork()
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for target in (0, 1, 2):
                os.dup2(null, target)
            os.environ.clear()
            os.environ.update(env)
            sys.argv = list(command[2:])
            runpy.run_path(command[2], run_name="__main__")  # ends this process
        finally:
            os._exit(1)
    code, _peak = _wait(child, time.perf_counter() + timeout)
    if code is None:
        raise subprocess.TimeoutExpired(command, timeout)
    return subprocess.CompletedProcess(command, code)


def _become(request: Mapping[str, Any], out: IO[bytes], errors: IO[bytes]) -> NoReturn:
    """In the child: be `python -m compress ARGUMENTS`, and end as it ends."""
    import atexit
    import runpy
    import traceback

    from compress import terminal
    from compress.checkpoint import torch_file

    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (out.fileno(), 1), (errors.fileno(), 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(request["environment"])
        terminal._limited.clear()
        terminal.limit_threads()  # as importing the command line does
        os.umask(request["umask"])
        os.chdir(request["cwd"])
        if "torch" in sys.modules:
            torch_file.subprocess = SimpleNamespace(  # type: ignore[assignment]
                run=_run_script, DEVNULL=None, TimeoutExpired=subprocess.TimeoutExpired
            )
        sys.argv = ["compress", *request["arguments"]]
        try:
            runpy.run_module("compress", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1:])
