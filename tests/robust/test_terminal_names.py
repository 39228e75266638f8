"""Names from files on the terminal: escaped, whole lines, no markup, in every command."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toolbox import write_safetensors

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
# What a stranger may call a tensor, and a piece of what should be seen of it.
NAMES = {
    "a\x1b[2J\x1b[35;5m.weight": r"a\x1b[2J\x1b[35;5m.weight",
    "b\x1b]0;owned\x07.weight": r"b\x1b]0;owned\x07.weight",
    "c\nerror: forged.weight": r"c\nerror: forged.weight",
    "d\r\x08\x7f\x00.weight": r"d\r\x08\x7f\x00.weight",
    "e[red]red[/red].weight": "e[red]red[/red].weight",
    "f[/nothing]:boom:.weight": "f[/nothing]:boom:.weight",
    "g[link=file:///etc/passwd]x[/link].weight": "g[link=file:///etc/passwd]x[/link].weight",
    "h\u202egnp.weight\u2066": r"h\u202egnp.weight\u2066",
    "i\x9b31m\u2028\u0085.weight": r"i\x9b31m\u2028\x85.weight",
    "j" + "{0}%s" * 2000 + ".weight": "j{0}%s{0}%s",
    "k\u0430\u200b\ufeff.weight": r"k\u0430\u200b\ufeff.weight",
}
BAD = "z\x1b[2J[red]\nnan.weight"
# What rich itself writes: colours, bold, and the moves of a progress bar.
OWN = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[[0-9]*[AK]")
PASSES = ["quantize:bits=4,group=-1,targets=*", "low-rank:rank=1,targets=*"]


def model_of(folder: Path, names: list[str], *, bad: bool = False) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal((16, 32)).astype(np.float32) for n in names}
    if bad:
        tensors[BAD] = np.full((16, 32), np.nan, np.float32)
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Commands that print names: tables, reports, warnings and errors."""
    root = tmp_path_factory.mktemp("names")
    model = str(model_of(root / "model", list(NAMES)))
    part = str(model_of(root / "part", list(NAMES)[1:]))
    bad = str(model_of(root / "bad", [], bad=True))
    out, other = str(root / "out"), str(root / "other")
    return [
        ["inspect", model, "--values"],
        ["plan", model, *PASSES, "--survey"],
        ["run", model, *PASSES, "-o", out, "--overwrite"],
        ["run", part, "prune:sparsity=0.5,targets=*", "-o", other, "--overwrite"],
        ["diff", model, out],
        ["diff", out, other],
        ["inspect", out],
        ["verify", other, "--source", model],
        ["run", bad, *PASSES, "-o", str(root / "never")],
        ["plan", model, f"quantize:targets={BAD}"],
        ["inspect", str(root / "no[red]\x1b[2Jthing")],
    ]


CODES = [0, 0, 0, 0, 0, 0, 0, 5, 3, 2, 2]


def outputs(commands: list[list[str]], log: Path, *, terminal: bool) -> list[str]:
    """What each command printed on both streams, and its exit code at the end."""
    done = driven(commands, log, terminal=terminal)
    parts = re.split(r"== \d+ (exit \d+)\r?\n", done)
    return [text + code for text, code in zip(parts[::2], parts[1::2], strict=False)]


def driven(commands: list[list[str]], log: Path, *, terminal: bool) -> str:
    words = [sys.executable, str(HERE / "several.py"), str(log)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "TERM": "xterm", "COLUMNS": "200"}
    given = json.dumps(commands)
    if not terminal:
        done = subprocess.run(
            words, input=given.encode(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            check=True, timeout=120, env=environment,
        )  # fmt: skip
        return done.stdout.decode()
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        assert process.stdin is not None
        process.stdin.write(given.encode())
        process.stdin.close()
        said = b""
        try:
            while chunk := os.read(ours, 1 << 16):
                said += chunk
        except OSError:
            pass  # how Linux says that the other side is closed
        finally:
            os.close(ours)
    return said.decode()


@pytest.mark.parametrize("terminal", [False, True])
def test_no_name_reaches_the_terminal_as_it_is(
    commands: list[list[str]], tmp_path: Path, terminal: bool
) -> None:
    said = outputs(commands, tmp_path / "log", terminal=terminal)
    assert [int(text.split()[-1]) for text in said] == CODES
    for words, text in zip(commands, said, strict=True):
        plain = OWN.sub("", text).replace("\r\n", "\n")
        plain = plain.replace("\r", "") if terminal else plain  # a progress bar starts lines anew
        odd = {c for c in plain if not (c.isprintable() or c == "\n")}
        assert odd == set(), words
        assert set(plain) & set("\u202e\u2066\u200b\ufeff\u0430") == set(), words
        assert "\x1b[35;5m" not in text and "\x1b[2J" not in text
        assert not any(line.startswith("error: forged") for line in plain.splitlines())
        assert max(len(line) for line in plain.splitlines()) < 500, words
        assert "Traceback" not in plain
    inspected = OWN.sub("", said[0])
    for piece in NAMES.values():
        assert piece[:40] in inspected, piece
    for text in said[2], said[4]:
        assert "e[red]red[/red].weight" in OWN.sub("", text)
    assert r"z\x1b[2J[red]\nnan.weight" in said[8]


def test_errors_are_lines(commands: list[list[str]], tmp_path: Path) -> None:
    """An error is one line and a hint, whatever the names in it."""
    for text in outputs(commands[7:], tmp_path / "log", terminal=False):
        lines = text.splitlines()[:-1]
        assert lines[0].startswith("error: ")
        assert len(lines) <= 2 and all(line.isprintable() for line in lines)
