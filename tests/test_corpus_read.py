"""Every verdict of the corpus that a reader of checkpoints and configs decides."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from compress.checkpoint import open_checkpoint, read_config
from compress.errors import CompressError, InputError

SECONDS = 10.0  # the promise is 5 s on an idle machine; tests share theirs
SECONDS_OF_A_CHILD = 60.0  # a PyTorch file waits for a process that imports torch
# One 8 GiB tensor in a sparse file: opening is the test, reading it whole is not.
NOT_READ = {153}
# What the file outside of the models of group onnx holds: 41.0 to 44.0 in float32.
SECRET = struct.pack("<4f", 41, 42, 43, 44)


def open_and_read(case: dict[str, Any], path: Path) -> None:
    if case["name"] == "ok_hub_cache":
        path = path / "models--o--m" / "snapshots" / "rev"
    with open_checkpoint(path, allow_pickle=True) as checkpoint:
        for info in checkpoint.infos():
            if case["id"] not in NOT_READ:
                data = bytes(checkpoint.read_bytes(info, 0, info.nbytes))
                assert len(data) == info.nbytes and SECRET not in data
                checkpoint.read(info)
        checkpoint.check_unchanged()


def read_lone_config(case: dict[str, Any], path: Path) -> None:
    read_config(path)


def judge(
    case: dict[str, Any], root: Path, reader: Callable[[dict[str, Any], Path], None]
) -> str | None:
    """None if the verdict is right, else what is wrong with it."""
    start = time.perf_counter()
    try:
        reader(case, root / case["file"])
        found, text = "accept", ""
    except CompressError as error:
        found, text = "reject", f"{error.message} {error.hint or ''}"
    limit = SECONDS_OF_A_CHILD if case["group"] == "pickle" else SECONDS
    if time.perf_counter() - start > limit:
        return f"{case['id']} {case['name']}: took too long"
    if found != case["expect"]:
        return f"{case['id']} {case['name']}: {found}, expected {case['expect']}: {text}"
    if not text.isascii() or not text.isprintable() or len(text) > 600:
        return f"{case['id']} {case['name']}: message not fit to print: {text!r}"
    if "weights_only" in text or "Traceback" in text:
        return f"{case['id']} {case['name']}: shows the text of a library: {text!r}"
    return None


@pytest.mark.parametrize("group", ["st", "fs", "shard", "pickle", "cfg", "onnx"])
def test_every_verdict_is_right(
    group: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cases = [case for case in json.loads((corpus / "index.json").read_text())
             if case["group"] == group and not case["file"].endswith(".yaml")]  # fmt: skip
    if os.geteuid() == 0:
        cases = [case for case in cases if case["name"] != "unreadable"]
    assert len(cases) > 5
    reader = read_lone_config if group == "cfg" else open_and_read
    with ThreadPoolExecutor(2 if group == "pickle" else 1) as pool:
        wrong = list(filter(None, pool.map(lambda case: judge(case, corpus, reader), cases)))
    assert wrong == []
    assert list(tmp_path.iterdir()) == [], "something ran"


def test_pickles_are_refused_unless_asked_for(corpus: Path) -> None:
    for path in sorted((corpus / "pickle").iterdir()):
        with pytest.raises(InputError) as caught:
            open_checkpoint(path)
        assert path.name in caught.value.message
        if not path.name.startswith("445"):
            assert "--allow-pickle" in (caught.value.hint or "")


def test_messages_say_what_the_file_is(corpus: Path) -> None:
    for name, word in (
        ("163_lfs_pointer", "Git LFS"),
        ("164_html_page", "HTML"),
        ("161_gguf_in_disguise", "GGUF"),
        ("162_zip_in_disguise", "zip"),
    ):
        with pytest.raises(InputError, match=word):
            open_checkpoint(corpus / "st" / f"{name}.safetensors")


def test_a_secret_file_does_not_show_in_the_message(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_WORD", "hunter2")
    with pytest.raises(InputError) as caught:
        open_checkpoint(corpus / "fs" / "206_proc_file.safetensors")
    assert "hunter2" not in caught.value.message
