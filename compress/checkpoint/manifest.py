"""The manifest: every file of an output with size and SHA-256, how it was made, a self-digest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress import __version__
from compress.checkpoint.writer import FileRecord
from compress.errors import VerifyError, show

NAME = "manifest.json"
VERSION = 1
# Written after the manifest's own bytes are fixed, or different on every run.
_OUTSIDE = ("manifest.json",)


def build(
    files: Mapping[str, FileRecord],
    *,
    source: Mapping[str, Any],
    recipe: Mapping[str, Any],
    format_name: str,
    run: Mapping[str, Any],
) -> bytes:
    """The manifest's bytes. Everything but `run` and `digest` is the same on every run."""
    body = {
        "manifest_version": VERSION,
        "tool": {"name": "compress-checkpoints", "version": __version__},
        "format": format_name,
        "source": dict(source),
        "recipe": dict(recipe),
        "files": {n: {"bytes": r.nbytes, "sha256": r.sha256} for n, r in sorted(files.items())},
        "run": dict(run),
    }
    return (json.dumps(body | {"digest": _digest(body)}, indent=1) + "\n").encode()


def read(directory: Path) -> dict[str, Any]:
    """The manifest of an output, its self-digest checked. Raises VerifyError."""
    from compress.checkpoint.strict_json import loads

    path = directory / NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise VerifyError(
            f"{show(str(directory))}: no {NAME}", hint="verify works on outputs of this tool"
        ) from error
    from compress.errors import InputError

    try:
        body = loads(raw, NAME)
    except InputError as error:
        raise VerifyError(f"{NAME}: {error.message}") from error
    if not isinstance(body, dict) or body.get("manifest_version") != VERSION:
        raise VerifyError(f"{NAME}: not a manifest of version {VERSION}")
    digest = body.pop("digest", None)
    if digest != _digest(body) or not isinstance(body.get("files"), dict):
        raise VerifyError(f"{NAME}: its own digest does not match: the manifest was changed")
    return body


def verify_files(directory: Path, body: Mapping[str, Any]) -> int:
    """Re-hash every file against the manifest; returns the bytes read. Raises VerifyError."""
    listed: Mapping[str, Any] = body["files"]
    present = set(_files_of(directory)) - set(_OUTSIDE)
    if missing := sorted(set(listed) - present):
        raise VerifyError(f"{show(missing[0])}: missing ({len(missing)} file(s) in all)")
    if extra := sorted(present - set(listed)):
        raise VerifyError(f"{show(extra[0])}: not in the manifest ({len(extra)} file(s) in all)")
    total = 0
    for name, record in listed.items():
        path = directory / name
        nbytes = path.stat().st_size
        if nbytes != record["bytes"]:
            raise VerifyError(f"{show(name)}: {nbytes} bytes, the manifest says {record['bytes']}")
        if hash_file(path) != record["sha256"]:
            raise VerifyError(f"{show(name)}: its SHA-256 differs from the manifest's")
        total += nbytes
    return total


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return _file_digest(file)


def _file_digest(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(8 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _files_of(directory: Path) -> list[str]:
    found = []
    for folder, _, names in os.walk(directory):
        for name in names:
            found.append(os.path.relpath(os.path.join(folder, name), directory))
    return found


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
