"""Peak memory: the plan's bound beside what a run really took, over models and recipes.

    python bench/memory.py MODEL [MODEL ...]

Every run is a process of its own (ru_maxrss); the bound must hold and be within a factor of two.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TOOL = [sys.executable, "-m", "compress"]
RECIPES = (
    ["quantize:bits=4,group=128,search=none,on_indivisible=channel"],
    ["quantize:bits=4,group=64,on_indivisible=channel"],
    ["prune:sparsity=0.5"],
    ["prune:sparsity=0.5", "--format", "native"],
    ["prune:sparsity=0.5", "quantize:bits=4,group=64,on_indivisible=channel", "--format", "native"],
    ["quantize:bits=4,group=64,on_indivisible=channel", "low-rank:rank=8"],
)


def main() -> int:
    """Print a line a run; exit 1 where a bound does not hold."""
    broken = 0
    for model in map(Path, sys.argv[1:]):
        for words in RECIPES:
            pickle = ["--allow-pickle"] if model.suffix in (".th", ".pt", ".pth", ".bin") else []
            planned, measured = measure(model, [*words, *pickle])
            ratio = planned / measured
            broken += not 1 <= ratio <= 2
            verdict = "holds" if 1 <= ratio <= 2 else "WRONG"
            print(
                f"{model.name:24} {' '.join(words)[:70]:70} plan {planned / 1e6:7.0f} MB, "
                f"measured {measured / 1e6:7.0f} MB, ratio {ratio:.2f} {verdict}",
                flush=True,
            )
    return 1 if broken else 0


def measure(model: Path, words: list[str]) -> tuple[int, int]:
    """(planned, measured) bytes of one run."""
    plan = subprocess.run(
        [*TOOL, "plan", str(model), *words, "--jobs", "2", "--json"],
        check=True,
        capture_output=True,
    )
    folder = Path(tempfile.mkdtemp(prefix="compress-memory-"))
    try:
        command = ["run", str(model), "-o", str(folder / "out"), *words]
        peak, code, errors = peak_of([*command, "--jobs", "2", "--no-fsync"])
        if code:
            sys.exit(f"{' '.join(command)} failed: {errors}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return json.loads(plan.stdout)["peak_memory"], peak


def peak_of(words: list[str]) -> tuple[int, int, str]:
    """Largest resident bytes of `compress WORDS` in a process of its own, its code, its errors."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([*TOOL, *words], stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    return usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status), said


if __name__ == "__main__":
    sys.exit(main())
