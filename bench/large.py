"""Whole commands on large synthetic checkpoints: time beside peers, memory, times reading.

    python bench/large.py --size 1b --work DIR [--rounds 5] [--json]
    LLMCOMPRESSOR_PYTHON=... AUTOROUND_PYTHON=... python bench/large.py --size 1b --work DIR
    python bench/large.py --size 8b --work DIR          (16 GB; the disk is checked first)

The checkpoint is made by tools/make_llama.py of COMPRESS_SHARED (default ../shared) unless it is
there. Candidates run in turn, once a round, page cache warm; medians of wall time are compared.
Peers run from their own environments, where the two variables name their Python.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("COMPRESS_SHARED", ROOT.parent / "shared"))
LAYERS_8B = {"8b": None, "8b-4layers": 4}

LLMCOMPRESSOR = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(sys.argv[1], sys.argv[2], scheme="W4A16", max_workers=2,
               ignore=["re:.*embed_tokens.*", "re:.*norm.*", "lm_head"])
"""
# auto-round has a command line; -m runs it with the environment's own Python.
AUTOROUND = ["-m", "auto_round", "--model_free", "--scheme", "W4A16", "--disable_opt_rtn"]


@dataclass
class Candidate:
    """One command line and what it took."""

    name: str
    command: list[str]
    seconds: list[float] = field(default_factory=list)
    peak: int = 0


def main() -> int:
    """Make the checkpoint, run the candidates in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--size", choices=["1b", "8b", "8b-4layers"], default="1b")
    parser.add_argument("--work", type=Path, default=Path("/tmp/compress-large"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model = make_model(arguments.work, arguments.size)
    out = arguments.work / "out"
    candidates = ours(model, out, arguments.size)
    if arguments.size == "1b":
        candidates += peers(model, out)
    nbytes = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    reading = [read_all(model) for _ in range(3)]
    for _ in range(arguments.rounds):
        for candidate in candidates:
            shutil.rmtree(out, ignore_errors=True)
            run(candidate)
    shutil.rmtree(out, ignore_errors=True)
    report(candidates, nbytes, statistics.median(reading), as_json=arguments.json)
    return 0


def make_model(work: Path, size: str) -> Path:
    """The synthetic checkpoint, made once."""
    model = work / size
    if (model / "config.json").exists():
        return model
    needed = {"8b": 18e9, "160m": 0.5e9}.get(size, 4.5e9)
    work.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(work).free < 1.7 * needed:
        sys.exit(f"{work}: {1.7 * needed / 1e9:.0f} GB of free disk needed")
    command = [sys.executable, str(SHARED / "tools" / "make_llama.py"), str(model)]
    command += ["--size", size.split("-", maxsplit=1)[0]]
    if LAYERS_8B.get(size):
        command += ["--layers", str(LAYERS_8B[size])]
    subprocess.run(command, check=True)
    return model


def ours(model: Path, out: Path, size: str) -> list[Candidate]:
    """Our own commands."""
    plain = "quantize:bits=4,group=128,search=none"
    jobs = {
        "plain rounding": [plain, "--jobs", "2"],
        "plain rounding, no fsync": [plain, "--jobs", "2", "--no-fsync"],
        "searched scales, no fsync": ["quantize:bits=4,group=128", "--jobs", "2", "--no-fsync"],
        "prune 50 % global": ["prune:sparsity=0.5", "--jobs", "2", "--no-fsync"],
    }
    if size != "1b":
        jobs.pop("plain rounding")
    base = [sys.executable, "-m", "compress", "run", str(model), "-o", str(out)]
    return [Candidate(name, [*base, *words]) for name, words in jobs.items()]


def peers(model: Path, out: Path) -> list[Candidate]:
    """The peers whose Python is named in the environment."""
    found = []
    if python := os.environ.get("LLMCOMPRESSOR_PYTHON"):
        command = [python, "-c", LLMCOMPRESSOR, str(model), str(out)]
        found.append(Candidate("llm-compressor model_free_ptq", command))
    if python := os.environ.get("AUTOROUND_PYTHON"):
        command = [python, *AUTOROUND, str(model), "--output_dir", str(out)]
        found.append(Candidate("AutoRound model-free RTN", command))
    return found


def run(candidate: Candidate) -> None:
    """Run once; wall time and peak resident size of the process."""
    started = time.perf_counter()
    log = open("/tmp/compress-large.log", "wb")  # noqa: SIM115  shown only where it failed
    process = subprocess.Popen(candidate.command, stdout=log, stderr=log)
    _, status, usage = os.wait4(process.pid, 0)
    log.close()
    if status:
        tail = Path("/tmp/compress-large.log").read_text(errors="replace")[-2000:]
        sys.exit(f"{candidate.name} failed: {tail}")
    candidate.seconds.append(time.perf_counter() - started)
    candidate.peak = max(candidate.peak, usage.ru_maxrss * 1024)


def read_all(model: Path) -> float:
    """Seconds to read the weights once, 8 MiB at a time."""
    started = time.perf_counter()
    buffer = bytearray(8 << 20)
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def report(candidates: list[Candidate], nbytes: int, reading: float, *, as_json: bool) -> None:
    """A line for each candidate: median, multiple of reading, ratio to each peer, memory."""
    rows = []
    others = [c for c in candidates if "model" in c.name]
    for c in candidates:
        median = statistics.median(c.seconds)
        ratios = {o.name: statistics.median(o.seconds) / median for o in others if o is not c}
        rows.append(
            {
                "name": c.name,
                "seconds": round(median, 3),
                "fastest": round(min(c.seconds), 3),
                "times_reading": round(median / reading, 2),
                "peak_mb": round(c.peak / 1e6),
                "faster_than": {k: round(v, 1) for k, v in ratios.items()},
            }
        )
    if as_json:
        print(json.dumps({"bytes": nbytes, "reading_seconds": reading, "rows": rows}, indent=1))
        return
    print(f"{nbytes / 1e9:.2f} GB of weights, reading them once: {reading:.2f} s")
    for row in rows:
        faster = ", ".join(f"{v:.1f}x faster than {k}" for k, v in row["faster_than"].items())
        print(
            f"{row['name']:32} {row['seconds']:7.2f} s (best {row['fastest']:.2f}), "
            f"{row['times_reading']:5.2f}x reading, {row['peak_mb']:5d} MB  {faster}"
        )


if __name__ == "__main__":
    sys.exit(main())
