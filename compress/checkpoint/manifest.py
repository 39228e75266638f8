"""The manifest: every file of an output with size and SHA-256, how it was made, a self-digest."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import __version__
from compress.checkpoint import strict_json
from compress.checkpoint.files import open_inside, read_error, resolve_inside
from compress.errors import InputError, VerifyError, show

NAME = "manifest.json"
VERSION = 1
READS = (1,)  # every version that was ever released: each has golden outputs (tests/golden)
TOOL = "compress-checkpoints"
# Formats of what `export` wrote into a directory of its own: no checkpoints of ours.
GENAI, GRAPH = "genai", "onnx-graph"
_MAX_BYTES = 256 << 20


class NewerManifest(InputError):
    """It is ours, of a version that this program does not read."""


@dataclass(frozen=True)
class FileRecord:
    """What is kept of a file."""

    nbytes: int
    sha256: str


def build(
    files: Mapping[str, FileRecord],
    *,
    source: Mapping[str, Any],
    recipe: Mapping[str, Any],
    format_name: str,
    run: Mapping[str, Any],
    decoded: Mapping[str, str] | None = None,
) -> bytes:
    """The manifest's bytes. Everything but `run` and `digest` is the same on every run.

    decoded  tensor name -> SHA-256 of its decoded values, where they were asked for
    """
    body = {
        "manifest_version": VERSION,
        "tool": {"name": TOOL, "version": __version__},
        "format": format_name,
        "source": dict(source),
        "recipe": dict(recipe),
        "files": {n: {"bytes": r.nbytes, "sha256": r.sha256} for n, r in sorted(files.items())},
        "run": dict(run),
    }
    if decoded is not None:
        body["decoded"] = dict(sorted(decoded.items()))
    return _spell(body | {"digest": digest_of(body)})


def load(directory: Path) -> dict[str, Any]:
    """The manifest in `directory` with every field that is used of the right type.

    Raises InputError, also where there is none, and NewerManifest; its digest is not looked at.
    """
    return _load(directory)[0]


def _load(directory: Path) -> tuple[dict[str, Any], bytes]:
    """The manifest and its bytes."""
    file = open_inside(os.path.realpath(directory), NAME)
    try:
        raw = file.read_all(_MAX_BYTES)
    finally:
        file.close()
    body = strict_json.loads(raw, NAME)
    tool = body.get("tool") if isinstance(body, dict) else None
    if not isinstance(tool, dict) or tool.get("name") != TOOL:
        raise InputError(f"{NAME}: not a manifest of {TOOL}")
    version = body.get("manifest_version")
    if type(version) is not int or version not in READS:
        raise NewerManifest(
            f"{NAME}: a manifest of version {show(str(version))}, this program reads up to"
            f" {VERSION}",
            hint="a newer version of this program wrote it",
        )
    if not isinstance(body.get("format"), str) or not isinstance(body.get("files"), dict):
        raise InputError(f"{NAME}: no format or no list of files")
    for name, record in body["files"].items():
        if not _is_place(name):
            raise InputError(f"{NAME}: {show(name)} is no place inside of the output")
        if read_record(record) is None:
            raise InputError(f"{NAME}: no size and SHA-256 of {show(name)}")
    if not all(isinstance(body.get(part), dict) for part in ("source", "recipe", "run")):
        raise InputError(f"{NAME}: does not say what was made of what")
    decoded = body.get("decoded", {})
    if not isinstance(decoded, dict) or not all(isinstance(v, str) for v in decoded.values()):
        raise InputError(f"{NAME}: its hashes of decoded tensors are no hashes")
    return body, raw


def _is_place(name: str) -> bool:
    """Whether a name from a file is a plain relative path that stays below where it is joined."""
    return (
        name not in ("", ".")
        and "\0" not in name
        and not os.path.isabs(name)
        and os.path.normpath(name) == name
        and name.split(os.sep, maxsplit=1)[0] != os.pardir
    )


def read(directory: Path) -> dict[str, Any]:
    """The manifest of an output, its self-digest checked. Raises VerifyError."""
    if not os.path.lexists(directory / NAME):
        raise VerifyError(
            f"{show(str(directory))}: no {NAME}", hint="verify works on outputs of this tool"
        )
    try:
        body, raw = _load(directory)
    except InputError as error:
        raise VerifyError(error.message, hint=error.hint) from error
    # The digest is of what the text says, which "1e-5" and "1E-5" say alike.
    spelled = _spell(body) == raw
    digest = body.pop("digest", None)
    if digest != digest_of(body) or not spelled:
        raise VerifyError(f"{NAME}: its own digest does not match: the manifest was changed")
    return body


def _spell(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=1) + "\n").encode()


def verify_files(directory: Path, body: Mapping[str, Any]) -> int:
    """Re-hash every file against the manifest; returns the bytes read. Raises VerifyError."""
    listed = {name: read_record(record) for name, record in body["files"].items()}
    present = set()
    for name, status in entries_of(directory):
        if not stat.S_ISREG(status.st_mode):
            raise VerifyError(f"{show(name)}: a link or a special file, not a regular file")
        present.add(name)
    present.discard(NAME)
    if missing := sorted(set(listed) - present):
        raise VerifyError(f"{show(missing[0])}: missing ({len(missing)} file(s) in all)")
    if extra := sorted(present - set(listed)):
        raise VerifyError(f"{show(extra[0])}: not in the manifest ({len(extra)} file(s) in all)")
    total = 0
    for name, expected in listed.items():
        try:
            found = record_of(directory, name)
        except InputError as error:
            raise VerifyError(error.message) from error
        if expected is None or found.nbytes != expected.nbytes:
            said = expected.nbytes if expected else "nothing"
            raise VerifyError(f"{show(name)}: {found.nbytes} bytes, the manifest says {said}")
        if found.sha256 != expected.sha256:
            raise VerifyError(f"{show(name)}: its SHA-256 differs from the manifest's")
        total += found.nbytes
    return total


def record_of(directory: Path, relative: str) -> FileRecord:
    """Size and SHA-256 of a regular file, with no link on the way. Raises InputError."""
    real = os.path.realpath(directory)
    if resolve_inside(real, relative) != os.path.join(real, relative):
        raise InputError(f"{show(relative)}: a symbolic link")
    file = open_inside(real, relative)
    try:
        digest = hashlib.sha256()
        file.update(digest)
        return FileRecord(file.size, digest.hexdigest())
    finally:
        file.close()


def read_record(record: object) -> FileRecord | None:
    """A record as the manifest spells it, None for anything else."""
    if not isinstance(record, dict):
        return None
    nbytes, sha256 = record.get("bytes"), record.get("sha256")
    if type(nbytes) is not int or nbytes < 0 or not isinstance(sha256, str):
        return None
    return FileRecord(nbytes, sha256)


def entries_of(directory: Path) -> Iterator[tuple[str, os.stat_result]]:
    """(relative path, status of the entry itself) of everything below but real directories."""
    todo = [""]
    while todo:
        prefix = todo.pop()
        try:
            with os.scandir(os.path.join(directory, prefix)) as entries:
                for entry in entries:
                    name = os.path.join(prefix, entry.name)
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        todo.append(name)
                    else:
                        yield name, status
        except OSError as error:
            raise read_error(error, os.path.join(str(directory), prefix)) from None


def digest_of(body: Any) -> str:
    """SHA-256 over the canonical JSON of `body`."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
