"""What is typed: passes as words, gates, axes of a grid. Bytes that are no UTF-8 come as a shell's.

The first byte says which of them the rest is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from compress.errors import UsageError
from compress.passes.base import option_fields
from compress.recipe import Gate, Recipe, build_pass, parse_pass
from compress.sweep.grid import parse_axis, points
from fuzz.checks import outcome, require

LONGEST = 256
WORDS = (
    b"quantize:", b"prune:", b"low-rank:", b"super-weights:", b"recalibrate:", b"bits=", b"group=",
    b"group_size=", b"sparsity=", b"rank=", b"targets=", b"ignore=", b"overrides=", b",", b"=",
    b"*", b"*query*", b"[", b"]", b"{", b"}", b'"', b"'", b"relative_error>", b"bytes<", b"1e400",
    b"nan", b"quantize.bits=2,3,4", b"low-rank[0].rank=", b"off", b"&a", b"!!", b"\xff", b"\x1b[2J",
    b"---", b"2001-12-14", b"0x10", b"null", b"~", b"true", b".inf", b": ", b"9" * 400,
)  # fmt: skip
_RECIPE = Recipe((build_pass("quantize", {}), build_pass("low-rank", {"rank": 4})))


def seeds(corpus: Path | None) -> Iterator[bytes]:
    """Words of the documentation."""
    for word in (
        "quantize:bits=4,group=32", "prune:sparsity=0.5", "low-rank:rank=4", "super-weights",
        'quantize:bits=4,targets=["*query","*key"]', "quantize:targets=*query*",
    ):  # fmt: skip
        yield b"\x00" + word.encode()
    for word in ("relative_error>0.1", "bytes < 1e9"):
        yield b"\x01" + word.encode()
    for word in ("quantize.bits=2,3,4", "low-rank[0].rank=off,8,[1,2]", "quantize.targets=*a*,*b"):
        yield b"\x02" + word.encode()


def target(data: bytes) -> None:
    """Read one word."""
    kind = data[0] % 3 if data else 0
    # As the interpreter makes arguments of bytes; a null byte cannot be in one.
    word = os.fsdecode(data[1:].replace(b"\0", b""))
    if kind == 0:
        made = outcome(lambda: parse_pass(word), names="", errors=(UsageError,))
        if made is not None:
            plain = json.loads(json.dumps(Recipe((made,)).resolved()["passes"][0][made.name]))
            require(build_pass(made.name, plain) == made, "another pass is made of its options")
            require(len(plain) == len(option_fields(type(made))), "options are not all written")
    elif kind == 1:
        gate = outcome(lambda: Gate.parse(word), names="", errors=(UsageError,))
        if gate is not None:
            require(gate.fails({gate.metric: float("nan")}), "a gate that a NaN passes")
            require(not gate.fails({gate.metric: gate.value}), "a gate that its own bound fails")
    else:
        axis = outcome(lambda: parse_axis(word, _RECIPE), names="--grid", errors=(UsageError,))
        made_points = axis and outcome(
            lambda: points(_RECIPE, [axis]), names="--grid", errors=(UsageError,)
        )
        for point in made_points or ():
            require(point.recipe is not None or point.error, "a point without a recipe or a reason")
            require(point.label, "a point without a label")
