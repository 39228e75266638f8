"""What lies in a checkpoint directory: the weight files, and the files that travel with them."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from fnmatch import fnmatch

from compress.checkpoint import strict_json
from compress.checkpoint.files import open_inside, read_error, resolve_inside
from compress.checkpoint.index import Index
from compress.errors import InputError, show

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".th", ".ckpt")
INDEX_SUFFIX = ".index.json"
ONNX_SUFFIX = ".onnx"

# Weights in any format: never copied beside a compressed model, where they would be a second,
# different model. `*.onnx_data` and `*.onnx.data` hold the tensors of an ONNX graph.
_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.th", "*.ckpt", "*.gguf", "*.ggml", "*.onnx",
    "*.onnx.data", "*.onnx_data*", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.pkl", "*.pickle",
    "*.npz", "*.safetensors.index.json", "*.bin.index.json", "*.h5.index.json",
    "*.msgpack.index.json",
)  # fmt: skip
# What a training run leaves beside the weights, under the same suffixes.
_TRAINING_STATE = ("training_args.*", "optimizer*", "scheduler*", "rng_state*", "scaler*")
# A shard's name, "model-00001-of-00002.safetensors", without its suffix in group 1.
_NUMBERED = re.compile(r"(.+)-[0-9]{5,}-of-[0-9]{5,}\.[a-z]+")
_MAX_SIDECARS = 10_000
_MAX_MODULES = 1_000_000


@dataclass
class Layout:
    """The weight files of a directory: an index that names shards, or one file."""

    index: str | None = None
    file: str | None = None
    is_torch: bool = False
    is_onnx: bool = False
    warnings: list[str] = field(default_factory=list)


@dataclass
class Sidecars:
    """Files to copy, those among them that hold code, and what was left behind."""

    files: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find_weights(directory: str, shown: str) -> Layout:
    """Decide which files of `directory` are the checkpoint. Raises InputError if that is unclear.

    safetensors wins over PyTorch files and these over ONNX, the usual name over other names, an
    index over a file. Beside an .onnx file, a .bin file of any name but the usual one holds its
    tensors.
    """
    names = _names(directory, shown)
    graphs = [name for name in names if name.endswith(ONNX_SUFFIX)]
    for suffixes, usual in (((".safetensors",), "model"), (TORCH_SUFFIXES, "pytorch_model")):
        is_torch = suffixes is TORCH_SUFFIXES
        files = [name for name in names if name.endswith(suffixes)]
        if is_torch:
            files = [n for n in files if not any(fnmatch(n, p) for p in _TRAINING_STATE)]
            if graphs:
                files = [n for n in files if not n.endswith(".bin") or n.startswith(usual)]
        indexes = [name for name in names if name.endswith(f"{suffixes[0]}{INDEX_SUFFIX}")]
        layout = _choose(files, indexes, usual + suffixes[0], shown)
        if layout is not None:
            layout.is_torch = is_torch
            return layout
    layout = _choose(graphs, [], "model.onnx", shown)
    if layout is not None:
        layout.is_onnx = True
        return layout
    others = [name for name in names if any(fnmatch(name, pattern) for pattern in _WEIGHTS)]
    found = f"; it holds {_listed(others)}" if others else ""
    raise InputError(
        f"{show(shown)}: no weights here: looked for model.safetensors,"
        f" model.safetensors.index.json, a single *.safetensors, pytorch_model.bin and"
        f" model.onnx{found}"
    )


def _choose(files: list[str], indexes: list[str], usual: str, shown: str) -> Layout | None:
    index = usual + INDEX_SUFFIX
    if index in indexes:
        return Layout(index=index)
    if usual in files:
        layout = Layout(file=usual)
        if len(files) > 1:
            rest = _listed([name for name in files if name != usual])
            layout.warnings.append(f"{usual} is the checkpoint; beside it, ignored: {rest}")
        return layout
    if len(indexes) == 1:
        return Layout(index=indexes[0])
    if len(files) == 1:
        return Layout(file=files[0])
    if files:
        raise InputError(
            f"{show(shown)}: {len(files)} weight files and no index"
            f" that joins them: {_listed(files)}",
            hint="name the one file to work on",
        )
    return None


def check_strays(directory: str, index: Index, suffix: str) -> list[str]:
    """Weight files beside an index that does not name them: InputError, or a warning.

    A file that is numbered like a shard, or that would be the whole model, is part of this
    checkpoint or of another one: leaving it out could lose weights. Other files are mentioned.
    """
    used = set(index.shards)
    lone = index.name.removesuffix(INDEX_SUFFIX)
    strays = [n for n in _names(directory, directory) if n.endswith(suffix) and n not in used]
    if lone in strays:
        raise InputError(
            f"both {show(lone)} and an index that does not use it: which one is the model?",
            hint=f"remove one of them, or name {show(lone)} itself",
        )
    for stray in strays:
        numbered = _NUMBERED.fullmatch(stray)
        if numbered and numbered[1] + suffix == lone:
            raise InputError(
                f"{show(index.name)}: {show(stray)} lies beside it and is not listed",
                hint="leaving it out could lose weights: write the index again",
            )
    return [f"not in {show(index.name)}, ignored: {_listed(strays)}"] if strays else []


def find_sidecars(directory: str, used: set[str]) -> Sidecars:
    """Files of `directory` and its folders that belong to the model but are not its weights.

    used  weight and index files of the checkpoint itself (and config.json): never listed
    Hidden files and folders, weights, special files and links that lead out are left behind.
    """
    result = Sidecars()
    modules = _module_folders(directory)
    left: list[str] = []

    def note_error(error: OSError) -> None:
        name = os.path.relpath(error.filename or directory, directory)
        result.warnings.append(f"{show(name)}: cannot be listed, not copied")

    for folder, folders, files in os.walk(directory, onerror=note_error, followlinks=False):
        relative_folder = os.path.relpath(folder, directory)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n != "__pycache__")
        for name in [n for n in folders if os.path.islink(os.path.join(folder, n))]:
            folders.remove(name)  # it may lead anywhere, also back to where the walk began
            relative = os.path.normpath(os.path.join(relative_folder, name))
            result.warnings.append(f"{show(relative)}: a link to a folder, not copied")
        for name in sorted(files):
            relative = os.path.normpath(os.path.join(relative_folder, name))
            if name.startswith(".") or relative in used:
                continue
            if any(fnmatch(name, pattern) for pattern in _WEIGHTS):
                # A module of a sentence-transformers model (a Dense layer on top) is not part
                # of the checkpoint proper, but the model is broken without it.
                is_module = relative_folder in modules
                if not is_module or not name.endswith(".safetensors"):
                    if is_module or _is_worth_a_word(relative, used):
                        left.append(relative)
                    continue
            if not _is_copyable(directory, relative):
                result.warnings.append(f"{show(relative)}: not a regular file inside, not copied")
                continue
            result.files.append(relative)
            if name.endswith(".py"):
                result.code.append(relative)
            if len(result.files) > _MAX_SIDECARS:
                raise InputError(
                    f"the directory holds more than {_MAX_SIDECARS} files beside the weights",
                    hint="is this the checkpoint's own directory?",
                )
    if left:
        result.warnings.append(f"not copied, for their names are those of weights: {_listed(left)}")
    return result


def _is_worth_a_word(relative: str, used: set[str]) -> bool:
    """Whether a file that looks like weights is left behind and nothing else says so.

    Not an index, what a training run left, or what `find_weights` and `check_strays` mention.
    """
    folder, name = os.path.split(relative)
    if name.endswith(INDEX_SUFFIX) or any(fnmatch(name, p) for p in _TRAINING_STATE):
        return False
    return bool(folder) or os.path.splitext(name)[1] not in {os.path.splitext(u)[1] for u in used}


def _names(directory: str, shown: str) -> list[str]:
    """Names in a directory in order, hidden ones left out."""
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except OSError as error:
        raise read_error(error, shown) from None


def _is_copyable(directory: str, relative: str) -> bool:
    try:
        real = resolve_inside(directory, relative)
        return stat.S_ISREG(os.lstat(real).st_mode)
    except (InputError, OSError):
        return False


def _module_folders(directory: str) -> set[str]:
    """Folders that a sentence-transformers `modules.json` names, if there is a valid one."""
    try:
        file = open_inside(directory, "modules.json")
    except InputError:
        return set()
    try:
        modules = strict_json.parse(file.read_all(_MAX_MODULES), file.name, floats=True)
    except InputError:
        return set()  # it is copied as it is, whatever it says
    finally:
        file.close()
    if not isinstance(modules, list):
        return set()
    paths = [module.get("path") for module in modules if isinstance(module, dict)]
    return {os.path.normpath(path) for path in paths if isinstance(path, str) and path}


def _listed(names: list[str], limit: int = 5) -> str:
    text = ", ".join(show(name) for name in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"
