"""Fuzz targets of the readers: one module each, with `target(data)`, `seeds(corpus)`, `WORDS`.

    target(data)   calls a reader of the product on one input; returns where the reader took it or
                   refused it as it promises to, raises anything else (`Broken` mostly) otherwise
    seeds(corpus)  inputs to start from; `corpus` is the folder of malformed files, None without it
    WORDS          what the fuzzer may put into an input

Nothing here needs atheris: the driver is bench/fuzz.py, and the tests replay what it kept.
docs/fuzzing.md says more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

TARGETS = (
    "safetensors_header", "shards_index", "config", "recipe", "words", "manifest", "torch_file",
    "onnx_graph", "record", "statistics",
)  # fmt: skip
FINDS = Path(__file__).resolve().parent / "finds"


@dataclass(frozen=True)
class Target:
    """A target with what the fuzzer is given.

    mutate  (data, longest result, seed) -> data, where it has mutations of its own
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[Path | None], Iterator[bytes]]
    words: tuple[bytes, ...]
    mutate: Callable[[bytes, int, int], bytes] | None
    longest: int  # bytes of an input

    def finds(self) -> list[Path]:
        """The inputs that broke it once."""
        return sorted((FINDS / self.name).glob("*.bin"))


def load(name: str) -> Target:
    """A target by name."""
    module: Any = import_module(f"{__name__}.{name}")
    return Target(
        name, module.target, module.seeds, module.WORDS, getattr(module, "mutate", None),
        getattr(module, "LONGEST", 2048),
    )  # fmt: skip
