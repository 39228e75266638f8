"""Everything that can only be checked on a device, in one go: `make cuda-check` runs this.

Tests of the CUDA kernels on the device, the same under compute-sanitizer where it is installed,
then bench/cuda.py. Without a device it says so in one line and succeeds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from compress.errors import CompressError
from compress.kernels import cuda

PROJECT = Path(__file__).resolve().parent.parent
TESTS = ["tests/test_cuda.py", "tests/test_cuda_products.py"]
PYTEST = [sys.executable, "-m", "pytest", "-q", *TESTS]
TOOLS = ("memcheck", "racecheck", "synccheck")
SHORT = "gpu and not slow"


def run(title: str, command: list[str], **environment: str) -> bool:
    """Runs one step in the project's folder and says how it went."""
    print(f"== {title}", flush=True)
    done = subprocess.run(command, cwd=PROJECT, env={**os.environ, **environment}, check=False)
    print(f"== {title}: {'passed' if done.returncode == 0 else 'FAILED'}", flush=True)
    return done.returncode == 0


def main() -> int:
    try:
        found = cuda.availability()
    except CompressError as error:
        print(f"cuda-check: {error}")
        return 1
    if not found.available:
        print(f"cuda-check: nothing was run on a device: {found.reason}")
        return 0
    print(f"cuda-check: on {found.reason}")
    passed = [run("tests on the device", [*PYTEST, "-m", "gpu"])]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("== compute-sanitizer is not installed: its checks are left out")
    else:
        for tool in TOOLS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *PYTEST, "-m", SHORT]
            # Without the caching allocator every tensor is an allocation with bounds of its own.
            passed.append(run(tool, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    passed.append(run("timings", [sys.executable, "bench/cuda.py"]))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
