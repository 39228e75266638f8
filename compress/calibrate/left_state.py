"""What an interrupted calibration left in its stage: the state beside the file, and its files.

A stage that was left lies in a folder that others may write to as well. So the state is parsed
field by field, and a file counts only if it is the stage's own: a regular file, no link of any
kind, which could lead to a file of somebody else.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from compress.calibrate.statistics import Site, parse_site, spell_site
from compress.checkpoint.files import is_plain_name, open_inside
from compress.checkpoint.writer import nbytes_of
from compress.errors import InputError, ResourceError

STATE = ".calibration.json"
TAGS = {"float32": "F32", "int32": "I32", "int64": "I64", "uint8": "U8"}
_MAX_STATE = 1 << 28
_CHUNK = 1 << 20
Spec = tuple[str, str, tuple[int, ...]]


@dataclass
class State:
    """What is in the file so far."""

    steps: list[str] = field(default_factory=list)
    end: int = 0  # of the data, in bytes
    sha256: str = ""  # of the data
    specs: list[Spec] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)  # files of the run itself: name -> SHA-256

    def to_bytes(self) -> bytes:
        """The state after a digest of it."""
        body = json.dumps(vars(self) | {"sites": [spell_site(s) for s in self.sites]}).encode()
        return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def read_state(folder: Path) -> State | None:
    """The state as it was committed last; None where there is none or anything in it is odd."""
    try:
        file = open_inside(os.path.realpath(folder), STATE)
        try:
            digest, _, body = file.read_all(_MAX_STATE).partition(b"\n")
        finally:
            file.close()
        if digest != hashlib.sha256(body).hexdigest().encode():
            return None
        return _parse(json.loads(body))
    except (InputError, ResourceError, KeyError, TypeError, ValueError, RecursionError):
        return None


def _parse(body: dict[str, Any]) -> State:
    """Raises KeyError, TypeError or ValueError for what `State.to_bytes` does not write."""
    specs = [_spec(name, tag, shape) for name, tag, shape in body["specs"]]
    sites = [parse_site(spelled) for spelled in body["sites"]]
    if not isinstance(body["steps"], list) or not isinstance(body["kept"], dict):
        raise TypeError("steps, kept")
    state = State(body["steps"], body["end"], body["sha256"], specs, sites, body["kept"])
    texts = [*state.steps, state.sha256, *state.kept.values()]
    right = (
        body.keys() == vars(state).keys()
        and len(state.steps) > 0
        and all(isinstance(text, str) for text in texts)
        and type(state.end) is int
        and state.end == sum(nbytes_of(tag, shape) for _, tag, shape in specs)
        and len({name for name, _, _ in specs}) == len(specs)
        and [site.number for site in sites] == list(range(len(sites)))
        and all(site.tensors for site in sites)
        and all(is_plain_name(name) for name in state.kept)
    )
    if not right:
        raise ValueError("not a state of ours")
    return state


def _spec(name: object, tag: object, shape: list[int]) -> Spec:
    known = isinstance(name, str) and isinstance(tag, str) and tag in TAGS.values()
    if not known or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("not an array of ours")
    return str(name), str(tag), tuple(shape)


def open_own(folder: Path, name: str, *, write: bool = False) -> BinaryIO:
    """A file of the stage, to be read, or to be changed as well.

    folder  which the file must lie in, itself no link
    Raises OSError for anything but a regular file with one name.
    """
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | flags)
    try:  # a named pipe does not block, and is then refused
        access = os.O_RDWR if write else os.O_RDONLY
        descriptor = os.open(name, access | os.O_NONBLOCK | flags, dir_fd=inside)
    finally:
        os.close(inside)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(descriptor)
        raise OSError(f"{name} is not a file of the stage alone")
    return os.fdopen(descriptor, "r+b" if write else "rb")


def sha256_of(folder: Path, name: str) -> str:
    """SHA-256 of a file of the stage. Raises OSError as `open_own` does."""
    digest = hashlib.sha256()
    with open_own(folder, name) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
