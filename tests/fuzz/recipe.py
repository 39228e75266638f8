"""Recipes: what is read can be written with every default, and is read from that as the same.

The input is the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from compress.checkpoint import strict_json
from compress.errors import InputError, UsageError
from compress.passes import pass_classes
from compress.recipe import read_recipe, recipe_from_mapping
from fuzz.checks import Folder, outcome, require

LONGEST = 512
WORDS = (
    b"passes:\n", b"- ", b"quantize", b"prune", b"low-rank", b"super-weights", b"{bits: 4}",
    b"bits: ", b"group_size: ", b"sparsity: 0.5", b"rank: 8", b"targets: ['*q*']", b"ignore: ",
    b"overrides: ", b"name: ", b"version: 1", b"seed: ", b"model: ", b"output: {format: native}",
    b"untouched: bf16", b"onnx: true", b"gates: [", b"{metric: relative_error, max: 0.1}", b"min: ",
    b"&a", b"*a", b"!!python/object", b"---\n", b"...\n", b"? ", b": ", b"|\n", b">-\n", b"<<: ",
    b"%YAML 1.2\n", b"%TAG ! x\n", b"\xef\xbb\xbf", b"\\x1b", b"0x10", b"0o7", b"1:30", b".inf",
    b".nan", b"2001-12-14", b"2001-12-14T21:59:43.10-05:00", b"~", b"null", b"yes", b"1e400",
    b"1_0", b"9" * 400, b"\xc2\x85", b"\t", b"'", b'"', b"#", b"[", b"]", b"{", b"}",
)  # fmt: skip
_folder = Folder("recipe.yaml")


def seeds(corpus: Path | None) -> Iterator[bytes]:
    """Every pass alone, one of everything, and those of the corpus."""
    for name in pass_classes():
        yield f"passes: [{name}]\n".encode()
    yield b"passes:\n- quantize: {bits: 4, group_size: 32}\n"
    yield b"passes:\n- name: prune\n  sparsity: 0.5\n  targets: ['*q*']\n"
    yield (
        b"version: 1\nmodel: m\nseed: 3\npasses:\n  - quantize:\n      bits: 3\n"
        b"      ignore: [lm_head]\n  - low-rank: {rank: 4}\noutput: {format: native, onnx: true}\n"
        b"gates:\n  - {metric: relative_error, max: 0.1}\n  - {metric: bytes, min: 1e3}\n"
    )
    for path in sorted(corpus.glob("cfg/*.yaml")) if corpus else ():
        if path.stat().st_size < LONGEST:
            yield path.read_bytes()


def target(data: bytes) -> None:
    """Read one recipe."""
    _folder.fill(data)
    found = outcome(
        lambda: read_recipe(_folder.file), names="recipe.yaml", errors=(InputError, UsageError)
    )
    if found is None:
        return
    written = json.dumps(found.resolved(), allow_nan=False).encode()
    again = recipe_from_mapping(strict_json.loads(written, "what is written"))
    require(again == replace(found, model=None), "another recipe is read from what is written")
