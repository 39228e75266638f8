"""Coverage-guided fuzzing of the readers, in slices that add up (needs the extra `fuzz`: atheris).

    python bench/fuzz.py [--target NAME|all] [--seconds 600] [--runs N]

A slice starts from what earlier ones found (build/fuzz/TARGET) and from seeds: small files made
here, and the corpus of malformed files where COMPRESS_SHARED, or ../shared, has its generator. An
input that breaks a promise is kept in tests/fuzz/finds/TARGET, one for every place in the code, the
shortest; the slice goes on, in a new process where the old one died. Runs and finds are added to
bench/fuzz_runs.json after every slice. Exit 1 where anything was found.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT / "tests")  # in the place of bench/, whose onnx.py is not the package

import fuzz  # noqa: E402

STATE = ROOT / "bench" / "fuzz_runs.json"
WORK = ROOT / "build" / "fuzz"
WORKER = Path(__file__).with_name("fuzz_worker.py")
HANG = 10  # seconds of one run after which the process is stopped
MEGABYTES = 3000  # of a process; one run may take 100 (fuzz_worker.py)
# The fuzzer itself keeps up to 200 bytes a run in some targets: a new process gives them back.
RUNS_OF_A_PROCESS = 2_000_000


def main() -> int:
    """Run a slice of every target that was asked for; the time is divided among them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--target", default="all", choices=("all", *fuzz.TARGETS))
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--runs", type=int, default=10**9, help="at most so many of each target")
    options = parser.parse_args()
    names = fuzz.TARGETS if options.target == "all" else (options.target,)
    found = 0
    for name in names:
        found += Slice(name).run(options.seconds / len(names), options.runs)
    return 1 if found else 0


class Slice:
    """Some time of one target."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.work = WORK / name
        self.finds = fuzz.FINDS / name
        for folder in ("grown", "seeds", "broken"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        for old in (self.work / "broken").iterdir():
            old.unlink()
        self._write_seeds()

    def run(self, seconds: float, runs: int) -> int:
        """Fuzz; returns the number of finds."""
        before, started, done, deaths = self._kept(), time.monotonic(), 0, 0
        used = processor_seconds()
        while done < runs and (left := seconds - (time.monotonic() - started)) > 1:
            counted, status = self._process(int(left), min(runs - done, RUNS_OF_A_PROCESS))
            done += counted
            self._keep_artifacts()
            deaths += status != 0
            if status != 0 and counted == 0:
                print((self.work / "log").read_text(errors="replace")[-2000:], file=sys.stderr)
                raise SystemExit(f"{self.name}: the fuzzer does not start")
        spent = time.monotonic() - started
        new = self._kept() - before
        used = processor_seconds() - used
        self._record(done, used, new)
        print(
            f"{self.name}: {done:,} runs in {spent:.0f} s ({used:.0f} of a processor,"
            f" {done / max(used, 1):,.0f} a second),"
            f" {len(new)} new finds, {deaths} dead processes", flush=True,
        )  # fmt: skip
        for one in sorted(new):
            print(f"  {one}: {self._what(one)}", flush=True)
        return len(new)

    def _process(self, seconds: int, runs: int) -> tuple[int, int]:
        """One process of libFuzzer: (runs, exit status)."""
        counter, work = self.work / "counter", self.work
        counter.write_bytes(bytes(8))
        limits = [
            f"-max_total_time={seconds}", f"-runs={runs}", f"-timeout={HANG}",
            f"-rss_limit_mb={MEGABYTES}", f"-max_len={fuzz.load(self.name).longest}",
            f"-artifact_prefix={work}/", f"-dict={work}/words", "-print_final_stats=1",
        ]  # fmt: skip
        command = [sys.executable, str(WORKER), self.name, str(work), *limits]
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else str(work)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": memory}
        with open(work / "log", "wb") as log:
            done = subprocess.run(
                [*command, f"{work}/grown", f"{work}/seeds"],
                stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=work, check=False,
            )  # fmt: skip
        return int.from_bytes(counter.read_bytes(), "little"), done.returncode

    def _write_seeds(self) -> None:
        target = fuzz.load(self.name)
        for seed in target.seeds(corpus()):
            name = hashlib.sha256(seed).hexdigest()[:16]
            (self.work / "seeds" / name).write_bytes(seed)
        lines = ["".join(f"\\x{byte:02x}" for byte in word) for word in target.words]
        (self.work / "words").write_text("".join(f'"{line}"\n' for line in lines))

    def _kept(self) -> set[str]:
        return {path.name for path in self.finds.glob("*.bin")}

    def _what(self, find: str) -> str:
        path = self.work / "broken" / find
        return path.read_text() if path.exists() else "put there by hand"

    def _keep_artifacts(self) -> None:
        """What killed a process becomes a find as well; the worker keeps the others itself."""
        for prefix in ("crash-", "timeout-", "oom-"):
            for path in self.work.glob(f"{prefix}*"):
                data = path.read_bytes()
                name = f"{hashlib.sha256(data).hexdigest()[:16]}.bin"
                self.finds.mkdir(parents=True, exist_ok=True)
                (self.finds / name).write_bytes(data)
                (self.work / "broken" / name).write_text(f"the process died: {prefix[:-1]}")
                path.unlink()

    def _record(self, runs: int, used: float, new: set[str]) -> None:
        state = json.loads(STATE.read_text()) if STATE.exists() else {}
        own: dict[str, Any] = state.setdefault(
            self.name, {"runs": 0, "processor_seconds": 0, "finds": {}}
        )
        own["runs"] += runs
        own["processor_seconds"] += round(used)
        own["inputs_kept_for_coverage"] = len(list((self.work / "grown").iterdir()))
        own["last_slice"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        own["sources"] = code_version()
        for name in sorted(new):
            own["finds"][name] = self._what(name)
        # Others may have been replaced by shorter inputs.
        own["finds"] = {name: what for name, what in own["finds"].items() if name in self._kept()}
        STATE.write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")


def corpus() -> Path | None:
    """The corpus of malformed files, made once; None where its generator is not at hand."""
    made = WORK / "corpus"
    shared = Path(os.environ.get("COMPRESS_SHARED", ROOT.parent / "shared"))
    script = shared / "corpus" / "make_corpus.py"
    if not made.exists() and script.exists():
        subprocess.run(
            [sys.executable, str(script), str(made)], check=True, stdout=subprocess.DEVNULL
        )
    return made if made.exists() else None


def processor_seconds() -> float:
    """What processes that this one started and saw end have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def code_version() -> str:
    """A digest of the readers' sources."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "compress").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
