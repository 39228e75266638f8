"""Every file of the corpus through the command line: outcome, exit code, one line, no trace."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked_cli import Finished
from toolbox import tiny_llama, tool, tool_process
from typer.testing import CliRunner

from compress import cli
from compress.errors import CompressError

GROUPS = ("st", "fs", "shard", "pickle", "cfg", "onnx")

PEAK = 300_000_000  # bytes; no file of the corpus holds weights that count


def command(record: dict[str, Any], corpus: Path, model: Path) -> list[str]:
    """`inspect` for models and configs, `plan` for recipes."""
    path = corpus / record["file"]
    if record["name"] == "ok_hub_cache":
        path = path / "models--o--m" / "snapshots" / "rev"
    if path.suffix == ".yaml":
        return ["plan", str(model), "--recipe", str(path)]
    allow = ["--allow-pickle"] if record["group"] == "pickle" else []
    return ["inspect", str(path), *allow]


def judge(record: dict[str, Any], done: subprocess.CompletedProcess[str]) -> list[str]:
    """What is wrong with the outcome of one case; an empty list is right."""
    wrong = []
    if "Traceback" in done.stderr:
        wrong.append("traceback")
    if record["expect"] == "accept" and done.returncode != 0:
        wrong.append(f"exit {done.returncode}: {done.stderr[:200]}")
    if record["expect"] == "reject":
        if done.returncode not in (2, 3):
            wrong.append(f"exit {done.returncode}: {done.stderr[:200]}")
        lines = done.stderr.splitlines()
        if not lines or not lines[0].startswith("error: ") or len(lines) > 2:
            wrong.append(f"not one clear line: {done.stderr[:200]!r}")
        name = Path(record["file"]).name
        shown = name.encode("unicode_escape").decode()
        if record["group"] in ("st", "fs", "pickle") and shown not in done.stderr:
            wrong.append(f"does not name {name}: {done.stderr[:200]!r}")
    for stream in (done.stdout, done.stderr):
        if "\x1b[2J" in stream or "\x1b[31m" in stream:
            wrong.append("control characters reach the terminal")
    if isinstance(done, Finished) and done.peak_bytes > PEAK:
        wrong.append(f"{done.peak_bytes} bytes of memory")
    return wrong


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "model", hidden=128)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_case_has_its_outcome(corpus: Path, model: Path, tmp_path: Path, group: str) -> None:
    records = [
        r
        for r in json.loads((corpus / "index.json").read_text())
        if r["group"] == group and not (r["id"] == 205 and os.geteuid() == 0)
    ]
    assert len(records) > 5
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    wrong = {}
    alone: dict[str, subprocess.CompletedProcess[str]] = {}
    for record in records:
        words = command(record, corpus, model)
        done = tool(*words, cwd=cwd)
        if complaints := judge(record, done):
            wrong[record["id"]] = complaints
        # The first of each verdict once more, in an interpreter of its own.
        if record["expect"] not in alone:
            again = alone[record["expect"]] = tool_process(*words, cwd=cwd)
            assert (again.returncode, again.stdout, again.stderr) == (
                done.returncode, done.stdout, done.stderr,
            )  # fmt: skip
    assert wrong == {}
    assert "reject" in alone
    assert os.listdir(cwd) == [], "a case wrote into the working directory"


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
