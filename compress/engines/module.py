"""A user's own torch module as the model: `--module FILE.py:FACTORY`.

FILE.py is run as any Python program is, with the rights of whoever calls: it is the user's own
code, never something that came with a checkpoint. FACTORY() builds an nn.Module; its parameters and
persistent buffers are then filled by name from a checkpoint, in float32. A function of the file

    preprocess(images)    uint8 [n, height, width, channels] -> what the module is called with

may say how images get in; without it they are divided by 255 and their channels come first.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.checkpoint import Checkpoint
from compress.errors import InputError, UsageError, show
from compress.tensor import Array

_COUNTER = "num_batches_tracked"  # of training steps: old checkpoints lack it, nothing needs it
_HINT = (
    "--module FILE.py:FACTORY names a function of yours that takes nothing and returns the model"
)


class UserModule(nn.Module):
    """The user's module with the weights of a checkpoint, in eval mode; calls go to `inner`.

    inner   what FACTORY returned
    stored  name of a parameter or buffer of `inner` -> name of the tensor in the checkpoint
    spec    FILE.py:FACTORY, for messages
    """

    def __init__(
        self,
        inner: nn.Module,
        spec: str,
        preprocess: Callable[[torch.Tensor], Any] | None = None,
        stored: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.inner, self.spec = inner, spec
        self.stored: dict[str, str] = dict(stored or {})
        self._preprocess = preprocess

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """What the user's module returns."""
        return self.inner(*arguments, **keywords)

    def prepare(self, images: Array) -> torch.Tensor:
        """What the module is called with for images uint8 [n, height, width, channels].

        Raises UsageError where the user's `preprocess` fails or loses images.
        """
        return self.preprocessed(torch.from_numpy(np.ascontiguousarray(images)))

    def preprocessed(self, images: torch.Tensor) -> torch.Tensor:
        """The same of a tensor; torch.export may trace it."""
        if self._preprocess is None:
            return images.permute(0, 3, 1, 2).to(torch.float32).div(255).contiguous()
        with _explained(f"{_file_of(self.spec)}: preprocess", f"images {list(images.shape)}"):
            made = self._preprocess(images)
        # shapes, for len() would fix the number of images in a trace
        if not isinstance(made, torch.Tensor) or made.shape[:1] != images.shape[:1]:
            found = list(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
            raise UsageError(
                f"{show(_file_of(self.spec))}: preprocess made {show(str(found))} of"
                f" {images.shape[0]} images",
                hint="it returns one tensor whose first axis counts the images",
            )
        return made

    def prepared(self, inputs: Mapping[str, Array]) -> Any:
        """What the module is called with for `images`, or for `input_ids` [n, length]."""
        images = inputs.get("images")
        return self.prepare(images) if images is not None else _ids(inputs)

    def run(self, given: Any) -> torch.Tensor:
        """The module's output for what `prepared` made; gradients may flow.

        Raises UsageError where the module refuses its input or returns no tensor.
        """
        with _explained(f"{show(self.spec)}: the module", f"an input {list(given.shape)}"):
            output = self.inner(given)
        return output_of(output, self.spec)

    def call(self, inputs: Mapping[str, Array]) -> torch.Tensor:
        """`prepared` and `run`."""
        return self.run(self.prepared(inputs))

    def weights(self) -> dict[str, nn.Module]:
        """Layers whose `weight` is a stored matrix or kernel, by the tensor's stored name."""
        found: dict[str, nn.Module] = {}
        for name, module in self.inner.named_modules():
            stored = self.stored.get(f"{name}.weight" if name else "weight")
            if stored is not None and isinstance(
                module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
            ):
                found.setdefault(stored, module)
        return found

    def fill(self, checkpoint: Checkpoint) -> None:
        """Take all weights anew from a checkpoint of the same tensors."""
        with torch.no_grad():
            for name, place in _state(self.inner).items():
                if name in self.stored:
                    place.copy_(_values(checkpoint, self.stored[name], place))


def load_module(spec: str, checkpoint: Checkpoint) -> UserModule:
    """FACTORY() of the user's FILE.py with the checkpoint's weights, float32, in eval mode.

    spec        FILE.py:FACTORY; the file's code is run
    checkpoint  plain, an output of this tool, or on trial; all its names may share a prefix that
                the module's have not, such as `module.`, or the other way round
    Raises UsageError for a file or factory that is not there, fails or makes no module, InputError
    (it names the tensor) where the checkpoint lacks a weight or has another shape for it.
    """
    file, _, factory = spec.rpartition(":")
    if not file.endswith(".py") or not factory.isidentifier():
        raise UsageError(f"--module {show(spec)}: expected FILE.py:FACTORY", hint=_HINT)
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"--module {show(spec)}: no file {show(file)}", hint=_HINT)
    code = _run_file(os.path.realpath(path))
    build = getattr(code, factory, None)
    if not callable(build):
        raise UsageError(
            f"--module {show(spec)}: {show(file)} has no function {show(factory)}", hint=_HINT
        )
    with _beside(path), _explained(f"--module {show(spec)}: {factory}()"):
        inner = build()
        if isinstance(inner, nn.Module):  # on the CPU: weights without a place fail here
            inner = inner.to("cpu", torch.float32).requires_grad_(False).eval()
            for layer in inner.modules():
                if isinstance(getattr(layer, "inplace", None), bool):
                    layer.__dict__["inplace"] = False  # inputs are looked at later
    if not isinstance(inner, nn.Module):
        raise UsageError(
            f"--module {show(spec)}: {factory}() made {show(type(inner).__name__)}, no"
            " torch.nn.Module",
            hint=_HINT,
        )
    preprocess = getattr(code, "preprocess", None)
    made = UserModule(
        inner,
        spec,
        preprocess if callable(preprocess) else None,
        _matched(inner, spec, checkpoint),
    )
    made.fill(checkpoint)
    return made.eval()


