"""Every CUDA source compiles with nvcc, fuses no operations, and loads where there is no GPU."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cuda_device import PROJECT, build, load_module

from compress.errors import CompressError
from compress.kernels import cuda, cuda_tensors

SOURCES = PROJECT / "csrc" / "cuda"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


@pytest.fixture
def state() -> Iterator[Any]:
    """The record of which module is loaded, reset for a test and put back."""
    record = cuda_tensors._State
    before = (record.loaded, record.module)
    record.loaded, record.module = False, None
    yield record
    record.loaded, record.module = before


@pytest.mark.slow
@needs_nvcc
def test_the_module_compiles_and_loads() -> None:
    module = load_module("_cuda", build("_cuda"))
    assert module.device_type == "cuda"
    assert module.mask_scratch(4097) == 3
    with pytest.raises(ValueError, match="size overflow"):
        module.pack_bits(0, 1 << 40, 1 << 40, 4, 0, 1 << 39, 0, 0)
    with pytest.raises(ValueError, match="w is a null pointer"):
        module.finite_index(0, 0, 4, 64, 0, 0)


def test_every_source_is_in_the_build() -> None:
    listed = re.findall(r"\w+\.cu\b", (SOURCES / "CMakeLists.txt").read_text())
    assert sorted(listed) == sorted(path.name for path in SOURCES.glob("*.cu"))


@needs_nvcc
def test_quantizers_fuse_and_approximate_nothing(tmp_path: Path) -> None:
    """A fused multiply-add or a flushed subnormal would change codes."""
    ptx = tmp_path / "quantize.ptx"
    flags = ["-std=c++17", "-arch=compute_80", "--fmad=false", "-ptx"]
    command = ["nvcc", *flags, str(SOURCES / "quantize.cu"), "-o", str(ptx)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    operations = set(re.findall(r"\b[a-z]+(?:\.[a-z0-9]+)*\.f(?:32|64)\b", ptx.read_text()))
    assert {"mul.rn.f32", "add.rn.f32", "div.rn.f32", "div.rn.f64"} <= operations
    assert not [name for name in operations if re.search(r"fma|ftz|approx|^mul\.f|^add\.f", name)]


def test_a_missing_build_is_told_from_a_broken_one(
    state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert cuda.availability().available is False
    assert "not built" in cuda.availability().reason
    with pytest.raises(CompressError, match="not built"):
        cuda.finite_index(None)  # type: ignore[arg-type]

    def broken(name: str) -> Any:
        raise ImportError("libcudart.so.99: cannot open shared object file")

    state.loaded = False
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(CompressError, match="CUDA kernels exist but do not load: libcudart"):
        cuda.availability()

    def lacks_another(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'other'", name="other")

    monkeypatch.setattr(importlib, "import_module", lacks_another)
    with pytest.raises(CompressError, match="do not load: No module named 'other'"):
        cuda.availability()
