"""Inputs that once made a fuzzed kernel fail, replayed; and that a fault would be found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "fuzz_kernels"
sys.path.insert(0, str(FOLDER))

from build_fuzzer import TARGETS, replayer  # noqa: E402

BUILD = FOLDER.parent.parent / "build" / "fuzz_kernels" / "replay"  # what is there stays of use
COMPILER = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
GENERATED = 300  # inputs a target, so that one without finds is tried, too

pytestmark = [
    pytest.mark.slow,  # a minute or two of compilation, the first time
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler with sanitizers"),
]


@pytest.fixture(scope="module")
def replay() -> Path:
    assert COMPILER is not None
    return replayer(COMPILER, BUILD, avx2=False)


def run(program: Path, target: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *words],
        env={**os.environ, "COMPRESS_FUZZ_TARGET": target, "LD_PRELOAD": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_found_is_mended(replay: Path, target: str) -> None:
    finds = sorted((FOLDER / "finds" / target).glob("*"))
    for words in (finds, ["--generate", str(GENERATED), "1"]):
        done = run(replay, target, *words)
        assert done.returncode == 0, done.stderr


PLANTED = {
    "R": "heap-buffer-overflow",  # a read behind kept values
    "W": "heap-buffer-overflow",  # a write behind codes
    "D": "a call that fits was refused",
}


@pytest.mark.parametrize("letter", PLANTED)
def test_planted_faults_are_found(replay: Path, tmp_path: Path, letter: str) -> None:
    (tmp_path / "input").write_text(letter)
    done = run(replay, "planted", tmp_path / "input")
    assert done.returncode != 0
    assert PLANTED[letter] in done.stderr


def test_nothing_planted_nothing_found(replay: Path, tmp_path: Path) -> None:
    (tmp_path / "input").write_text("-")
    assert run(replay, "planted", tmp_path / "input").returncode == 0
