"""The sdist and the wheel, installed in empty environments with a C++ compiler and without one.

    python bench/installs.py [--python python3.12] [--work build/installs]

Builds both, looks at what they hold, and installs each twice in an environment of its own: as it
is, and with no compiler to be found. There `compress --version`, `compress run` on a small
generated model and `compress verify` must work, and every installation must write the same bytes:
with a compiler by the C++ kernels, from an sdist without one by the numpy reference. pip brings the
dependencies of constraints.txt each time (1 GB an environment with torch's CPU build, 6 GB with the
CUDA build; it is removed after its turn).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from toolbox import tiny_llama, tree

ROOT = Path(__file__).resolve().parent.parent
PASSES = ("prune:sparsity=0.5", "quantize:bits=4,group=32,symmetric=false", "low-rank:rank=2")
KERNELS = "from compress import kernels; b = kernels.backend(); print(b.name, b.isa)"
NOWHERE = "/nonexistent/compiler"
# What a build needs.
NEEDED = (
    "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "compress/__init__.py",
    "compress/py.typed", "csrc/kernels.h", "csrc/cpu/binding.cpp",
)  # fmt: skip


@dataclass(frozen=True)
class Installed:
    """What became of one installation."""

    what: str
    compiler: bool
    kernels: str
    seconds: int
    files: dict[str, str]

    @property
    def row(self) -> str:
        """Of the table."""
        compiler = "yes" if self.compiler else "no"
        return f"| {self.what} | {compiler} | {self.kernels} | {self.seconds} s |"


def main() -> int:
    """Build, install, run, compare; 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="the interpreter to install for")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "installs")
    options = parser.parse_args()
    work = options.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    sdist, wheel = build(options.python, work)
    problems = [*in_wheel(wheel), *in_sdist(sdist)]
    model = tiny_llama(work / "model", hidden=64, ffn=96, layers=1)
    done = [
        install(options.python, artifact, compiler, work, model)
        for artifact in (sdist, wheel)
        for compiler in (True, False)
    ]
    print("| installed | compiler | kernels | time of installation |\n|---|---|---|---|")
    for one in done:
        print(one.row)
        if one.files != done[0].files:
            problems.append(f"{one.what}, compiler {one.compiler}: other bytes than the first")
        reference = one.what == "sdist" and not one.compiler
        if one.kernels.startswith("reference") is not reference:
            problems.append(f"{one.what}, compiler {one.compiler}: runs on {one.kernels}")
    print(*problems or ["all wrote the same bytes"], sep="\n")
    return int(bool(problems))


def build(python: str, work: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    tools = environment(python, work / "tools")
    pip(tools, "build")
    words = [tools, "-m", "build", "--outdir", work / "dist", ROOT]
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL)
    (sdist,) = (work / "dist").glob("*.tar.gz")
    (wheel,) = (work / "dist").glob("*.whl")
    for path in (sdist, wheel):
        print(f"{path.name}: {path.stat().st_size:,} bytes")
    return sdist, wheel


def in_wheel(wheel: Path) -> list[str]:
    """Problems with what the wheel holds."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    own = [n for n in names if not (n.startswith("compress/") or ".dist-info/" in n)]
    problems = [f"{wheel.name} holds {name}" for name in own]
    if not any(n.startswith("compress/kernels/_cpu") for n in names):
        problems.append(f"{wheel.name}: no compiled kernels")
    return problems


def in_sdist(sdist: Path) -> list[str]:
    """Problems with what the sdist holds."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    problems = [f"{sdist.name}: no {name}" for name in NEEDED if name not in names]
    unwanted = [n for n in names if n.endswith((".so", ".o", ".pyc")) or n.startswith("build/")]
    return problems + [f"{sdist.name} holds {name}" for name in sorted(unwanted)]


def install(python: str, artifact: Path, compiler: bool, work: Path, model: Path) -> Installed:
    """One installation in an empty environment, and what its `compress` writes."""
    what = "sdist" if artifact.name.endswith(".tar.gz") else "wheel"
    home = work / f"{what}-{'with' if compiler else 'without'}"
    own = environment(python, home / "env")
    settings = dict(os.environ) if compiler else without_compiler(home)
    settings.pop("PYTHONPATH", None)
    started = time.perf_counter()
    pip(own, "-c", str(ROOT / "constraints.txt"), str(artifact), settings=settings)
    seconds = round(time.perf_counter() - started)

    def call(*words: object) -> str:
        command = [str(word) for word in words]
        done = subprocess.run(
            command, env=settings, cwd=home, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{what}, compiler {compiler}: {command[1]}: {done.stderr.strip()}")
        return done.stdout.strip()

    tool, out = own.parent / "compress", home / "out"
    said = call(tool, "--version")
    call(tool, "run", model, "-o", out, *PASSES, "--format", "native")
    print(f"{home.name}: {said}; {call(tool, 'verify', out)}", flush=True)
    result = Installed(what, compiler, call(own, "-c", KERNELS), seconds, tree(out))
    shutil.rmtree(home / "env")
    return result


def environment(python: str, home: Path) -> Path:
    """The interpreter of a new virtual environment."""
    subprocess.run([python, "-m", "venv", str(home)], check=True)
    return home / "bin" / "python"


def pip(python: Path, *what: str, settings: dict[str, str] | None = None) -> None:
    words = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*words, *what], check=True, env=settings, stdout=sys.stderr)


def without_compiler(home: Path) -> dict[str, str]:
    """The process's variables with nothing on PATH, and compilers that do not exist."""
    empty = home / "bin"
    empty.mkdir()
    return dict(os.environ) | {"PATH": str(empty), "CC": NOWHERE, "CXX": NOWHERE}


if __name__ == "__main__":
    sys.exit(main())
