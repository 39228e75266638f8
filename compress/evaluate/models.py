"""Opening what an evaluation runs: checkpoints, outputs, .onnx files and a user's own module."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import torch

from compress.checkpoint import Checkpoint
from compress.checkpoint.config import parse_config
from compress.checkpoint.files import open_inside
from compress.errors import UsageError, show
from compress.evaluate.metrics import IMAGES, TEXT
from compress.evaluate.outputs import ENGINES, Decoded, Kernels, Module, Runner, require_decoder
from compress.output import in_float32, open_any
from compress.runtime.architecture import build

_ONNX = ".onnx"


def engine_of(path: Path, engine: str | None, module: str | None) -> str:
    """The engine that a model is run by, where none was named too. Raises UsageError."""
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"--engine {show(engine)}: unknown", hint=f"one of {', '.join(ENGINES)}")
    is_file = path.suffix.lower() == _ONNX
    chosen = engine or ("onnx" if is_file else "module" if module is not None else "decoded")
    if chosen == "onnx" and not is_file:
        raise UsageError(
            f"--engine onnx: {show(str(path))} is no .onnx file",
            hint="name the .onnx file as MODEL",
        )
    if is_file and chosen != "onnx":
        raise UsageError(
            f"--engine {chosen}: {show(str(path))} is an .onnx file", hint="leave --engine out"
        )
    if (chosen == "module") != (module is not None):
        raise UsageError(
            "--module FILE.py:FACTORY and --engine module belong together",
            hint="leave --engine out, or give --module",
        )
    return chosen


def open_model(path: Path, stack: ExitStack, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint of a model, closed with `stack`; of an .onnx file, what lies beside it.

    Raises UsageError where nothing is there, InputError for malformed content.
    """
    if path.suffix.lower() != _ONNX:
        return stack.enter_context(open_any(path, allow_pickle=allow_pickle))
    from compress.checkpoint.onnx_file import check_onnx

    check_onnx(path)
    return beside(path)


def beside(path: Path) -> Checkpoint:
    """A checkpoint without tensors: config and tokenizer of the folder that a file lies in."""
    folder = Path(os.path.realpath(path.parent))
    found = Checkpoint(path, folder, {})
    if os.path.lexists(folder / "config.json"):
        file = open_inside(str(folder), "config.json")
        try:
            found.config, found.config_bytes = parse_config(file, allow_quantized=True)
        finally:
            file.close()
    return found


def make_runner(checkpoint: Checkpoint, engine: str, module: str | None) -> Runner:
    """The model of an open checkpoint on an engine. Raises UsageError, InputError."""
    if engine == "onnx":
        from compress.evaluate.onnx_outputs import Onnx

        return Onnx(_graph_file(checkpoint))
    if engine == "kernels":
        return Kernels(checkpoint.path)
    if engine == "module" and module is not None:
        from compress.engines.module import load_module

        return Module(load_module(module, in_float32(checkpoint)), str(checkpoint.path))
    return Decoded(in_float32(checkpoint))


def _graph_file(checkpoint: Checkpoint) -> Path:
    """The .onnx file of a checkpoint, or of an output. Raises UsageError where it has none."""
    path = checkpoint.graph_path or checkpoint.path
    path = path / "model.onnx" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(
            f"{show(str(checkpoint.path))}: no model.onnx in it to run",
            hint="evaluate a finished output",
        )
    return path


def check_predicts(checkpoint: Checkpoint) -> None:
    """Refuse (InputError) a model that does not predict the next token, from its config alone."""
    model = build(checkpoint.config, torch.float32, str(checkpoint.path))
    require_decoder(model, str(checkpoint.path))


def check_kind(kind: str, engines: list[str]) -> None:
    """Refuse (UsageError) data that an engine cannot run."""
    if kind == IMAGES and not set(engines) <= {"module", "onnx"}:
        raise UsageError(
            "--images: how a checkpoint's model takes images is not known",
            hint="give --module FILE.py:FACTORY, or evaluate an .onnx file",
        )
    if kind not in (IMAGES, TEXT) and "module" in engines:
        raise UsageError(
            "--pairs with --module: a module's output is no embedding",
            hint="use --text or --images with a module",
        )
