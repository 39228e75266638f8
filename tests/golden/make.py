"""Make a golden folder for a format version that has none.

    python tests/golden/make.py [--only native]

A golden output is what a released version wrote. Once its version is released it is never made
again: it has to be readable as it is, for ever. So folders that exist are left alone; a change of a
format gets a version of its own, and that new folders, by a row in sources.py. Where nothing was
released with a folder yet, it may be removed by hand and made anew.

Beside each output, `expected.json` holds the SHA-256 of every tensor that `unpack` writes, its
dtype and shape, the version numbers inside, and of graphs what onnxruntime made of one input.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from golden.reading import (
    HERE,
    STATISTICS,
    contents,
    graph_output,
    header_of,
    stored_versions,
    weight_files,
    write_expected,
)
from golden.sources import GOLDENS, Golden, narrow_llama
from toolbox import tool_json

from compress.calibrate import statistics
from compress.checkpoint import open_checkpoint
from compress.export_onnx.export import prepare
from compress.export_onnx.options import ExportOptions
from compress.plan import Options, make_plan
from compress.recipe import recipe_from_mapping
from compress.run import RunOptions, run
from compress.unpacking import unpack_output


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="folders whose name contains this")
    only = parser.parse_args().only
    for golden in GOLDENS:
        folder = HERE / golden.name
        if wanted(folder, only):
            make(golden, folder)
    if wanted(folder := HERE / f"statistics-{statistics.VERSION}", only):
        make_statistics(folder)


def wanted(folder: Path, only: str) -> bool:
    """Whether to make a folder; says so where it is there."""
    if folder.exists():
        print(f"{folder.name}: is there already, and stays as it is")
    return only in folder.name and not folder.exists()


def make(golden: Golden, folder: Path) -> None:
    """The output and what is expected of it; nothing is left behind where one of them fails."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        out = produce(golden, work)
        plain = work / "plain"
        unpack_output(out, plain, fsync=False)
        expected = stored_versions(out) | contents(weight_files(plain))
        if (plain / "model.onnx").exists():
            graphs = {"out": out / "model.onnx", "plain": plain / "model.onnx"}
            expected["graphs"] = {n: graph_output(g) for n, g in graphs.items() if g.exists()}
        write_expected(work / "expected.json", expected)
        folder.mkdir()
        shutil.copytree(out, folder / "out")
        shutil.copy(work / "expected.json", folder)


def make_statistics(folder: Path) -> None:
    """What `compress calibrate` measures of a small decoder."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        model = narrow_llama(work / "model")
        np.save(work / "ids.npy", np.random.default_rng(0).integers(0, 24, (6, 16)))
        (work / "recipe.yaml").write_text(
            "passes:\n"
            "  - quantize: {bits: 4, group: 8, solver: obs}\n"
            "  - low-rank: {rank: 2, metric: auto}\n"
        )
        words = [model, "--for", work / "recipe.yaml", "--ids", work / "ids.npy", "--threads", "1"]
        made = work / STATISTICS
        tool_json("calibrate", *words, "-o", made)
        header, _ = header_of(made)
        record = json.loads(header["__metadata__"][statistics.KEY])
        folder.mkdir()
        write_expected(
            folder / "expected.json", {"statistics": record["version"]} | contents([made])
        )
        shutil.copy(made, folder)


def produce(golden: Golden, work: Path) -> Path:
    """The run: on one thread, with hashes of what changed tensors decode to."""
    recipe = recipe_from_mapping({"passes": list(golden.passes), "output": dict(golden.output)})
    options = Options(jobs=1, max_shard_bytes=golden.shard, onnx=recipe.output.onnx)
    with open_checkpoint(golden.source(work / "model"), allow_pickle=True) as checkpoint:
        graph = prepare(checkpoint, ExportOptions()) if recipe.output.onnx else None
        settings = RunOptions(fsync=False, decoded_hashes=True, export=graph)
        run(make_plan(checkpoint, recipe, options), work / "out", settings)
    return work / "out"


if __name__ == "__main__":
    main()
