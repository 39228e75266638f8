"""Outputs that someone else prepared: nothing outside is read, linked or changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import onnx_model
from toolbox import produce, tiny_llama, tool, tree

from compress.checkpoint import manifest
from compress.errors import InputError

QUANTIZE = "quantize:bits=4,group=32"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tampered") / "m", layers=1)


@pytest.fixture(scope="module")
def of_a_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("graph")
    return produce(onnx_model(root / "graph" / "model.onnx"), root / "out", QUANTIZE)


@pytest.fixture
def exported(of_a_graph: Path, tmp_path: Path) -> Path:
    """An output of a graph, in a folder of its own beside a secret."""
    out = shutil.copytree(of_a_graph, tmp_path / "work" / "out")
    (tmp_path / "secret").write_text("top secret")
    (tmp_path / "secret").chmod(0o600)
    return out


def _add(out: Path, name: str) -> None:
    """Another file in the list of an output, with a digest that fits."""
    path = out / manifest.NAME
    body: dict[str, Any] = json.loads(path.read_bytes())
    del body["digest"]
    body["files"][name] = {"bytes": 10, "sha256": "0" * 64}
    body["digest"] = manifest.digest_of(body)
    path.write_text(json.dumps(body, indent=1) + "\n")


@pytest.mark.parametrize(
    ("name", "is_good"),
    [
        ("../../secret", False), ("/etc/passwd", False), ("", False), (".", False), ("..", False),
        ("a/../../secret", False), ("./a", False), ("a//b", False), ("a/", False), ("a\0b", False),
        ("a/b", True), ("..a", True), ("a/..b/c", True), ("a\\b", True),
    ],
)  # fmt: skip
def test_places_that_a_list_may_name(tmp_path: Path, name: str, is_good: bool) -> None:
    body = manifest.build({}, source={}, recipe={}, format_name="native", run={})
    (tmp_path / manifest.NAME).write_bytes(body)
    _add(tmp_path, name)
    if is_good:
        assert name in manifest.load(tmp_path)["files"]
        return
    with pytest.raises(InputError, match=r"manifest\.json: .* is no place inside of the output"):
        manifest.load(tmp_path)


@pytest.mark.parametrize("name", ["../../secret", "ABSOLUTE"])
@pytest.mark.parametrize("command", ["export", "verify"])
def test_a_list_that_names_files_outside(exported: Path, name: str, command: str) -> None:
    root = exported.parents[1]
    _add(exported, str(root / "secret") if name == "ABSOLUTE" else name)
    before, mode = tree(root), (root / "secret").stat().st_mode
    done = tool(command, exported, *(("--to", "onnx") if command == "export" else ()))
    assert done.returncode == (5 if command == "verify" else 2), done.stderr
    assert "manifest.json" in done.stderr and "no place inside" in done.stderr
    assert tree(root) == before
    assert (root / "secret").stat().st_mode == mode and (root / "secret").stat().st_nlink == 1


def test_a_folder_of_the_output_that_is_a_link(exported: Path) -> None:
    root = exported.parents[1]
    (exported / "more").symlink_to(root)
    _add(exported, "more/secret")
    done = tool("export", exported, "--to", "onnx")
    assert done.returncode in (2, 3), done.stderr
    assert (root / "secret").stat().st_nlink == 1
    assert sorted(p.name for p in root.iterdir()) == ["secret", "work"]


@pytest.mark.parametrize("what", ["text", "link", "dangling", "pipe", "folder"])
def test_what_has_the_name_of_the_lock_is_left_alone(
    model: Path, tmp_path: Path, what: str
) -> None:
    lock, other = tmp_path / ".out.lock", tmp_path / "other"
    if what == "text":
        lock.write_text("mine")
    elif what == "pipe":
        os.mkfifo(lock)
    elif what == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(other)
        if what == "link":
            other.write_text("")
    before = sorted(path.name for path in tmp_path.iterdir())
    done = tool("run", model, "-o", tmp_path / "out", QUANTIZE)
    assert done.returncode == 2, done.stderr
    assert ".out.lock is in the way" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert lock.is_symlink() == (what in ("link", "dangling"))


def test_a_lock_that_a_killed_run_left_is_no_hindrance(model: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.lock").touch()
    assert tool("run", model, "-o", tmp_path / "out", QUANTIZE).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_an_output_that_cannot_be_made(model: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("")
    words: tuple[str, ...] = (QUANTIZE,)
    if command == "sweep":
        (tmp_path / "recipe.yaml").write_text("passes: [{quantize: {bits: 4, group: 32}}]\n")
        np.save(tmp_path / "ids.npy", np.full((2, 16), 7))
        words = ("--grid", "quantize.bits=4", "--eval-text", str(tmp_path / "ids.npy"))
    subject = [tmp_path / "recipe.yaml"] if command == "sweep" else []
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for out, said in (
        (tmp_path / "file" / "out", "is not a directory"),
        (tmp_path / "dangling" / "out", "is not a directory"),
        (tmp_path / ("b/" * 700), "folders deep"),
    )[: 1 if command == "sweep" else 3]:
        done = tool(command, *subject, model, "-o", out, *words)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr, done.stderr
        assert not (tmp_path / "b").exists() and not (tmp_path / "nowhere").exists()


def test_summaries_show_names_escaped(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "o\x1b[31m\nx"
    done = tool("run", model, "-o", out, QUANTIZE)
    assert done.returncode == 0, done.stderr
    unpacked = tool("unpack", out, "-o", tmp_path / "d\x1b[31m\ny")
    assert unpacked.returncode == 0, unpacked.stderr
    for text in (done.stdout, unpacked.stdout):
        assert "\x1b" not in text
    assert r"d\x1b[31m\ny" in unpacked.stdout
