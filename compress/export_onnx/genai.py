"""`export --to genai`: an output as onnxruntime-genai wants it, built where that is installed.

TO/checkpoint/   the layout that its model builder reads (genai_layout.py)
TO/              what the builder made of it: model.onnx, its data, genai_config.json, tokenizer
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from compress.checkpoint import manifest
from compress.checkpoint.destination import refuse_overlap
from compress.checkpoint.manifest import FileRecord
from compress.checkpoint.stage import Stage, staged
from compress.checkpoint.writer import SafetensorsWriter, nbytes_of
from compress.errors import InputError, UsageError, show
from compress.export_onnx import genai_builder
from compress.export_onnx.genai_builder import BuilderOptions
from compress.export_onnx.genai_layout import Layout, Linear, Spec, plan_layout
from compress.formats import OWN_FILES
from compress.layout import MAX_SHARD_BYTES
from compress.output import CompressedCheckpoint, is_compressed, open_output
from compress.run import Progress, silent
from compress.tensor import TensorInfo

CHECKPOINT = "checkpoint"
_SCRATCH = "builder"  # in the stage, never published
_BLOCK = 64 << 20


def write_genai(
    out: Path,
    to: Path,
    *,
    options: BuilderOptions | None = None,
    call_builder: bool | None = None,
    overwrite: bool = False,
    fsync: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write `out` as the builder's layout to `to`/checkpoint, and build `to`/model.onnx from it.

    `call_builder`: None where it is installed, True always, False never. All or nothing: a failed
    build publishes nothing. Raises UsageError for what the layout cannot hold, CompressError where
    the builder fails.
    """
    started = time.perf_counter()
    options = options or BuilderOptions()
    options.check()
    refuse_overlap(out, to)
    version = _version(call_builder)
    if not is_compressed(out):
        raise UsageError(
            f"{show(str(out))}: not an output of this tool with codes",
            hint="compress run MODEL -o OUT quantize:bits=4,group=32",
        )
    with closing(open_output(out)) as checkpoint:
        layout = plan_layout(checkpoint)
        arguments = options.arguments(layout.extra_options)
        with staged(to, overwrite=overwrite, fsync=fsync, doing="cannot write the output") as stage:
            files = _write_layout(checkpoint, layout, stage, progress)
            checkpoint.check_unchanged()
            if version is not None:
                _build(stage, arguments, files, progress)
                if options.provider == "cpu":  # the device of another may be elsewhere
                    _try_out(stage, layout, progress)
            body = manifest.build(
                files,
                source={"fingerprint": checkpoint.fingerprint()},
                recipe={"genai": {"arguments": arguments, "builder": version}},
                format_name=manifest.GENAI,
                run={"seconds": round(time.perf_counter() - started, 3)},
            )
            stage.write_file(manifest.NAME, body)
    command = genai_builder.command_line(
        to / CHECKPOINT, to.with_name(f"{to.name}-onnx"), arguments
    )
    return _body(to, layout, files, version, command)


def _version(call_builder: bool | None) -> str | None:
    """The version of the builder that will be called, None where none will be."""
    if call_builder is False:
        return None
    version = genai_builder.installed()
    if version is None and call_builder:
        raise UsageError(
            "onnxruntime-genai is not installed",
            hint="pip install 'compress-checkpoints[genai]', or write the layout alone",
        )
    if version is not None:
        genai_builder.check_version(version)
    return version


def _write_layout(
    checkpoint: CompressedCheckpoint, layout: Layout, stage: Stage, progress: Progress
) -> dict[str, FileRecord]:
    """The weight files, config.json and what lies beside them, under `checkpoint/`."""
    shards = list(_shards(layout))
    total = sum(nbytes_of(tag, shape) for _, parts in layout.parts() for _, tag, shape in parts)
    done = 0
    files: dict[str, FileRecord] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        middle = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        name = f"model{middle}.safetensors"
        specs = [spec for _, parts in shard for spec in parts]
        writer = SafetensorsWriter(stage, f"{CHECKPOINT}/{name}", specs, {"format": "pt"})
        with closing(writer):
            for part, parts in shard:
                _write_part(checkpoint, part, writer)
                done += sum(nbytes_of(tag, shape) for _, tag, shape in parts)
                progress("export", done, total)
            files[f"{CHECKPOINT}/{name}"] = writer.finish()
        weight_map |= {spec[0]: name for spec in specs}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(stage, "model.safetensors.index.json", index, files)
    _write_json(stage, "config.json", layout.config, files)
    for name in checkpoint.sidecars:
        if name not in OWN_FILES:
            target = f"{CHECKPOINT}/{name}"
            files[target] = stage.copy_file(target, checkpoint.open_sidecar(name))
    return files


