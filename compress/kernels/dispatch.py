"""Which implementation of the kernels runs: resolved once, with the reason kept."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from compress.errors import CompressError, UsageError

EXTENSION = "compress.kernels._cpu"
VARIABLE = "COMPRESS_ISA"
ISAS = ("base", "avx2", "avx512", "avx512vnni", "neon", "dotprod")


@dataclass(frozen=True)
class Backend:
    """The implementation that runs: name ("c++" or "reference"), instruction set and reason."""

    name: str
    isa: str
    reason: str


@dataclass(frozen=True)
class Resolution:
    """The backend, and its extension module (None: the numpy reference)."""

    backend: Backend
    native: Any | None


def load_extension(
    name: str = EXTENSION,
    what: str = "the compiled kernels",
    hint: str = f"rebuild or remove the extension, or set {VARIABLE}=reference",
) -> ModuleType | None:
    """The extension module `name`, or None where it was never built.

    Raises CompressError where it exists and does not load: a broken build must not look like a
    missing one.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        reason = str(error)
    except (ImportError, OSError) as error:
        reason = str(error)
    raise CompressError(f"{what} exist but do not load: {reason}", hint=hint)


def resolve(wanted: str = "") -> Resolution:
    """Choose an implementation: `wanted` forces one ("reference" or an instruction set).

    Raises UsageError where `wanted` is unknown, not built or not supported by this machine.
    """
    forced = f"{VARIABLE}={wanted}"
    if wanted == "reference":
        return Resolution(Backend("reference", "numpy", forced), None)
    if wanted and wanted not in ISAS:
        raise UsageError(
            f"{forced}: unknown instruction set",
            hint=f"use one of: reference, {', '.join(ISAS)}",
        )
    native = load_extension()
    if native is None:
        if wanted:
            raise UsageError(
                f"{forced}: the compiled kernels are not installed",
                hint="install a C++ compiler and reinstall, or unset the variable",
            )
        reason = "the compiled kernels are not installed (no C++ compiler at installation)"
        return Resolution(Backend("reference", "numpy", reason), None)
    available: list[str] = native.available_isas()
    if wanted and wanted not in available:
        raise UsageError(f"{forced}: not available here", hint=f"available: {', '.join(available)}")
    chosen = wanted or available[-1]
    native.set_isa(chosen)
    reason = forced if wanted else f"the best of: {', '.join(available)}"
    return Resolution(Backend("c++", chosen, reason), native)


class _State:
    """Holds the one resolution of the process."""

    resolution: Resolution | None = None


def current() -> Resolution:
    """The process's resolution, made at the first call from the environment."""
    if _State.resolution is None:
        _State.resolution = resolve(os.environ.get(VARIABLE, ""))
    return _State.resolution


def _set_isa(name: str) -> Backend:
    """Switch the implementation of a running process; for tests and benchmarks."""
    _State.resolution = resolve(name)
    return _State.resolution.backend
