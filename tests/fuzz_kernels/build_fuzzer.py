"""Compiles the fuzzed kernels: bindings, kernels and targets in one program without Python.

`fuzzer` is for bench/fuzz_kernels.py and needs clang with libFuzzer; `replayer` is for tests and
needs any compiler with the sanitizers. Objects are kept, and made again where a source is newer or
the command is another.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TARGETS = ("codes", "bitmask", "products", "quantize", "matrices")
COMMON = ("-std=c++17", "-g1", "-fno-omit-frame-pointer", f"-I{ROOT / 'tests' / 'cross'}")
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"
CHECKS = (SANITIZERS, "-fno-sanitize-recover=all")
# What these would find in a kernel, AddressSanitizer finds where memory is touched; without them
# the kernels compile in half the time.
FEWER = ("-fno-sanitize=null,object-size,pointer-overflow",)
COVERAGE = ("-fsanitize-coverage=inline-8bit-counters,pc-table",)
# Those of CMakeLists.txt.
EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt")
BINDINGS = ("binding", "product_blob", "threads")
OWN = ("blob", "bitmask", "call", "codes", "entry", "matrices", "planted", "products", "quantize")


def fuzzer(compiler: str, build: Path, *, avx2: bool) -> Path:
    """The program that libFuzzer drives. What makes and judges its calls is not instrumented."""
    checked = ("-O1", *CHECKS, *COVERAGE)
    objects = _objects(compiler, build, checked, ("-O2",), OWN, avx2)
    return _link(compiler, build / "fuzz", objects, f"{SANITIZERS},fuzzer")


def replayer(compiler: str, build: Path, *, avx2: bool) -> Path:
    """A program that replays inputs from files; not optimized, so that it is compiled soon."""
    checked = ("-O0", *CHECKS)
    objects = _objects(compiler, build, checked, checked, (*OWN, "replay"), avx2)
    return _link(compiler, build / "replay", objects, SANITIZERS)


def _objects(
    compiler: str,
    build: Path,
    checked: Sequence[str],
    own: Sequence[str],
    names: Sequence[str],
    avx2: bool,
) -> list[Path]:
    """The compiled sources; kernels and bindings with the options `checked`."""
    build.mkdir(parents=True, exist_ok=True)
    kernels = ROOT / "csrc" / "cpu"
    options: dict[Path, Sequence[str]] = {kernels / f"{name}.cpp": checked for name in BINDINGS}
    options[kernels / "kernels_base.cpp"] = (*checked, *FEWER, *EXACT)
    if avx2:
        options[kernels / "kernels_avx2.cpp"] = (*checked, *FEWER, *EXACT, *AVX2)
    options |= {HERE / f"{name}.cpp": (*own, *EXACT) for name in names}
    options[HERE / "tables.cpp"] = (*own, *(["-DCOMPRESS_FUZZ_AVX2"] if avx2 else []))
    headers = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cpu/*.h"), *HERE.glob("*.h")]
    headers += ROOT.glob("tests/cross/nanobind/**/*.h")
    newest = max(path.stat().st_mtime for path in headers)
    objects = []
    for source, words in options.items():
        command = [compiler, *COMMON, *words, "-c", str(source), "-o"]
        mark = hashlib.sha256(" ".join(command).encode()).hexdigest()[:8]
        made = build / f"{source.stem}-{mark}.o"
        if not made.exists() or made.stat().st_mtime < max(newest, source.stat().st_mtime):
            subprocess.run([*command, str(made)], check=True)
        objects.append(made)
    return objects


def _link(compiler: str, program: Path, objects: Sequence[Path], sanitizers: str) -> Path:
    words = [compiler, sanitizers, *map(str, objects), "-o", str(program), "-pthread", "-ldl"]
    subprocess.run(words, check=True)
    return program
