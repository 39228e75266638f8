"""The one commit routine: a locked, marked stage beside OUT, fsynced files, one final rename.

OUT.partial holds a marker, what a run keeps for itself, and in `out/` the files of the output.
That folder becomes OUT (or is exchanged with an old OUT), so that OUT is at every moment either
what it was or the complete new result. The old one ends up in the stage, behind the same marker.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from compress.checkpoint import manifest, strict_json
from compress.checkpoint.destination import check_out, stage_folder
from compress.checkpoint.files import InputFile, open_inside
from compress.checkpoint.manifest import FileRecord
from compress.checkpoint.out_lock import OutLock
from compress.checkpoint.renames import (
    rename_new,
    replace,
    restore,
    sync_directory,
    sync_directory_fd,
)
from compress.errors import InputError, ResourceError, UsageError, from_os_error, show
from compress.interrupts import deferred

MARKER = ".stage.json"
_CONTENT = "out"  # becomes OUT
_OLD = "old"  # where an old OUT waits on file systems that cannot exchange two names
_COPY_CHUNK = 8 << 20
_MAX_MARKER = 1 << 16


class Stage:
    """The folder OUT.partial, held under a lock that dies with the process.

    Nothing is touched before `open`; then exactly one of `publish`, `abandon` and `release`
    must follow (`abandon` and `release` may always be called).

    folder  OUT.partial itself; what lies there is never published
    path    the folder in it that becomes OUT
    """

    def __init__(self, out: Path, *, overwrite: bool, fsync: bool = True) -> None:
        self.out = Path(os.path.abspath(out))
        self.folder = stage_folder(self.out)
        self.path = self.folder / _CONTENT
        self._result = self.path  # what becomes OUT
        self.fsync = fsync
        self._overwrite = overwrite
        self._lock = OutLock(self.out)
        self._claimed = False

    def open(self, *, key: str = "", resume: bool = False) -> bool:
        """Take the lock and the folder; whether it holds what a run with the same `key` left.

        Raises BusyError where another run holds OUT, UsageError where OUT or the stage is not ours
        to replace or another `key` is to be resumed, ResourceError where the file system refuses.
        """
        self._check_out()
        try:
            with deferred():
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self._lock.take()
                kept = self._claim(key, resume)
        except OSError as error:
            raise from_os_error(error, doing="cannot create the stage") from error
        return kept

    def write_file(self, name: str, content: bytes) -> FileRecord:
        """Write one small file of the output (folders in `name` are created)."""
        return self._write(self.path / name, content)

    def write_own(self, name: str, content: bytes) -> FileRecord:
        """Write one small file that is for the run itself and is not published."""
        return self._write(self.folder / name, content)

    def copy_file(self, name: str, source: InputFile) -> FileRecord:
        """Copy an open file and close it; only its content is taken, not its mode."""
        target = self.path / name
        temporary = target.with_name(target.name + ".tmp")
        digest = hashlib.sha256()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as writer:
                for start in range(0, source.size, _COPY_CHUNK):
                    chunk = source.read(start, min(_COPY_CHUNK, source.size - start))
                    writer.write(chunk)
                    digest.update(chunk)
                writer.flush()
                self.sync(writer.fileno())
            source.check_unchanged()
        finally:
            source.close()
        os.replace(temporary, target)
        return FileRecord(source.size, digest.hexdigest())

    def take_file(self, name: str, source: Path, record: FileRecord) -> None:
        """Give a file of the output that is replaced to the new one: linked, or copied.

        `record` is what its manifest says; a copy is held to it. Raises InputError.
        """
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # a file system without hard links
            if self.copy_file(name, open_inside(str(source.parent), source.name)) != record:
                raise InputError(
                    f"{show(name)}: not what the manifest says", hint="see compress verify"
                ) from None

    def sync(self, fd: int) -> None:
        """fsync unless told not to."""
        if self.fsync:
            os.fsync(fd)

    def keep_only(self, names: Set[str]) -> None:
        """Remove everything but these files (relative to `folder`) and the marker."""
        try:
            _prune(self.folder, "", {*names, MARKER})
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise from_os_error(error, doing="cannot clean the stage") from error

    def publish(self) -> None:
        """Make the content the output in one step.

        Raises UsageError where OUT appeared meanwhile, ResourceError; OUT is then unchanged.
        """
        try:
            if self.fsync:
                for folder, _, _ in os.walk(self.path):
                    sync_directory(folder)
            with deferred():
                self._commit()
                self.abandon()  # what is left: the marker, and the old output
        except FileExistsError as error:
            raise UsageError(
                f"output {show(str(self.out))} appeared while it was being written",
                hint="--overwrite replaces it; or choose another",
            ) from error
        except OSError as error:
            raise from_os_error(error, doing="cannot publish") from error

    def abandon(self) -> None:
        """Remove the stage and give the lock back: nothing of this run is left behind."""
        with deferred():
            if self._claimed:
                with contextlib.suppress(OSError):
                    self._put_back()
                    _prune(self.folder, "", {MARKER})
                    # The marker goes last: a stage that was half removed is still known as ours.
                    (self.folder / MARKER).unlink(missing_ok=True)
                    os.rmdir(self.folder)
                self._claimed = False
            self.release()

    def release(self) -> None:
        """Give the lock back (the stage, if any, stays for `--resume`)."""
        self._lock.give_back()

    def _check_out(self) -> None:
        """Refuse an OUT that exists, or that is not ours to replace. Raises UsageError."""
        check_out(self.out, overwrite=self._overwrite)

    def _claim(self, key: str, resume: bool) -> bool:
        """Make the stage ours, fresh or with what is to be resumed."""
        found = _look(self.folder, self.out.name)
        kept = False
        if found is not None:
            if resume and found.get("key") not in (None, key):
                raise UsageError(
                    f"{show(str(self.folder))} was begun with another model, recipe or version",
                    hint="run without --resume to start afresh",
                )
            self._put_back()
            kept = resume and found.get("key") == key
        self._check_out()  # again: nobody else can publish now
        if found is None:
            self.folder.mkdir()
        self._claimed = True
        if not kept:
            _prune(self.folder, "", {MARKER})
            marker = {"tool": manifest.TOOL, "out": self.out.name, "key": key}
            self._write(self.folder / MARKER, json.dumps(marker).encode())
            if self.fsync:
                sync_directory(self.folder)
        self.path.mkdir(exist_ok=True)
        return kept

    def _put_back(self) -> None:
        """Where an exchange by renames was cut off in the middle, give OUT its old content."""
        old = self.folder / _OLD
        if os.path.lexists(old) and not os.path.lexists(self.out):
            os.rename(old, self.out)

    def _commit(self) -> None:
        """The rename. What can fail is done before it, or undoes it. Raises OSError, UsageError."""
        parent = os.open(self.out.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            old = None
            if os.path.lexists(self.out):
                self._check_out()
                old = replace(self._result, self.out, aside=self.folder / _OLD)
            else:
                rename_new(self._result, self.out)
            try:
                if self.fsync:
                    sync_directory_fd(parent)
            except OSError:
                self._undo(old)
                raise
        finally:
            os.close(parent)

    def _undo(self, old: Path | None) -> None:
        """Take the new content out of OUT again, and put the old one in."""
        try:
            if old is None:
                os.rename(self.out, self._result)
            else:
                restore(old, self.out, new=self._result)
        except OSError as error:
            if os.path.lexists(self.out):
                raise ResourceError(
                    f"{show(str(self.out))} is complete, but the disk did not confirm its name"
                ) from error

    def _write(self, target: Path, content: bytes) -> FileRecord:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            self.sync(file.fileno())
        os.replace(temporary, target)
        return FileRecord(len(content), hashlib.sha256(content).hexdigest())


@contextlib.contextmanager
def staged(out: Path, *, overwrite: bool, fsync: bool, doing: str) -> Iterator[Stage]:
    """A fresh stage that is published where the block ends, and removed where it fails.

    An OSError becomes a ResourceError that says `doing`.
    """
    stage = Stage(out, overwrite=overwrite, fsync=fsync)
    try:
        stage.open()
        yield stage
        stage.publish()
    except OSError as error:
        stage.abandon()
        raise from_os_error(error, doing=doing) from error
    except BaseException:
        stage.abandon()
        raise


def _look(folder: Path, out_name: str) -> dict[str, Any] | None:
    """The marker of a stage, {} for one that was killed at birth, None where nothing is.

    Raises UsageError for anything that no run for this output made.
    """
    try:
        status = os.lstat(folder)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        if set(os.listdir(folder)) <= {MARKER + ".tmp"}:
            return {}
        marker = _read_marker(folder)
        if marker.get("tool") == manifest.TOOL and marker.get("out") == out_name:
            return marker
    raise UsageError(
        f"{show(str(folder))} is in the way, and no run for this output made it",
        hint="rename or remove it, or choose another output",
    )


def _read_marker(folder: Path) -> dict[str, Any]:
    try:
        file = open_inside(os.path.realpath(folder), MARKER)
        try:
            marker = strict_json.loads(file.read_all(_MAX_MARKER), MARKER)
        finally:
            file.close()
    except InputError:
        return {}
    return marker if isinstance(marker, dict) else {}


def _prune(folder: Path, prefix: str, kept: Set[str]) -> None:
    """Remove what is not in `kept`, without following a link. Raises OSError."""
    for name in os.listdir(folder):
        path, relative = folder / name, prefix + name
        if relative in kept:
            continue
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
        elif any(other.startswith(relative + "/") for other in kept):
            _prune(path, relative + "/", kept)
        else:
            shutil.rmtree(path)
