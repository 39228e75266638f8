"""onnxruntime-genai's model builder in a child process: offline, silent, without remote code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import CompressError, UsageError, show

MODULE = "onnxruntime_genai.models.builder"
PROVIDERS = ("cpu", "cuda", "dml", "webgpu", "NvTensorRtRtx")
PRECISIONS = ("int4", "int8")
OLDEST = (0, 18)
RESULT = ("model.onnx", "genai_config.json")
_DISTRIBUTIONS = ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml")
_INSTALL = "pip install onnxruntime-genai onnx-ir"
_OURS = frozenset({"hf_remote", "accuracy_level", "int4_accuracy_level"})
_ALONE = "without the builder only the layout is written"
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONSAFEPATH": "1",
}
_ONE_TOKEN = """
import json, pathlib, sys
import numpy as np
import onnxruntime_genai as og
config = json.loads((pathlib.Path(sys.argv[1]) / "genai_config.json").read_text())
model = og.Model(sys.argv[1])
params = og.GeneratorParams(model)
length = min(config["model"]["context_length"], max(8, int(sys.argv[2])))
params.set_search_options(max_length=length)
generator = og.Generator(model, params)
generator.append_tokens(np.array([0, 1], np.int32))
generator.generate_next_token()
"""
_TAIL = 1 << 16  # bytes of the builder's output that its last line is looked for in
_LINE = 400


@dataclass(frozen=True)
class BuilderOptions:
    """How the builder is called.

    precision       of what is left in floating point: the layers keep their own widths
    provider        the execution provider that the graph is made for
    accuracy_level  of MatMulNBits, 0 to 4; None: as the builder decides (4 on cpu)
    extra           further KEY=VALUE of its --extra_options
    """

    precision: str = "int4"
    provider: str = "cpu"
    accuracy_level: int | None = None
    extra: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises UsageError."""
        for value, known, what in (
            (self.precision, PRECISIONS, "precision"),
            (self.provider, PROVIDERS, "execution provider"),
        ):
            if value not in known:
                raise UsageError(
                    f"{what} {show(value)}: the builder has none of that name",
                    hint=f"one of {', '.join(known)}",
                )
        if self.accuracy_level is not None and not 0 <= self.accuracy_level <= 4:
            raise UsageError(f"accuracy level {self.accuracy_level}: it is 0 to 4")
        for option in self.extra:
            key, equals, _ = option.partition("=")
            if not equals or not key:
                raise UsageError(f"builder option {show(option)}: it is not KEY=VALUE")
            if key in _OURS:
                raise UsageError(
                    f"builder option {show(key)}: not to be given this way",
                    hint="code of a model's repository is never run"
                    if key == "hf_remote"
                    else "the accuracy level has an option of its own",
                )

    def arguments(self, needed: Mapping[str, str]) -> list[str]:
        """Arguments after input, output and cache; `needed` is what the layout asks for."""
        merged = dict(needed)
        for option in self.extra:
            key, _, value = option.partition("=")
            merged[key] = value
        if self.accuracy_level is not None:
            merged["accuracy_level"] = str(self.accuracy_level)
        pairs = [f"{key}={value}" for key, value in merged.items()]
        return ["-p", self.precision, "-e", self.provider, "--extra_options", *pairs]


def installed() -> str | None:
    """The version of onnxruntime-genai, "unknown" where it does not say, None where it is not."""
    if importlib.util.find_spec(MODULE.partition(".")[0]) is None:
        return None
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def check_version(version: str) -> None:
    """Raises UsageError for a builder older than `OLDEST`.

    An older one has other names for its options and passes over those that it does not know: it
    would round what is to stay as it is. A version that is no number is taken.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < OLDEST:
        raise UsageError(
            f"onnxruntime-genai {show(version)}: {OLDEST[0]}.{OLDEST[1]} or newer is wanted",
            hint=f"{_INSTALL} --upgrade; {_ALONE}",
        )


def command_line(checkpoint: Path, to: Path, arguments: Sequence[str]) -> str:
    """The call as a user would type it."""
    return shlex.join(["python", "-m", MODULE, "-i", str(checkpoint), "-o", str(to), *arguments])


def build(checkpoint: Path, to: Path, scratch: Path, arguments: Sequence[str]) -> None:
    """Run the builder on the layout in `checkpoint`; its files go to `to`.

    `scratch` is an existing folder for its cache and its output. Raises CompressError.
    """
    command = ["-m", MODULE, "-i", str(checkpoint), "-o", str(to)]
    command += ["-c", str(scratch / "cache"), *arguments]
    returncode, last = _run(command, scratch)
    if returncode:
        raise _failed(returncode, last)
    if missing := [name for name in RESULT if not (to / name).is_file()]:
        raise CompressError(f"onnxruntime-genai's builder ended well, but wrote no {missing[0]}")


def try_out(model: Path, scratch: Path, *, window: int = 0) -> None:
    """Let the engine write one token with what was built: not every graph that is built runs.

    `window` is the tokens that a sliding window of attention sees; the cache must hold as many.
    Raises CompressError with what the engine said.
    """
    returncode, last = _run(["-c", _ONE_TOKEN, str(model), str(window)], scratch)
    if returncode:
        raise CompressError(
            f"the model was built, but onnxruntime-genai does not run it: {last or returncode}",
            hint=f"compress export --to onnx takes more shapes; {_ALONE}",
        )


def _run(arguments: Sequence[str], scratch: Path) -> tuple[int, str]:
    """The exit code of Python with these arguments, and the last line that it wrote."""
    log = scratch / "log"
    with open(log, "wb") as output:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=scratch,
            env=os.environ | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return done.returncode, _last_line(log)


def _failed(returncode: int, last: str) -> CompressError:
    if returncode < 0:
        return CompressError(
            f"onnxruntime-genai's builder was ended by signal {-returncode}",
            hint=f"it holds the whole model in memory; {_ALONE}" if returncode == -9 else None,
        )
    missing = last.startswith("ModuleNotFoundError")
    return CompressError(
        f"onnxruntime-genai's builder failed: {last or f'exit code {returncode}'}",
        hint=_INSTALL if missing else _ALONE,
    )


def _last_line(log: Path) -> str:
    """What the builder said last, safe to print."""
    with open(log, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
        text = file.read().decode("utf-8", "replace")
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    return show(next((line for line in reversed(lines) if line), ""), _LINE)
