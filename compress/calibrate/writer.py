"""Writes the statistics file step by step, so that an interrupted calibration can go on.

Data follows a header of a size that is reserved at the start: the arrays of a step (a block) are
appended when it is done, and a state beside the file says how far it is good. The header is filled
in at the end; then the file becomes OUT in one rename.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from compress.calibrate.collect import SiteSums
from compress.calibrate.left_state import STATE, TAGS, State, open_own, read_state, sha256_of
from compress.calibrate.soundness import LARGEST, largest
from compress.calibrate.statistics import HELD_OUT, KEY, Record, Site, open_statistics
from compress.checkpoint.file_stage import FileStage
from compress.checkpoint.writer import header_bytes, nbytes_of
from compress.errors import InputError, from_os_error, show
from compress.tensor import Array

_CHUNK = 1 << 20


class StatisticsWriter:
    """The statistics file that is being made.

    room  bytes reserved for the header (see `header_room`)
    key   equal for calibrations that give the same bytes

    Use as a context manager: an error removes what was written, an interruption keeps the steps
    that were committed. Raises UsageError where OUT exists or is not ours, BusyError where another
    run writes it, ResourceError.
    """

    def __init__(
        self, out: Path, *, room: int, key: str = "", overwrite: bool = False,
        resume: bool = False, fsync: bool = True,
    ) -> None:  # fmt: skip
        self._stage = FileStage(out, overwrite=overwrite, is_ours=_is_ours, fsync=fsync)
        self._room = room
        self._state = State()
        self._digest = hashlib.sha256()
        try:
            kept = self._stage.open(key=key, resume=resume)
            taken = self._take_up() if kept else None
            if taken is None:
                self._stage.keep_only(set())
                self._state = State()
                self._digest = hashlib.sha256()
                taken = open(self._stage.file, "xb")  # noqa: SIM115
            self._file: BinaryIO = taken
            self._file.truncate(room + self._state.end)
            self._file.seek(room + self._state.end)
        except OSError as error:
            self._stage.abandon()
            raise from_os_error(error, doing="cannot write the statistics") from error
        except BaseException:
            self._stage.abandon()
            raise

    def __enter__(self) -> StatisticsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        from compress.errors import Interrupted

        self._file.close()
        interrupted = kind is not None and issubclass(kind, (Interrupted, KeyboardInterrupt))
        if interrupted and self._state.steps:
            self._stage.release()  # for --resume
        else:
            self._stage.abandon()
        if isinstance(error, OSError):
            raise from_os_error(error, doing="cannot write the statistics") from error

    # ------------------------------------------------------------ for engines

    @property
    def folder(self) -> Path:
        """Where an engine may keep files of its own; they go with the stage."""
        return self._stage.folder

    @property
    def steps(self) -> tuple[str, ...]:
        """What a calibration that is resumed has committed already, in order."""
        return tuple(self._state.steps)

    def add_site(self, tensors: Sequence[str], sums: SiteSums) -> None:
        """Append the arrays of one site, which all of `tensors` read."""
        number = len(self._state.sites)
        site = Site(number, tuple(tensors), sums.count, sums.held_out_count, sums.blocks)
        for kind in sorted(sums.kinds):
            if sums.held_out_count if kind == HELD_OUT else sums.count:
                pieces = (_bounded(p, "inputs", tensors[0]) for p in sums.pieces(kind))
                self._add(site.key(kind), "F32", sums.shape(kind), pieces)
        self._state.sites.append(site)

    def add_site_array(self, kind: str, values: Array) -> None:
        """Append another array of the site that was added last."""
        site = self._state.sites[-1]
        pieces = [_bounded(values, "inputs", site.tensors[0])]
        self._add(site.key(kind), "F32", values.shape, pieces)

    def add_tensor(self, tensor: str, kind: str, values: Array) -> None:
        """Append an array of one tensor: its `output_fisher` [rows]."""
        pieces = [_bounded(values.astype(np.float32), "gradients", tensor)]
        self._add(f"tensor/{tensor}/{kind}", "F32", values.shape, pieces)

    def commit(self, step: str, files: Iterable[str] = ()) -> None:
        """The step is done: a resumed calibration goes on behind it.

        files  names in `folder` that the engine will want to find then; others are removed
        """
        self._file.flush()
        self._stage.sync(self._file.fileno())
        state = self._state
        state.steps.append(step)
        state.sha256 = self._digest.copy().hexdigest()
        state.kept = {name: sha256_of(self.folder, name) for name in files}
        self._stage.write_own(STATE, state.to_bytes())
        self._stage.keep_only({STATE, self._inside(), *state.kept})

    # ------------------------------------------------------------ for the driver

    def reached(self) -> dict[str, set[str]]:
        """Kinds that are in the file so far, by tensor."""
        found: dict[str, set[str]] = {}
        present = {name for name, _, _ in self._state.specs}
        for site in self._state.sites:
            kinds = {name.rpartition("/")[2] for name in present if name == site.key(_kind(name))}
            for tensor in site.tensors:
                found.setdefault(tensor, set()).update(kinds)
        for name in present:
            if name.startswith("tensor/"):
                tensor, _, kind = name.removeprefix("tensor/").rpartition("/")
                found.setdefault(tensor, set()).add(kind)
        return found

    def sites(self) -> tuple[Site, ...]:
        """The sites so far."""
        return tuple(self._state.sites)

    def add_inputs(self, arrays: Mapping[str, Array]) -> None:
        """Append what the model was given."""
        for name, values in sorted(arrays.items()):
            self._add(f"inputs/{name}", TAGS[values.dtype.name], values.shape, [values])

    def finish(self, record: Record) -> None:
        """Fill in the header and give the file its name."""
        header = header_bytes(self._state.specs, {"format": "np", KEY: record.to_json()})
        spare = self._room - len(header)
        if spare < 0:
            raise RuntimeError(f"a header of {len(header)} bytes, {self._room} were reserved")
        length = (len(header) - 8 + spare).to_bytes(8, "little")
        try:
            self._file.seek(0)
            self._file.write(length + header[8:] + b" " * spare)
            self._file.flush()
            self._stage.sync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise from_os_error(error, doing="cannot write the statistics") from error
        self._stage.publish()

    # ------------------------------------------------------------ inside

    def _add(self, name: str, tag: str, shape: Sequence[int], pieces: Iterable[Array]) -> None:
        written = 0
        for piece in pieces:
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            self._digest.update(data)
            self._file.write(data)
            written += data.nbytes
        if written != nbytes_of(tag, shape):
            raise RuntimeError(f"{name}: {written} bytes, not {nbytes_of(tag, shape)}")
        self._state.specs.append((name, tag, tuple(shape)))
        self._state.end += written

    def _inside(self) -> str:
        return f"{self._stage.path.name}/{self._stage.file.name}"

    def _take_up(self) -> BinaryIO | None:
        """The open file, if what was committed is there and unchanged; else None.

        The state and the digest are then its.
        """
        state = read_state(self.folder)
        if state is None:
            return None
        with suppress(OSError), ExitStack() as stack:
            if any(sha256_of(self.folder, n) != digest for n, digest in state.kept.items()):
                return None
            file = open_own(self._stage.path, self._stage.file.name, write=True)
            stack.callback(file.close)
            file.seek(self._room)
            left = state.end
            while left and (chunk := file.read(min(_CHUNK, left))):
                self._digest.update(chunk)
                left -= len(chunk)
            if not left and self._digest.hexdigest() == state.sha256:
                self._state = state
                self._stage.keep_only({STATE, self._inside(), *state.kept})
                stack.pop_all()
                return file
        return None


def header_room(tensors: Iterable[str], data: Mapping[str, Any]) -> int:
    """Bytes that any header of statistics of these tensors fits into, a multiple of 8."""
    # Each tensor: a site of its own with four arrays, two arrays that carry its name, its name in
    # the record; JSON may escape a character as six.
    each = sum(4 * 160 + 2 * (160 + 6 * len(name)) + 12 * len(name) + 120 for name in tensors)
    whole = 4096 + each + 2 * len(json.dumps(dict(data)))
    return whole + -whole % 8


def _kind(name: str) -> str:
    return name.rpartition("/")[2]


def _bounded(values: Array, what: str, tensor: str) -> Array:
    """The means as they are. Raises InputError for those that nothing could be made of."""
    most = largest(values)
    if not most <= LARGEST:
        raise InputError(
            f"tensor {show(tensor)}: the mean of products of its {what} reaches {most:.3g}, more"
            f" than {LARGEST:.0e}",
            hint="the model overflows on these inputs: leave the tensor out with ignore",
        )
    return values


def _is_ours(path: Path) -> None:
    open_statistics(path).close()
