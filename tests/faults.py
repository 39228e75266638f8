"""Faults at the Nth operation of writing: the tools of tests and of bench/faults.py."""

from __future__ import annotations

import builtins
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toolbox import tree

from compress import spills
from compress.calibrate import writer as statistics
from compress.checkpoint import renames, small_files, stage, writer
from compress.errors import ResourceError
from compress.export_onnx import parity

CODES = (errno.ENOSPC, errno.EIO, errno.EACCES)
Act = Callable[[], object]


class Faults:
    """Counts operations and fails the one that is due, once or from there on."""

    def __init__(self, code: int, due: int, *, for_good: bool = False) -> None:
        self.code, self.due, self.for_good, self.count = code, due, for_good, 0

    def step(self) -> None:
        self.count += 1
        if self.count == self.due or (self.for_good and self.count > self.due):
            raise OSError(self.code, os.strerror(self.code))

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.step()
            return function(*arguments, **keywords)

        return call

    def open(self, path: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        file = builtins.open(path, mode, *arguments, **keywords)  # noqa: SIM115
        if not set(mode) & set("wx+"):
            return file
        return Counted(file, self)

    def install(self, patch: pytest.MonkeyPatch, *, native: bool = True) -> None:
        """Into the modules that write; other users of `os` in the process are left alone."""
        faulty = SimpleNamespace(
            replace=self.wrapped(os.replace),
            rename=self.wrapped(os.rename),
            fsync=self.wrapped(lambda fd: None),  # the disk is not what is tested
        )
        shim = Shim(os, faulty)
        for module in (stage, renames, writer, small_files):
            patch.setattr(module, "os", shim)
        for module in (stage, writer, small_files, spills, statistics, parity):
            patch.setattr(module, "open", self.open, raising=False)
        patch.setattr(Path, "mkdir", self.wrapped(Path.mkdir))
        patch.setattr(Path, "write_bytes", self.wrapped(Path.write_bytes))
        real = renames._renameat2
        patch.setattr(renames, "_renameat2", self.wrapped(real) if native else lambda *_: False)


class Shim:
    """A module with some names replaced."""

    def __init__(self, module: Any, faulty: SimpleNamespace) -> None:
        self._module, self._faulty = module, faulty

    def __getattr__(self, name: str) -> Any:
        return getattr(self._faulty, name, None) or getattr(self._module, name)


class Counted:
    """A file open for writing whose writes may fail."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def write(self, data: Any) -> int:
        self._faults.step()
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@dataclass
class Count:
    """What became of the faults that were injected."""

    operations: int = 0
    injected: int = 0
    refused: int = 0  # clean errors after which everything was as before
    tolerated: int = 0  # complete all the same
    broken: int = 0


def inject(folder: Path, act: Act, codes: Callable[[int], Sequence[int]]) -> Count:
    """Fail operation 1, 2, 3 ... until there is none; `codes` says with which errors each.

    After each, the folder must be what it was, to the byte, or hold the complete result.
    """
    count, spare = Count(), folder.with_name(folder.name + "-spare")
    shutil.copytree(folder, spare)
    before = snapshot(folder)
    act()
    wanted = content(folder)
    while True:
        for code in codes(count.operations + 1):
            if snapshot(folder) != before:
                shutil.rmtree(folder)
                shutil.copytree(spare, folder)
            faults = Faults(code, count.operations + 1)
            error = _meet(act, faults)
            if faults.count < faults.due:
                return count
            count.injected += 1
            if error is None and content(folder) == wanted and not _litter(folder):
                count.tolerated += 1
            elif os.strerror(code) in str(error) and snapshot(folder) == before:
                count.refused += 1
            else:
                count.broken += 1
                what = error or "another result, or something beside it"
                print(f"operation {faults.due}, {errno.errorcode[code]}: {what}")
        count.operations += 1


def _meet(act: Act, faults: Faults) -> ResourceError | OSError | None:
    with pytest.MonkeyPatch.context() as patch:
        faults.install(patch)
        try:
            act()
        except (ResourceError, OSError) as error:  # the command line makes exit 6 of both
            return error
    return None


def _litter(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != "out"]


def snapshot(folder: Path) -> dict[str, str]:
    """Every name in the folder, stages and locks too, with what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


def content(folder: Path) -> dict[str, str]:
    """The same without figures of time."""
    return tree(folder / "out") if (folder / "out").is_dir() else snapshot(folder)
