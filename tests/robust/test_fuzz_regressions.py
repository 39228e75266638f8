"""What fuzzing found stays mended, and the targets notice readers that break their promises.

The fuzzing itself is `make fuzz` (docs/fuzzing.md); this replays what it kept, runs every target on
its seeds and on a few mutations of them, and needs no atheris.
"""

from __future__ import annotations

import json
import signal
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import fuzz
import pytest
from fuzz import Target, recipe, safetensors_header, shards_index
from fuzz.checks import Broken

from compress.checkpoint.index import Index
from compress.errors import CompressError, InputError, UsageError, VerifyError

RUNS = {"recipe": 60, "words": 100, "torch_file": 150}  # others are faster
# The reader that each target calls: where it finds it, and how that one refuses.
READERS: dict[str, tuple[str, type[CompressError]]] = {
    "safetensors_header": ("read_header", InputError),
    "shards_index": ("read_index", InputError),
    "config": ("parse_config", InputError),
    "recipe": ("read_recipe", UsageError),
    "words": ("parse_pass", UsageError),
    "manifest": ("manifest.read", VerifyError),
    "torch_file": ("torch_file.convert", InputError),
    "onnx_graph": ("check_onnx", InputError),
    "record": ("decode", InputError),
    "statistics": ("_parse", InputError),
}


def finds() -> list[Any]:
    return [
        pytest.param(name, path, id=f"{name}-{path.stem}")
        for name in fuzz.TARGETS
        for path in fuzz.load(name).finds()
    ]


@pytest.fixture(autouse=True)
def _no_run_without_end() -> Iterator[None]:
    """A reader that hangs fails; the fuzzer stops after ten seconds."""

    def stop(*_: object) -> None:
        raise Broken("a minute of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 60)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.fixture(scope="module", params=fuzz.TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return fuzz.load(request.param)


@pytest.mark.parametrize(("name", "path"), finds())
def test_finds_stay_mended(name: str, path: Path) -> None:
    fuzz.load(name).run(path.read_bytes())


def test_seeds_and_their_mutations(target: Target, corpus: Path) -> None:
    rng = Random(target.name)
    seeds = list(target.seeds(corpus))
    assert len(seeds) >= 2
    for seed in seeds:
        target.run(seed)
    for _ in range(RUNS.get(target.name, 300)):
        target.run(mutated(rng.choice(seeds), target, rng))


def mutated(data: bytes, target: Target, rng: Random) -> bytes:
    """A few bytes changed, dropped, doubled, or replaced by a word of the target's."""
    if target.mutate is not None and rng.random() < 0.7:
        return target.mutate(data, target.longest, rng.randrange(1 << 30))
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.randrange(8))
        new = rng.choice(
            (b"", bytes([rng.randrange(256)]), data[at:to] * 2, rng.choice(target.words))
        )
        data = data[:at] + new + data[to:]
    return data[: target.longest]


def raising(error: Exception) -> Callable[..., Any]:
    def read(*_: Any, **__: Any) -> Any:
        raise error

    return read


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_broken_reader_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another exception, another class of error, a control character, a text without end."""
    place, kind = READERS[name]
    module = f"fuzz.{name}.{place}"
    target = fuzz.load(name)
    data = next(d for d in target.seeds(None) if name != "onnx_graph" or _is_run(d))
    target.run(data)
    own = getattr(import_module(f"fuzz.{name}"), "NAME", "")
    named = f"{own} recipe.yaml manifest.json record"
    for error in (
        KeyError("w"), RecursionError(), CompressError("of no class"), kind(f"{named}\x1b[2J"),
        kind(f"{named} \N{LATIN SMALL LETTER E WITH ACUTE}"), kind(named + "x" * 600),
    ):  # fmt: skip
        monkeypatch.setattr(module, raising(error))
        with pytest.raises((type(error), Broken)):
            target.run(data)


def _is_run(data: bytes) -> bool:
    """Whether the target of graphs takes this input to `check_onnx`."""
    return bool(zlib.crc32(data) & 1)


def test_a_reader_that_finds_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = safetensors_header.read_header

    def other_dtype(file: Any) -> Any:
        header = real(file)
        return replace(header, entries=[replace(entry, dtype="I32") for entry in header.entries])

    file = b'\x02{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    safetensors_header.target(file)
    monkeypatch.setattr(safetensors_header, "read_header", other_dtype)
    with pytest.raises(Broken, match="another dtype"):
        safetensors_header.target(file)


def test_a_reader_that_takes_a_path_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(file: Any, suffix: str) -> Index:
        raw = file.read_all(1000)
        return Index(file.name, json.loads(raw)["weight_map"], None, raw)

    text = b'\x00{"weight_map":{"a":"../x.safetensors"}}'
    shards_index.target(text)
    monkeypatch.setattr(shards_index, "read_index", careless)
    with pytest.raises(Broken, match="outside of the folder"):
        shards_index.target(text)


def test_a_recipe_that_loses_an_option_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"passes: [quantize]\nseed: 3\n"
    recipe.target(text)
    real = recipe.recipe_from_mapping
    monkeypatch.setattr(recipe, "recipe_from_mapping", lambda data: real(data | {"seed": 0}))
    with pytest.raises(Broken, match="another recipe"):
        recipe.target(text)