def run_images(model: nn.Module, images: Array, batch: int = 100) -> torch.Tensor:
    """The model's outputs for images uint8 [n, height, width, channels], `batch` at a time.

    A bare nn.Module is given images / 255 with channels first. Raises UsageError where the model
    refuses them.
    """
    owner = model if isinstance(model, UserModule) else UserModule(model, type(model).__name__)
    with torch.no_grad():
        made = [owner.call({"images": images[i : i + batch]}) for i in range(0, len(images), batch)]
    return torch.cat(made)


def output_of(output: Any, where: str) -> torch.Tensor:
    """The tensor that counts in what a model returned: itself, its logits, the first of a tuple."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits", next(iter(output.values()), None))
    elif isinstance(output, Sequence) and output:
        found = output[0]
    found = getattr(found, "logits", found)
    if not isinstance(found, torch.Tensor):
        raise UsageError(
            f"{show(where)}: the module returns {show(type(output).__name__)}, no tensor",
            hint="return the logits [n, classes]",
        )
    return found


@contextmanager
def _explained(what: str, given: str = "") -> Iterator[None]:
    """Turn whatever the user's code raises into one line: it may raise anything, or exit."""
    try:
        yield
    except (Exception, SystemExit) as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise UsageError(
            f"{what} fails{given and f' on {given}'}: {type(error).__name__}: {show(first, 200)}",
            hint="the code is your own: run it in Python to see where",
        ) from error


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Let the user's code import its neighbours, as `python FILE.py` would."""
    folder = os.path.dirname(os.path.realpath(path))
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


@cache
def _run_file(path: str) -> ModuleType:
    """Run a Python file once. Raises UsageError where it fails."""
    name = f"compress_user_module_{sha256(path.encode()).hexdigest()[:12]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise UsageError(f"--module {show(path)}: not a Python file", hint=_HINT)
    code = importlib.util.module_from_spec(found)
    sys.modules[name] = code  # dataclasses and pickle look it up there
    with _beside(Path(path)), _explained(f"--module {show(path)}: it"):
        found.loader.exec_module(code)
    return code


def _file_of(spec: str) -> str:
    return spec.rpartition(":")[0] or spec


def _ids(inputs: Mapping[str, Array]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(inputs["input_ids"]).astype(np.int64))


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones under each of their names."""
    return {
        k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, torch.Tensor)
    }


def _matched(model: nn.Module, spec: str, checkpoint: Checkpoint) -> dict[str, str]:
    """Name in the module -> stored name. Raises InputError for what is missing or misshapen."""
    places = _state(model)
    shapes = {info.name: info.shape for info in checkpoint.infos()}
    names = {name: name for name in shapes} | dict(checkpoint.aliases)
    theirs, ours = _prefixes(list(places), list(names))
    found: dict[str, str] = {}
    for name in places:
        stored = names.get(theirs + name.removeprefix(ours))
        if stored is not None and name.startswith(ours):
            found[name] = stored
    shared = {id(places[name]): stored for name, stored in found.items()}
    for name, place in places.items():
        if name in found or name.endswith(_COUNTER):
            continue
        if id(place) in shared:  # tied: stored once
            found[name] = shared[id(place)]
            continue
        raise InputError(
            f"{show(str(checkpoint.path))}: no tensor {show(theirs + name.removeprefix(ours))},"
            f" which the module of {show(spec)} wants",
            hint="the module's parameters must have the names that the checkpoint has",
        )
    for name, stored in found.items():
        if places[name].numel() != _size(shapes[stored]) or (
            places[name].ndim and tuple(places[name].shape) != shapes[stored]
        ):
            raise InputError(
                f"{show(str(checkpoint.path))}: tensor {show(stored)} is {list(shapes[stored])},"
                f" the module of {show(spec)} wants {list(places[name].shape)}",
                hint="the module must be of the shape that the weights were trained in",
            )
    return found


def _prefixes(ours: list[str], theirs: list[str]) -> tuple[str, str]:
    """(prefix of the stored names, prefix of the module's names) that lets most names meet."""
    best, score = ("", ""), len(set(ours) & set(theirs))
    stored, wanted = set(theirs), set(ours)
    candidates = {(t.removesuffix(o), "") for o in ours[:4] for t in theirs if t.endswith(f".{o}")}
    candidates |= {("", o.removesuffix(t)) for t in theirs[:4] for o in ours if o.endswith(f".{t}")}
    for their, our in sorted(candidates):
        met = sum(
            name.startswith(our) and their + name.removeprefix(our) in stored for name in wanted
        )
        if met > score:
            best, score = (their, our), met
    return best


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _values(checkpoint: Checkpoint, name: str, place: torch.Tensor) -> torch.Tensor:
    values = np.ascontiguousarray(checkpoint.read(checkpoint.info(name)))
    if place.is_floating_point():
        values = values.astype(np.float32)
    return torch.from_numpy(values.reshape(tuple(place.shape)))
