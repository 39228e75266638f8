"""`verify`: is an output what was written, sound in itself and finite when decoded?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from compress.checkpoint import Checkpoint, manifest
from compress.errors import InputError, UsageError, VerifyError, show
from compress.output import open_any
from compress.tensor import TensorInfo


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
    changed = _changed(out)
    try:
        with open_any(out) as checkpoint:
            infos = checkpoint.infos()
            for info in infos:
                _check_finite(checkpoint, info, changed)
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


def _changed(out: Path) -> frozenset[str]:
    """The tensors that passes worked on, as the (already verified) report lists them."""
    path = out / "report.json"
    if not path.is_file():
        return frozenset()  # an unpacked checkpoint: nothing was changed on the way
    rows = json.loads(path.read_bytes())["tensors"]
    return frozenset(row["name"] for row in rows if row["passes"])


def _check_finite(checkpoint: Checkpoint, info: TensorInfo, changed: frozenset[str]) -> None:
    """A tensor that was changed must decode to finite values; untouched ones may hold anything."""
    if not info.is_float or info.name not in changed:
        return
    values = checkpoint.read(info).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise VerifyError(
            f"tensor {show(info.name)}: decodes to {values.flat[bad[0]]} at flat index {bad[0]}"
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
        if info.name in changed or info.dtype != other.dtype:
            continue
        if info.shape != other.shape or not np.array_equal(
            checkpoint.read(info).reshape(-1).view(np.uint8),
            original.read(other).reshape(-1).view(np.uint8),
        ):
            raise VerifyError(f"tensor {show(info.name)}: untouched, but not equal to the source's")
        count += 1
    if by_name:
        raise VerifyError(f"tensor {show(next(iter(by_name)))}: in the source, missing here")
    return count