def _shards(layout: Layout) -> Iterator[list[tuple[Linear | TensorInfo, list[Spec]]]]:
    """The parts in files of the size that the hub's own tools make."""
    shard: list[tuple[Linear | TensorInfo, list[Spec]]] = []
    filled = 0
    for part, specs in layout.parts():
        nbytes = sum(nbytes_of(tag, shape) for _, tag, shape in specs)
        if shard and filled + nbytes > MAX_SHARD_BYTES:
            yield shard
            shard, filled = [], 0
        shard.append((part, specs))
        filled += nbytes
    yield shard


def _write_part(
    checkpoint: CompressedCheckpoint, part: Linear | TensorInfo, writer: SafetensorsWriter
) -> None:
    """One tensor: its codes in the builder's layout, or its values as they are."""
    if isinstance(part, TensorInfo):
        for start in range(0, part.nbytes, _BLOCK):
            stop = min(part.nbytes, start + _BLOCK)
            writer.write(checkpoint.read_bytes(part, start, stop))
        return
    codes = checkpoint.tensor(part.info.name).codes
    if codes is None:
        raise InputError(f"tensor {show(part.info.name)}: its codes are missing")
    for array in part.pack(codes):
        writer.write(array.view("u1"))


def _write_json(stage: Stage, name: str, content: Any, files: dict[str, FileRecord]) -> None:
    target = f"{CHECKPOINT}/{name}"
    files[target] = stage.write_file(target, (json.dumps(content, indent=2) + "\n").encode())


def _build(
    stage: Stage, arguments: list[str], files: dict[str, FileRecord], progress: Progress
) -> None:
    """Call the builder in the stage and take up the files that it made."""
    progress("build", 0, 1)
    scratch = stage.folder / _SCRATCH
    scratch.mkdir()
    genai_builder.build(stage.path / CHECKPOINT, stage.path, scratch, arguments)
    for name, _ in manifest.entries_of(stage.path):
        if name not in files:
            files[name] = manifest.record_of(stage.path, name)
            with open(os.path.join(stage.path, name), "rb") as made:
                stage.sync(made.fileno())
    progress("build", 1, 1)


def _try_out(stage: Stage, layout: Layout, progress: Progress) -> None:
    """The engine must run what was built."""
    progress("try", 0, 1)
    window = layout.config.get("sliding_window")
    genai_builder.try_out(
        stage.path, stage.folder / _SCRATCH, window=window if isinstance(window, int) else 0
    )
    progress("try", 1, 1)


def _body(
    to: Path, layout: Layout, files: dict[str, FileRecord], version: str | None, command: str
) -> dict[str, Any]:
    """What the command prints."""
    written = sum(r.nbytes for n, r in files.items() if n.startswith(f"{CHECKPOINT}/"))
    built = sum(r.nbytes for r in files.values()) - written
    count = len(layout.linears)
    if version is None:
        said = f"onnxruntime-genai was not called; to build the model:\n{command}"
    else:
        said = f"onnxruntime-genai {version} built {to / 'model.onnx'}, {built:,} bytes"
    lines = [f"{count} layers of codes, {written:,} bytes, in {to / CHECKPOINT}", said]
    return {
        "files": {name: record.nbytes for name, record in sorted(files.items())},
        "bytes": written + built,
        "layout_bytes": written,
        "layers": count,
        "builder": {"called": version is not None, "version": version, "command": command},
        "quantization_config": layout.config["quantization_config"],
        "notes": list(layout.notes),
        "summary": "\n".join(lines),
    }
