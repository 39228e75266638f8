"""`unpack`: a compressed output back to a plain checkpoint of the source's dtype."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from compress.checkpoint import Checkpoint, manifest, open_checkpoint, skeleton
from compress.checkpoint.destination import refuse_overlap
from compress.checkpoint.manifest import FileRecord
from compress.checkpoint.stage import Stage, staged
from compress.checkpoint.writer import SafetensorsWriter
from compress.errors import InputError, UsageError, show
from compress.formats import OWN_FILES
from compress.layout import MAX_SHARD_BYTES
from compress.output import is_compressed, open_any, open_output
from compress.run import Progress, silent
from compress.tensor import TensorInfo

_BLOCK = 8 << 20


def unpack_output(
    out: Path,
    dense: Path,
    *,
    overwrite: bool = False,
    fsync: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Decode every tensor of `out` into the plain checkpoint `dense`, staged like a run.

    Raises UsageError where `out` is no output of this tool or would be written over, InputError
    where it is damaged or a newer version wrote it.
    """
    started = time.perf_counter()
    refuse_overlap(out, dense)
    with _open(out) as checkpoint:
        with staged(
            dense, overwrite=overwrite, fsync=fsync, doing="cannot write the output"
        ) as stage:
            files = _write(checkpoint, stage, progress)
            checkpoint.check_unchanged()
            if checkpoint.graph is not None:
                files["model.onnx"] = _write_graph(checkpoint.graph, stage)
            if checkpoint.config_bytes is not None:
                files["config.json"] = stage.write_file("config.json", checkpoint.config_bytes)
            for name in checkpoint.sidecars:
                if name not in OWN_FILES:
                    files[name] = stage.copy_file(name, checkpoint.open_sidecar(name))
            body = manifest.build(
                files,
                source={"fingerprint": checkpoint.fingerprint()},
                recipe={"unpack": True},
                format_name="dense",
                run={"seconds": round(time.perf_counter() - started, 3)},
            )
            stage.write_file(manifest.NAME, body)
        tensors = len(checkpoint.infos())
    nbytes = sum(r.nbytes for r in files.values())
    return {
        "tensors": tensors,
        "bytes": nbytes,
        "summary": f"unpacked {tensors} tensors, {nbytes:,} bytes, to {show(str(dense), 400)}",
    }


def _open(out: Path) -> Checkpoint:
    """The output as the checkpoint it was made from; a dense one is that already."""
    if is_compressed(out):
        return open_output(out)
    try:
        dense = manifest.load(out)["format"] == "dense"
    except manifest.NewerManifest:
        raise
    except InputError:
        dense = False
    if not dense:
        raise UsageError(
            f"{show(str(out))}: not an output of this tool",
            hint="a plain checkpoint needs no unpack",
        )
    return open_any(out)


def _write_graph(graph: bytes, stage: Stage) -> FileRecord:
    """The graph of the .onnx file that the output was made from, over the plain weights.

    Raises InputError where no runtime would load it: the graph may be a stranger's.
    """
    from onnx import ModelProto

    from compress.export_onnx.loading import require_loadable
    from compress.export_onnx.lowering import lower
    from compress.export_onnx.stored import of_output
    from compress.export_onnx.style import Style

    model = ModelProto()
    model.ParseFromString(graph)
    with open_checkpoint(stage.path) as plain:
        lowered = lower(model, of_output(plain), Style(), skeleton.FILE)
    record = stage.write_file("model.onnx", lowered.model.SerializeToString())
    require_loadable(stage.path / "model.onnx", skeleton.FILE)
    return record


def _write(checkpoint: Checkpoint, stage: Stage, progress: Progress) -> dict[str, FileRecord]:
    """The plain weight files, sharded as the hub's own tools do."""
    infos: list[TensorInfo] = checkpoint.infos()
    groups: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in infos:
        if groups[-1] and filled + info.nbytes > MAX_SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(info)
        filled += info.nbytes
    total, done = sum(i.nbytes for i in infos), 0
    files: dict[str, FileRecord] = {}
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        middle = "" if len(groups) == 1 else f"-{number:05d}-of-{len(groups):05d}"
        name = f"model{middle}.safetensors"
        names = {i.name for i in group}
        tied = {a: k for a, k in checkpoint.aliases.items() if k in names}
        specs = [(i.name, i.dtype, i.shape) for i in group]
        metadata = {"format": "pt"} | checkpoint.foreign_metadata | tied
        writer = SafetensorsWriter(stage, name, specs, metadata)
        try:
            for info in group:
                for start in range(0, info.nbytes, _BLOCK):
                    stop = min(info.nbytes, start + _BLOCK)
                    writer.write(checkpoint.read_bytes(info, start, stop))
                done += info.nbytes
                weight_map[info.name] = name
                progress("unpack", done, total)
            files[name] = writer.finish()
        finally:
            writer.close()
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        content = (json.dumps(index, indent=2) + "\n").encode()
        files["model.safetensors.index.json"] = stage.write_file(
            "model.safetensors.index.json", content
        )
    return files
