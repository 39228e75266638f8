"""The stand-in for a process of its own gives what the process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked_cli import LIGHT, Server, forked
from toolbox import tiny_llama, tool_process, tree

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tests fork on Linux alone")

RUN = ("run", "{model}", "-o", "{out}", "quantize:bits=4,group=32")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((*RUN, "--report", "{out}.json"), 0),
        ((*RUN, "low-rank:rank=4", "--fail-if", "relative_error>0.0001"), 4),
        (("inspect", "{model}", "--values", "--json"), 0),
        (("plan", "{model}", "quantiz"), 2),
        (("inspect", "{tmp}/torn.safetensors"), 3),
        (("run", "{model}", "-o", "/proc/out", "prune"), 6),
        (("quantize", "--help"), 0),
        (("calibrate", "{model}"), 2),
        ((), 2),
    ],
    ids=["run", "gate", "inspect", "usage", "content", "disk", "help", "calibrate", "bare"],
)
def test_output_and_exit_code_are_those_of_a_process(
    tmp_path: Path, words: tuple[str, ...], code: int
) -> None:
    model = tiny_llama(tmp_path / "model", layers=1)
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    outputs = {}
    for name, run in (("own", lambda w: tool_process(*w)), ("forked", forked)):
        names = {"model": model, "tmp": tmp_path, "out": tmp_path / name}
        done = run([word.format(**names) for word in words])
        text = (done.stdout + "\n--\n" + done.stderr).replace(str(tmp_path / name), "OUT")
        # A run tells its seconds and its peak of memory, which are its own.
        text = "\n".join(line for line in text.splitlines() if "peak memory" not in line)
        out = tree(tmp_path / name) if (tmp_path / name).exists() else {}
        outputs[name] = done.returncode, text, out
    assert outputs["forked"] == outputs["own"]
    assert outputs["forked"][0] == code
    assert bool(outputs["forked"][2]) == (words[:1] == ("run",) and code == 0)


def test_a_command_has_its_own_surroundings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(tmp_path / "model", layers=1)
    monkeypatch.chdir(tmp_path)
    assert forked(["run", "model", "-o", "out", "prune"]).returncode == 0
    assert (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setenv("COLUMNS", "40")
    narrow = forked(["run", "--help"]).stdout
    monkeypatch.setenv("COLUMNS", "140")
    assert max(map(len, narrow.splitlines())) < max(
        map(len, forked(["run", "--help"]).stdout.splitlines())
    )
    assert "Traceback" not in forked(["inspect", str(model)]).stderr
    assert os.listdir(tmp_path / "model") == os.listdir(model)


def test_one_that_takes_too_long_leaves_the_helper_as_it_was(tmp_path: Path) -> None:
    server = Server(LIGHT)
    try:
        assert server.run(["--version"], timeout=60).stdout.startswith("compress ")
        with pytest.raises(subprocess.TimeoutExpired):
            server.run(["inspect", str(tmp_path)], timeout=0)
        done = server.run(["--version"], timeout=60)
        assert done.returncode == 0 and 0 < done.seconds < 60
        assert 10e6 < done.peak_bytes < 1e9
    finally:
        server.close()
