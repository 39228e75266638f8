"""`model.onnx.data`: the arrays that a graph needs in another form than the weight files have."""

from __future__ import annotations

import numpy as np

from compress.checkpoint.manifest import FileRecord
from compress.checkpoint.stage import Stage
from compress.checkpoint.writer import StageWriter
from compress.export_onnx.builder import DATA_FILE, Copy
from compress.export_onnx.lowering import Lowered


def write_data(stage: Stage, lowered: Lowered) -> FileRecord:
    """Write the arrays in order into the stage, one in memory at a time."""
    writer = StageWriter(stage, DATA_FILE, lowered.data_bytes)
    done = 0
    try:
        for copy in lowered.copies:
            writer.write(bytes(copy.offset - done))
            writer.write(_bytes_of(copy))
            done = copy.offset + copy.nbytes
        return writer.finish()
    finally:
        writer.close()


def _bytes_of(copy: Copy) -> memoryview:
    found = np.ascontiguousarray(copy.make()).reshape(-1).view(np.uint8)
    if found.nbytes != copy.nbytes:
        raise RuntimeError(f"{copy.name}: {found.nbytes} bytes, not {copy.nbytes}")
    return found.data
