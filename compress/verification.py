"""`verify`: is an output what was written, sound in itself and finite when decoded?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from compress import decoded_hashes
from compress.checkpoint import Checkpoint, manifest, strict_json
from compress.checkpoint.files import open_inside
from compress.errors import InputError, UsageError, VerifyError, show
from compress.output import CompressedCheckpoint, open_any
from compress.tensor import TensorInfo

_REPORT = "report.json"
_MAX_REPORT = 1 << 30
_BLOCK = 8 << 20
_FLOATS = ("F64", "F32", "F16", "BF16")


def verify_output(
    out: Path, *, source: Path | None = None, allow_pickle: bool = False
) -> dict[str, Any]:
    """Check manifest, hashes, headers and decoded values; with `source`, untouched tensors too.

    Raises VerifyError for the first thing that does not hold.
    """
    if not out.is_dir():
        raise UsageError(f"{show(str(out))}: not a directory", hint="verify takes an output of run")
    body = manifest.read(out)
    nbytes = manifest.verify_files(out, body)
    if body["format"] in (manifest.GENAI, manifest.GRAPH):
        return _hashes_alone(body, nbytes, source)
    try:
        changed = _changed(out)
        with open_any(out) as checkpoint:
            infos = checkpoint.infos()
            recorded: dict[str, str] = dict(body.get("decoded", {}))
            for info in infos:
                _check_stored(checkpoint, info)
                _check_finite(checkpoint, info, changed)
                _check_decoded(checkpoint, info, recorded.pop(info.name, None))
            if recorded:
                raise VerifyError(f"tensor {show(min(recorded))}: in the manifest, missing here")
            compared = 0
            if source is not None:
                with open_any(source, allow_pickle=allow_pickle) as original:
                    compared = _compare_untouched(checkpoint, original, changed)
    except InputError as error:
        raise VerifyError(error.message, hint=error.hint) from error
    files = len(body["files"])
    extra = f", {compared} untouched tensors equal to the source" if source is not None else ""
    return {
        "ok": True,
        "files": files,
        "bytes": nbytes,
        "tensors": len(infos),
        "untouched_compared": compared,
        "summary": f"verified: {files} files, {nbytes:,} bytes, {len(infos)} tensors{extra}",
    }


def _hashes_alone(body: dict[str, Any], nbytes: int, source: Path | None) -> dict[str, Any]:
    """The result for exports, which hold no checkpoint to decode."""
    if source is not None:
        raise UsageError(
            "an export is not compared with a source",
            hint="verify the output that it was made from",
        )
    files = len(body["files"])
    return {
        "ok": True,
        "files": files,
        "bytes": nbytes,
        "tensors": 0,
        "untouched_compared": 0,
        "summary": f"verified: {files} files, {nbytes:,} bytes, not decoded",
    }


def _changed(out: Path) -> frozenset[str]:
    """The tensors that passes worked on, as the (already hashed) report lists them.

    Raises InputError for a report that does not say so.
    """
    if not os.path.lexists(out / _REPORT):
        return frozenset()  # an unpacked checkpoint: nothing was changed on the way
    file = open_inside(os.path.realpath(out), _REPORT)
    try:
        body = strict_json.loads(file.read_all(_MAX_REPORT), _REPORT)
    finally:
        file.close()
    rows = body.get("tensors") if isinstance(body, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{_REPORT}: no list of tensors")
    names = [row.get("name") for row in rows if row.get("changed") or row.get("estimated")]
    return frozenset(name for name in names if isinstance(name, str))


def _check_finite(checkpoint: Checkpoint, info: TensorInfo, changed: frozenset[str]) -> None:
    """A tensor that was changed must decode to finite values; untouched ones may hold anything."""
    if not info.is_float or info.name not in changed:
        return
    rows = info.shape[0] if info.shape else 1
    step = max(1, rows * _BLOCK // max(1, info.nbytes))
    width = info.size // max(1, rows)
    for start in range(0, rows, step):
        block = checkpoint.read(info, start, min(rows, start + step)).reshape(-1)
        wide = block if info.dtype == "F64" else block.astype(np.float32, copy=False)
        bad = np.flatnonzero(~np.isfinite(wide))
        if bad.size:
            raise VerifyError(
                f"tensor {show(info.name)}: decodes to {block[bad[0]]} at flat index"
                f" {start * width + bad[0]}"
            )


def _check_stored(checkpoint: Checkpoint, info: TensorInfo) -> None:
    """Scales, factors and exact entries are finite, also those that no weight decodes from."""
    if not isinstance(checkpoint, CompressedCheckpoint) or info.name not in checkpoint.entries:
        return
    entry = checkpoint.entries[info.name]
    for spec in checkpoint.format.layout(entry.info, entry.terms):
        if spec.dtype not in _FLOATS:
            continue
        values = checkpoint.fetch(spec.part, spec.name).reshape(-1)
        wide = values if spec.dtype == "F64" else values.astype(np.float32, copy=False)
        bad = np.flatnonzero(~np.isfinite(wide))
        if bad.size:
            raise VerifyError(
                f"tensor {show(info.name)}: its array {show(spec.name)} holds {values[bad[0]]}"
                f" at flat index {bad[0]}"
            )


def _check_decoded(checkpoint: Checkpoint, info: TensorInfo, recorded: str | None) -> None:
    """The decoded values are those that the run recorded, where it did."""
    if recorded is not None and decoded_hashes.of_tensor(checkpoint, info) != recorded:
        raise VerifyError(
            f"tensor {show(info.name)}: its files are what was written, but they decode to other"
            " values",
            hint="this installation decodes differently: please report it",
        )


def _compare_untouched(
    checkpoint: Checkpoint, original: Checkpoint, changed: frozenset[str]
) -> int:
    """Count untouched tensors whose bytes equal the source's. Raises VerifyError."""
    by_name = {i.name: i for i in original.infos()}
    count = 0
    for info in checkpoint.infos():
        other = by_name.pop(info.name, None)
        if other is None:
            raise VerifyError(f"tensor {show(info.name)}: not in the source")
        rounded = info.name in checkpoint.rounded or info.dtype != other.dtype
        if info.name in changed or rounded:
            continue
        if info.shape != other.shape or not _equal(checkpoint, original, info):
            raise VerifyError(f"tensor {show(info.name)}: untouched, but not equal to the source's")
        count += 1
    if by_name:
        raise VerifyError(f"tensor {show(next(iter(by_name)))}: in the source, missing here")
    return count


def _equal(one: Checkpoint, other: Checkpoint, info: TensorInfo) -> bool:
    """Whether both hold the same bytes, a block at a time."""
    for start in range(0, info.nbytes, _BLOCK):
        stop = min(info.nbytes, start + _BLOCK)
        mine, theirs = one.read_bytes(info, start, stop), other.read_bytes(info, start, stop)
        if not np.array_equal(np.frombuffer(mine, np.uint8), np.frombuffer(theirs, np.uint8)):
            return False
    return True
