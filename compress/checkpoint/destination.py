"""What OUT may be: new, or an old output that may be replaced, and nowhere near the source."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from compress.checkpoint import manifest
from compress.errors import InputError, ResourceError, UsageError, from_os_error, show

_MAX_LEVELS = 500  # folders are made by a function that calls itself for each
_OWN_ONLY = "--overwrite only replaces its own outputs; remove it yourself or choose another"


def stage_folder(out: Path) -> Path:
    """Where an output is prepared: OUT.partial, beside it and so on the same file system."""
    return _beside(out, "{}.partial")


def lock_file(out: Path) -> Path:
    """The file whose lock a run holds."""
    return _beside(out, ".{}.lock")


def check_place(out: Path) -> None:
    """Refuse an OUT that cannot be made: too deep, or below a file. Raises UsageError."""
    if len(out.parts) > _MAX_LEVELS:
        raise UsageError(f"output {show(str(out))}: more than {_MAX_LEVELS} folders deep")
    parent = next((folder for folder in out.parents if os.path.lexists(folder)), None)
    if parent is not None and not parent.is_dir():
        raise UsageError(
            f"output {show(str(out))}: {show(str(parent))} is not a directory",
            hint="choose another output directory",
        )


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse an OUT that exists, or that is not ours to replace. Raises UsageError."""
    check_place(out)
    if not os.path.lexists(out):
        return
    where = f"output {show(str(out))}"
    if out.is_symlink() or not out.is_dir():
        raise UsageError(f"{where} exists and is not a directory", hint="choose another name")
    if not overwrite:
        raise UsageError(f"{where} exists", hint="--overwrite replaces it; or choose another")
    try:
        if not os.listdir(out):
            return
        if not os.path.lexists(out / manifest.NAME):
            raise UsageError(
                f"{where} was not written by this tool (no {manifest.NAME})", hint=_OWN_ONLY
            )
        listed = manifest.load(out)["files"]
    except InputError as error:
        raise UsageError(
            f"{where} was not written by this tool ({error.message})", hint=_OWN_ONLY
        ) from error
    except OSError as error:
        raise from_os_error(error, doing="cannot look at the old output") from error
    for name, status in sorted(manifest.entries_of(out)):
        if name == manifest.NAME or (name in listed and stat.S_ISREG(status.st_mode)):
            continue
        raise UsageError(
            f"{where} holds {show(name)}, which this tool did not write",
            hint="move that file away or choose another output",
        )


def refuse_overlap(source: Path, out: Path) -> None:
    """Refuse an OUT that would be in the source, around it or over it. Raises UsageError."""
    names = f"output {show(str(out))} and model {show(str(source))} overlap"
    if _overlap(source, [out]):
        raise UsageError(names, hint="choose an output directory outside the model's")
    if _overlap(source, [stage_folder(out), lock_file(out)]):
        raise UsageError(
            f"{names}: {show(str(stage_folder(out)))} is used while the output is written",
            hint="choose another name for the output",
        )


def check_report_file(report: Path, source: Path, out: Path) -> None:
    """Refuse now what would fail when the work is done. Raises UsageError, ResourceError."""
    where = f"report {show(str(report))}"
    if report.is_dir():
        raise UsageError(f"{where}: a directory", hint="name a file")
    folder = Path(os.path.abspath(report)).parent
    if not folder.is_dir():
        raise UsageError(f"{where}: there is no directory {show(str(folder))}", hint="create it")
    real = Path(os.path.realpath(report))
    for taken in (source, out, stage_folder(out), lock_file(out)):
        place = Path(os.path.realpath(taken))
        if place == real or place in real.parents:
            raise UsageError(
                f"{where}: lies in {show(str(taken))}", hint="choose a place of its own"
            )
    place, mode = (report, os.W_OK) if report.exists() else (folder, os.W_OK | os.X_OK)
    if not os.access(place, mode):
        raise ResourceError(
            f"{where}: {show(str(place))} is not writable", hint="choose another place"
        )


def _overlap(source: Path, targets: Iterable[Path]) -> bool:
    real = Path(os.path.realpath(source))
    places = [Path(os.path.realpath(target)) for target in targets]
    return any(p == real or real in p.parents or p in real.parents for p in places)


def _beside(out: Path, pattern: str) -> Path:
    whole = Path(os.path.abspath(out))
    return whole.with_name(pattern.format(whole.name))
