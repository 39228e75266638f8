"""`manifest.json`: read as `verify` reads it. What is taken was spelled by us, down to the byte.

The first byte says whether the text is taken as it is, or spelled and given the digest that fits
(where it is JSON at all): a fuzzer does not guess a SHA-256.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from compress.checkpoint import manifest
from compress.errors import InputError, ResourceError, VerifyError
from fuzz.checks import Folder, outcome, require

WORDS = (
    b'"manifest_version":1', b'"tool":{"name":"compress-checkpoints"}', b'"format":"native"',
    b'"files":{', b'"bytes":', b'"sha256":"', b'"source":{}', b'"recipe":{}', b'"run":{}',
    b'"decoded":{', b'"digest":"', b"../", b"\\u0000", b"\\ud800", b"1e5", b"1E5", b"-0.0", b"-0",
    b"1.0", b"null", b"true", b"manifest.json", b"/etc/passwd", b"\\u001b[2J",
)  # fmt: skip
_folder = Folder(manifest.NAME)
_SMALL = (
    b'{"manifest_version":1,"tool":{"name":"compress-checkpoints","version":"0"},"format":"native",'
    b'"source":{},"recipe":{},"files":{%s},"run":{}}'
)


def seeds(corpus: Path | None) -> Iterator[bytes]:
    """As `build` makes them, and small ones by hand."""
    record = manifest.FileRecord(3, "0" * 64)
    for files, decoded in (({}, None), ({"a": record, "b/c": record}, {"w": "0" * 64})):
        made = manifest.build(
            files, source={}, recipe={}, format_name="native", run={}, decoded=decoded
        )
        yield b"\x00" + made
        yield b"\x01" + made
    for files in (b"", b'"a":{"bytes":1,"sha256":"x"}', b'"../a":{"bytes":0,"sha256":""}'):
        yield b"\x01" + _SMALL % files


def target(data: bytes) -> None:
    """Read one manifest, then verify the folder that holds nothing else."""
    raw = data[1:]
    if data and data[0] & 3:
        raw = _with_digest(raw)
    _folder.fill(raw)
    folder = Path(_folder.path)
    body = outcome(lambda: manifest.read(folder), names=manifest.NAME, errors=(VerifyError,))
    if body is None:
        return
    loaded = manifest.load(folder)
    require((json.dumps(loaded, indent=1) + "\n").encode() == raw, "not spelled as we spell it")
    require(manifest.digest_of(body) == loaded.get("digest"), "another digest")
    found = outcome(
        lambda: manifest.verify_files(folder, body),
        names="", errors=(VerifyError, InputError, ResourceError),
    )  # fmt: skip
    # There is no other file, and the manifest cannot hold its own hash.
    require(
        (found == 0 and not body["files"]) or found is None, "files that do not exist are there"
    )


def _with_digest(raw: bytes) -> bytes:
    try:
        body = json.loads(raw)
        if not isinstance(body, dict):
            return raw
        body.pop("digest", None)
        body["digest"] = manifest.digest_of(body)
        return (json.dumps(body, indent=1) + "\n").encode()
    except (ValueError, RecursionError):
        return raw
