"""Fuzz the compiled kernels in slices, with clang's libFuzzer: `make fuzz-kernels`.

    python bench/fuzz_kernels.py [--runs 10000000] [--slice 500000] [--minutes 30] [--targets codes]

Runs the targets of tests/fuzz_kernels in turn, until each has been run so often with the present
sources; stops after so many minutes and goes on the next time. What was done stands in
bench/fuzz_kernels.json after each slice. An input that fails is kept in tests/fuzz_kernels/finds,
where a test replays it; its target is left alone until the input no longer fails. Exit 1 if one
does.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "fuzz_kernels"
STATE = Path(__file__).resolve().parent / "fuzz_kernels.json"
BUILD = ROOT / "build" / "fuzz_kernels"
sys.path.insert(0, str(FOLDER))

from build_fuzzer import TARGETS, fuzzer  # noqa: E402

COMPILERS = ("clang++", "clang++-19", "clang++-17", "clang++-16", "clang++-15", "clang++-14")
MOST_BYTES = 300  # of an input
SEEDS = 64
SLICE_SECONDS = 120  # so that slow targets and fast ones take turns
# A small quarantine, no stacks of allocations (a replay shows them) and no weighing of the corpus:
# several times as fast.
ASAN_OPTIONS = "quarantine_size_mb=4:malloc_context_size=0:allocator_release_to_os_interval_ms=-1"
LIMITS = ("-entropic=0", "-timeout=20", "-rss_limit_mb=2048", "-malloc_limit_mb=512")


@dataclass
class Slice:
    """What one call of the fuzzer did."""

    runs: int
    seconds: float
    failed: bool


def main() -> int:
    """Build, fuzz, record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=10_000_000)
    parser.add_argument("--slice", type=int, default=500_000)
    parser.add_argument("--minutes", type=float, default=60 * 24)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    given = parser.parse_args()
    compiler = next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        print("clang++ is not there: install clang with libFuzzer (docs/sanitizers.md)")
        return 1
    program = fuzzer(compiler, BUILD / "fuzz", avx2=has_avx2())
    deadline = time.monotonic() + 60 * given.minutes
    left, failed = list(given.targets), False
    while left:
        for target in list(left):
            done = fuzz(program, target, given, deadline)
            failed |= done is not None and done.failed
            if done is None or done.failed:
                left.remove(target)
    table(json.loads(STATE.read_text()))
    return 1 if failed else 0


def fuzz(program: Path, target: str, given: argparse.Namespace, deadline: float) -> Slice | None:
    """A slice of one target; None where it has its runs or time is up."""
    corpus, finds = BUILD / "corpus" / target, FOLDER / "finds" / target
    finds.mkdir(parents=True, exist_ok=True)
    seed(corpus, target)
    state = entry(target)
    left = min(given.runs - state["runs"], given.slice)
    seconds = min(deadline - time.monotonic(), SLICE_SECONDS)
    if left <= 0 or seconds < 1:
        return None
    done = one_slice(program, target, [corpus, finds], left, seconds, state["slices"] + 1)
    record(target, done, finds)
    print(f"{target}: {done.runs} runs in {done.seconds:.0f} s", flush=True)
    return done


def one_slice(
    program: Path, target: str, folders: list[Path], runs: int, seconds: float, number: int
) -> Slice:
    """One call of the fuzzer; the slice's number is its seed."""
    words = [
        str(program),
        *map(str, folders),
        f"-runs={runs}",
        f"-max_total_time={max(1, int(seconds))}",
        f"-seed={number}",
        f"-max_len={MOST_BYTES}",
        f"-artifact_prefix={folders[-1]}{os.sep}",
        "-print_final_stats=1",
        *LIMITS,
    ]
    environment = {
        **os.environ,
        "COMPRESS_FUZZ_TARGET": target,
        "ASAN_OPTIONS": ASAN_OPTIONS,
    }
    started = time.monotonic()
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    found = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    if done.returncode:
        print(done.stderr[-6000:])
    return Slice(int(found[1]) if found else 0, time.monotonic() - started, done.returncode != 0)


def seed(corpus: Path, target: str) -> None:
    """Inputs to begin with: libFuzzer would first have to find out that long ones do more."""
    corpus.mkdir(parents=True, exist_ok=True)
    rng = random.Random(target)
    for number in range(SEEDS):
        path = corpus / f"seed-{number}"
        if not path.exists():
            path.write_bytes(rng.randbytes(4 + rng.randrange(MOST_BYTES - 4)))


def sources() -> str:
    """A digest of everything that is compiled: runs count for the sources that they were run on."""
    paths = [
        *ROOT.glob("csrc/*.h"),
        *ROOT.glob("csrc/cpu/*"),
        *FOLDER.glob("*.h"),
        *FOLDER.glob("*.cpp"),
    ]
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def entry(target: str) -> dict[str, Any]:
    """The target's record; its count starts anew where the sources are others."""
    state = json.loads(STATE.read_text()) if STATE.exists() else {}
    new = {"runs": 0, "earlier_runs": 0, "seconds": 0.0, "slices": 0, "finds": [], "date": ""}
    found: dict[str, Any] = new | state.get(target, {})
    if found.get("sources") != sources():
        found["earlier_runs"] += found["runs"]
        found |= {"runs": 0, "seconds": 0.0, "sources": sources()}
    return found


def record(target: str, done: Slice, finds: Path) -> None:
    """Adds a slice to the state's file, which is replaced as a whole."""
    found = entry(target)
    found["runs"] += done.runs
    found["seconds"] = round(found["seconds"] + done.seconds, 1)
    found["slices"] += 1
    found["finds"] = sorted(path.name for path in finds.iterdir())
    found["date"] = datetime.date.today().isoformat()
    state = json.loads(STATE.read_text()) if STATE.exists() else {}
    state[target] = found
    draft = STATE.with_suffix(".draft")
    draft.write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")
    draft.replace(STATE)


def table(state: dict[str, dict[str, Any]]) -> None:
    """Prints what has been done."""
    print(f"{'target':10} {'runs':>12} {'earlier':>12} {'runs/s':>8} {'finds':>6}")
    for target, found in state.items():
        speed = found["runs"] / max(found["seconds"], 1)
        print(
            f"{target:10} {found['runs']:12,} {found['earlier_runs']:12,} {speed:8.0f} "
            f"{len(found['finds']):6}"
        )


def has_avx2() -> bool:
    """Whether this processor has what the AVX2 kernels use."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return all(re.search(rf"\b{flag}\b", flags) for flag in ("avx2", "fma", "f16c", "bmi2"))


if __name__ == "__main__":
    sys.exit(main())
