"""Every file of the corpus through the command line: outcome, exit code, one line, no trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toolbox import tiny_llama
from typer.testing import CliRunner

from compress import cli
from compress.errors import CompressError

GROUPS = ("st", "fs", "shard", "pickle", "cfg", "onnx")

# Of group onnx, some go through a process of their own; all of them through `plan`, below.
ONNX = {500, 501, 503, 507, 515, 521, 528, 529, 531, 533, 534}


def command(record: dict[str, Any], corpus: Path, model: Path) -> list[str]:
    """`inspect` for models and configs, `plan` for recipes."""
    path = corpus / record["file"]
    if record["name"] == "ok_hub_cache":
        path = path / "models--o--m" / "snapshots" / "rev"
    if path.suffix == ".yaml":
        return ["plan", str(model), "--recipe", str(path)]
    allow = ["--allow-pickle"] if record["group"] == "pickle" else []
    return ["inspect", str(path), *allow]


def run_case(record: dict[str, Any], corpus: Path, model: Path, cwd: Path) -> list[str]:
    """What is wrong with the outcome of one case; an empty list is right."""
    words = command(record, corpus, model)
    done = subprocess.run(
        [sys.executable, "-m", "compress", *words],
        capture_output=True,
        timeout=60,
        check=False,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
    )
    errors = done.stderr.decode("utf-8", "replace")
    wrong = []
    if "Traceback" in errors:
        wrong.append("traceback")
    if record["expect"] == "accept" and done.returncode != 0:
        wrong.append(f"exit {done.returncode}: {errors[:200]}")
    if record["expect"] == "reject":
        if done.returncode not in (2, 3):
            wrong.append(f"exit {done.returncode}: {errors[:200]}")
        lines = errors.splitlines()
        if not lines or not lines[0].startswith("error: ") or len(lines) > 2:
            wrong.append(f"not one clear line: {errors[:200]!r}")
        name = Path(record["file"]).name
        shown = name.encode("unicode_escape").decode()
        if record["group"] in ("st", "fs", "pickle") and shown not in errors:
            wrong.append(f"does not name {name}: {errors[:200]!r}")
    for stream in (done.stdout, done.stderr):
        if b"\x1b[2J" in stream or b"\x1b[31m" in stream:
            wrong.append("control characters reach the terminal")
    return wrong


@pytest.fixture(scope="module")
def outcomes(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, dict[int, list[str]]]]:
    """group -> case -> complaints; the cases run two at a time, all in one directory."""
    cwd = tmp_path_factory.mktemp("cwd")
    model = tiny_llama(tmp_path_factory.mktemp("model") / "model", hidden=128)
    records = [
        r
        for r in json.loads((corpus / "index.json").read_text())
        if r["group"] in GROUPS
        and not (r["id"] == 205 and os.geteuid() == 0)
        and (r["group"] != "onnx" or r["id"] in ONNX)
    ]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda r: run_case(r, corpus, model, cwd), records)
        found: dict[str, dict[int, list[str]]] = {g: {} for g in GROUPS}
        for record, wrong in zip(records, results, strict=True):
            found[record["group"]][record["id"]] = wrong
    assert os.listdir(cwd) == [], "a case wrote into the working directory"
    yield found


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_case_has_its_outcome(outcomes: dict[str, dict[int, list[str]]], group: str) -> None:
    assert len(outcomes[group]) > 5
    assert {k: v for k, v in outcomes[group].items() if v} == {}


@pytest.mark.parametrize("words", ["plan", "run", "calibrate", "diff", "eval"])
def test_no_command_takes_a_bad_onnx_file(corpus: Path, tmp_path: Path, words: str) -> None:
    """In this process: a command refuses before it does anything, and nothing is written."""
    pytest.importorskip("onnxruntime")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes:\n  - prune: {sparsity: 0.5}\n")
    ids = tmp_path / "ids.npy"
    np.save(ids, np.zeros((2, 4), np.int64))
    wrong = {}
    for record in json.loads((corpus / "index.json").read_text()):
        if record["group"] != "onnx" or record["expect"] != "reject":
            continue
        if words != "plan" and record["id"] not in (505, 507, 515, 531):
            continue  # what onnxruntime itself would take is what matters there
        model = str(corpus / record["file"] / "model.onnx")
        more = {
            "plan": ["prune:sparsity=0.5"],
            "run": ["-o", str(tmp_path / "out"), "prune:sparsity=0.5"],
            "calibrate": ["--for", str(recipe), "-o", str(tmp_path / "out"), "--ids", str(ids)],
            "diff": [model],
            "eval": ["--ids", str(ids)],
        }[words]
        done = CliRunner().invoke(cli.app, [words, model, *more])
        error = done.exception
        if not isinstance(error, CompressError) or error.exit_code != 3:
            wrong[record["name"]] = repr(error)
        elif not error.message.isprintable() or "\n" in (error.hint or ""):
            wrong[record["name"]] = error.message
    assert wrong == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "recipe.yaml"]
