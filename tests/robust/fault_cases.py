"""The commands that write, each over an old output of its own: what faults are injected into."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from damage import onnx_model, produce
from faults import Act
from toolbox import tiny_llama

from compress.calibrate.statistics import Record
from compress.calibrate.writer import StatisticsWriter
from compress.checkpoint.small_files import write_whole
from compress.export_command import _export_onnx
from compress.export_onnx.genai import write_genai
from compress.export_onnx.options import ExportWords
from compress.unpacking import unpack_output

OLD, NEW, FACTORS = "quantize:bits=8,group=-1", "quantize:bits=4,group=32", "low-rank:rank=2"


def cases(root: Path, *, graphs: bool) -> dict[str, tuple[Path, Act]]:
    """name -> (a folder that holds an old output, what replaces it and is to meet the faults).

    With `graphs` also what writes .onnx files.
    """
    model = tiny_llama(root / "model", hidden=32, ffn=32, layers=1, vocabulary=32)
    packed = produce(model, root / "packed", [NEW], "compressed-tensors")
    made: dict[str, Callable[[Path], Act]] = {
        "run": lambda out: _run(model, out, None),
        "run --overwrite": lambda out: _run(model, out, OLD),
        "unpack": lambda out: _unpack(packed, out),
        "export --to genai": lambda out: _genai(packed, out),
        "calibrate": _statistics,
        "a report, a sweep's results": _small_file,
    }
    if graphs:
        graph = onnx_model(root / "source" / "model.onnx")
        done = produce(graph, root / "graph", [NEW], "onnx")
        made |= {
            "run of an .onnx file": lambda out: _run(graph, out, OLD),
            "export --to onnx": lambda out: _export(done, out, in_place=True),
            "export --to onnx -o": lambda out: _export(done, out, in_place=False),
        }
    found = {}
    for number, (name, make) in enumerate(made.items()):
        folder = root / f"case-{number}"
        folder.mkdir()
        found[name] = folder, make(folder / "out")
    return found


def _run(model: Path, out: Path, old: str | None) -> Act:
    """Two shards and an adapter; an .onnx file gets its graph too, with its proof."""
    if old is not None:
        produce(model, out, [old], "native")
    options = {"shard": 5000, "overwrite": old is not None, "fsync": True}
    name = "onnx" if model.suffix == ".onnx" else "compressed-tensors"
    return lambda: produce(model, out, [NEW, FACTORS], name, **options)


def _unpack(packed: Path, out: Path) -> Act:
    unpack_output(packed, out)
    (out / "generation_config.json").unlink()  # an old output that is another than the new one
    return lambda: unpack_output(packed, out, overwrite=True)


def _genai(packed: Path, out: Path) -> Act:
    write_genai(packed, out, call_builder=False)
    (out / "checkpoint" / "generation_config.json").unlink()
    return lambda: write_genai(packed, out, call_builder=False, overwrite=True)


def _export(done: Path, out: Path, *, in_place: bool) -> Act:
    shutil.copytree(done, out)
    words = ExportWords(True, "qdq" if in_place else None)
    source, target = (out, None) if in_place else (done, out)
    return lambda: _export_onnx(
        source, target, words, module=None, ids=None, images=None, samples=None,
        overwrite=True, fsync=True,
    )  # fmt: skip


def _statistics(out: Path) -> Act:
    """A statistics file in two steps, over an older one."""

    def write(scale: float) -> None:
        with StatisticsWriter(out, room=4096, overwrite=True) as writing:
            for step in ("first", "second"):
                values = np.arange(8, dtype=np.float32) * scale
                writing.add_tensor(step, "output_fisher", values)
                writing.commit(step)
            writing.finish(Record("f", "hf", (), frozenset({"output_fisher"}), {}))

    write(1)
    return lambda: write(2)


def _small_file(out: Path) -> Act:
    out.write_text("old")
    return lambda: write_whole(out, b"new")
