"""Where tests of the CUDA kernels run: the same sources compiled for the CPU, or a device.

On the CPU every tensor ends (or begins) at a page that may not be touched, so that a read or write
beyond it crashes; on both, the bytes around outputs are compared afterwards.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.kernels import cuda, cuda_tensors

PROJECT = Path(__file__).resolve().parent.parent
TEST_BUILD = PROJECT / "build" / "cuda-tests"
CANARY = 0xA5
MARGIN = 512
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "uint8": torch.uint8,
    "bool": torch.bool,
    "uint16": torch.int16,
    "int32": torch.int32,
    "uint32": torch.int32,
    "int64": torch.int64,
    "uint64": torch.int64,
}


def find_program(name: str) -> str | None:
    """A program beside this Python, or on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def build(target: str) -> Path:
    """Builds a module of csrc/cuda in build/cuda-tests; skips where the tools for that are missing.

    What has not changed since the last run is not built again.
    """
    cmake, ninja = find_program("cmake"), find_program("ninja")
    if cmake is None or importlib.util.find_spec("nanobind") is None:
        pytest.skip("building csrc/cuda needs cmake and nanobind")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("building csrc/cuda needs a C++ compiler")
    options = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCOMPRESS_CUDA={'ON' if shutil.which('nvcc') else 'OFF'}",
        "-DCMAKE_CUDA_ARCHITECTURES=80-real",  # one of three: a third of the time
        "-DCOMPRESS_CUDA_EMULATED=ON",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O0",  # of what surrounds the kernels
    ]
    if ninja is not None:
        options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    commands = (
        [cmake, "-S", PROJECT, "-B", TEST_BUILD, *options],
        [cmake, "--build", TEST_BUILD, "--target", target, "--parallel", "2"],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(f"{target} does not build:\n{done.stdout}{done.stderr}")
    return max(TEST_BUILD.rglob(f"{target}.*so"), key=lambda path: path.stat().st_mtime)


def load_module(name: str, path: Path) -> Any:
    """The extension module in a file, outside any package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def emulated_module() -> Any:
    """The CUDA sources compiled for the CPU."""
    return load_module("_cuda_emulated", build("_cuda_emulated"))


def to_torch(array: np.ndarray) -> torch.Tensor:
    """A copy; bfloat16 of ml_dtypes becomes torch's, unsigned integers signed ones."""
    raw = torch.from_numpy(np.frombuffer(array.tobytes() or b"\0", np.uint8).copy())
    return raw[: array.nbytes].view(TORCH_DTYPES[array.dtype.name]).reshape(array.shape)


class Device:
    """Places tensors and looks after the bytes around them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.buffers: list[tuple[torch.Tensor, int, int]] = []
        self.turn = 0

    def put(self, array: np.ndarray) -> torch.Tensor:
        """A copy of `array` whose surroundings `check` compares."""
        source = to_torch(array)
        self.turn += 1
        room, start = self._room(source.nbytes, source.element_size())
        self.buffers.append((room, start, source.nbytes))
        area = room[start : start + source.nbytes].view(source.dtype).reshape(source.shape)
        area.copy_(source)
        return area

    def output(self, shape: tuple[int, ...], dtype: Any) -> torch.Tensor:
        """An output full of canaries."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        filled = np.full(size, CANARY, np.uint8)
        if dtype == np.bool_:
            filled[...] = 1
        return self.put(filled.view(dtype).reshape(shape))

    def _room(self, size: int, item: int) -> tuple[torch.Tensor, int]:
        if self.name == "gpu":
            shift = (self.turn % 4) * item  # aligned to 16 bytes, or not
            full = torch.full((size + 2 * MARGIN,), CANARY, dtype=torch.uint8, device="cuda")
            return full, MARGIN + shift
        page = mmap.PAGESIZE
        inner = max(1, -(-size // page)) * page
        mapped = mmap.mmap(-1, inner + 2 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        for offset in (0, page + inner):
            if ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + offset), page, 0) != 0:
                raise OSError("mprotect failed")
        room = torch.frombuffer(mapped, dtype=torch.uint8, count=inner, offset=page)
        room.fill_(CANARY)
        # Mostly at the end: reading on is the likelier mistake. At the start: 16-byte loads.
        return room, 0 if self.turn % 4 == 0 else inner - size

    def check(self) -> None:
        """Nothing around any tensor was written."""
        for room, start, size in self.buffers:
            assert bool((room[:start] == CANARY).all()), "written before a tensor"
            assert bool((room[start + size :] == CANARY).all()), "written behind a tensor"
        self.buffers.clear()


def to_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes on the host."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def need_device() -> None:
    """Skips, with the reason, where the kernels have no device to run on."""
    found = cuda.availability()
    if not found.available or found.reason.startswith("emulated"):
        pytest.skip(found.reason)


def _places() -> list[Any]:
    """Two orders of threads on the CPU; a device where there is one (else two tests tell why)."""
    gpu = [pytest.param("gpu", marks=pytest.mark.gpu)] if cuda.availability().available else []
    return ["emulated", "reversed", *gpu]


@pytest.fixture(params=_places(), name="device")
def device_fixture(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Runs a test on the emulated sources, threads forward and backward, and on a device."""
    if request.param == "gpu":
        yield Device("gpu")
        return
    state = cuda_tensors._State
    before = (state.loaded, state.module)
    module = emulated_module()
    module.set_reverse(request.param == "reversed")
    state.loaded, state.module = True, module
    yield Device("cpu")
    state.loaded, state.module = before
