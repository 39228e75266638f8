"""The kernel tests on instruction sets that this machine lacks: `make cross`.

The compiled kernels run in a program of their own (tests/cross/driver.cpp): for aarch64 under
QEMU, and with AVX-512 emulated by SIMDe. See docs/sanitizers.md.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("test_kernels*.py", "test_product*.py", "test_obs.py")
TESTS = [path for name in NAMES for path in sorted(ROOT.glob(f"tests/{name}"))]

pytestmark = pytest.mark.skipif(
    "COMPRESS_CROSS" not in os.environ, reason="minutes of compilation: run `make cross`"
)


@dataclass(frozen=True)
class Target:
    """How to build the driver, what runs it, and the instruction sets that are checked there."""

    needs: tuple[str, ...]  # programs, and headers by their path
    isas: str = ""  # some of the driver's instruction sets, or all
    runner: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        return [n for n in self.needs if shutil.which(n) is None and not Path(n).is_file()]


TARGETS = {
    "neon": Target(
        needs=("aarch64-linux-gnu-g++", "qemu-aarch64"),
        runner=("qemu-aarch64",),
        options=(
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        ),
    ),
    "avx512": Target(needs=("/usr/include/simde/x86/avx512.h",), isas="avx512,avx512vnni"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_elsewhere(name: str) -> None:
    target = TARGETS[name]
    if missing := target.missing():
        pytest.skip(f"needs {', '.join(missing)}")
    build = ROOT / "build" / "cross" / name
    bin_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": bin_path}
    configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCOMPRESS_CROSS=ON"]
    subprocess.run([*configure, *target.options], env=environment, check=True)
    subprocess.run(["cmake", "--build", build], env=environment, check=True)

    environment |= {
        "COMPRESS_CROSS_DRIVER": shlex.join([*target.runner, str(build / "driver")]),
        "COMPRESS_CROSS_ISAS": target.isas,
        "COMPRESS_TEST_EXTENSION": str(ROOT / "tests" / "cross" / "remote.py"),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "extension"), str(ROOT)]),
    }
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", "not torch", *TESTS],
        cwd=ROOT,
        env=environment,
        check=True,
    )
