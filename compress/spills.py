"""Arrays for the side files (adapter, super weights), which every shard gives a share of.

Each shard spills its share beside itself, one small file a part, and the shares are joined at the
end: so finished shards can be kept by `--resume`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.checkpoint.manifest import FileRecord
from compress.checkpoint.stage import Stage
from compress.checkpoint.writer import SafetensorsWriter
from compress.layout import WeightFile

_FOLDER = ".parts"
_READ_CHUNK = 8 << 20


def spill_name(part: str, shard: int) -> str:
    """Where in the stage the bytes of a side file wait that one shard's tensors gave."""
    return f"{_FOLDER}/{part}.{shard}"


class Spill:
    """What one shard gives to the side files, hashed as it is written."""

    def __init__(self, stage: Stage, shard: int) -> None:
        self._stage, self._shard = stage, shard
        self._open: dict[str, Any] = {}
        self._digests: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}

    def write(self, part: str, data: memoryview) -> None:
        """Append bytes to the share of `part`."""
        if part not in self._open:
            path = self._path(part)
            path.parent.mkdir(exist_ok=True)
            self._open[part] = open(path, "wb")  # noqa: SIM115  closed by finish or abort
            self._digests[part] = hashlib.sha256()
            self._sizes[part] = 0
        self._open[part].write(data)
        self._digests[part].update(data)
        self._sizes[part] += data.nbytes

    def finish(self) -> dict[str, FileRecord]:
        """fsync and close; what was written, by part."""
        for file in self._open.values():
            file.flush()
            self._stage.sync(file.fileno())
            file.close()
        return {p: FileRecord(self._sizes[p], d.hexdigest()) for p, d in self._digests.items()}

    def abort(self) -> None:
        """Close what is open (after an error)."""
        for file in self._open.values():
            with contextlib.suppress(OSError):
                file.close()

    def _path(self, part: str) -> Path:
        return self._stage.folder / spill_name(part, self._shard)


def join(part: WeightFile, shares: Sequence[Mapping[str, FileRecord]], stage: Stage) -> FileRecord:
    """Make one safetensors file of what the shards spilled, in their order."""
    writer = SafetensorsWriter(stage, part.name, part.header_specs, part.metadata)
    try:
        for number, given in enumerate(shares):
            if part.part not in given:
                continue
            with open(stage.folder / spill_name(part.part, number), "rb") as file:
                while chunk := file.read(_READ_CHUNK):
                    writer.write(chunk)
        return writer.finish()
    finally:
        writer.close()
