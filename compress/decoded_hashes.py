"""SHA-256 of what changed tensors decode to: the same on every machine, or `verify` says so.

The hashes of files say that the bytes are those that were written; these say that the reader makes
the same weights of them, whatever its processor and its version. A tensor's hash is over its values
as `unpack` writes them: in the source's dtype and shape, little-endian, row by row.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from compress.checkpoint import Checkpoint
from compress.output import CompressedCheckpoint, open_any
from compress.tensor import TensorInfo

_BLOCK = 8 << 20


def of_output(out: Path) -> dict[str, str]:
    """Tensor name -> SHA-256, of every tensor that is not stored as it is read.

    Reads and decodes all of them: about as long as a run without a search of scales takes.
    """
    with open_any(out) as checkpoint:
        if not isinstance(checkpoint, CompressedCheckpoint):
            return {}
        coded = checkpoint.entries.keys() | checkpoint.rounded.keys()
        return {i.name: of_tensor(checkpoint, i) for i in checkpoint.infos() if i.name in coded}


def of_tensor(checkpoint: Checkpoint, info: TensorInfo) -> str:
    """SHA-256 of one tensor's decoded bytes."""
    digest = hashlib.sha256()
    for start in range(0, info.nbytes, _BLOCK):
        digest.update(checkpoint.read_bytes(info, start, min(info.nbytes, start + _BLOCK)))
    return digest.hexdigest()
