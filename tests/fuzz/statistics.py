"""The record of a statistics file: written again, it is the same. The input is the JSON text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compress.calibrate.statistics import KINDS, Record, Site, _parse
from compress.errors import InputError
from fuzz.checks import outcome, require

NAME = "statistics.safetensors"
WORDS = (
    b'"version":1', b'"fingerprint":"', b'"engine":"hf"', b'"kinds":["diagonal"]', b'"data":{',
    b'"sites":[[0,["w"],8,0,1]]', b"null", b"true", b"1.5", b"-1", b"1e300", b'"1"', b"[]", b"{}",
    b"[[1,2]]", b'["ab"]', b"\\ud800", b"9" * 30,
)  # fmt: skip


def seeds(corpus: Path | None) -> Iterator[bytes]:
    """One small record, one with every kind."""
    yield Record("f" * 64, "hf", (), frozenset()).to_json().encode()
    sites = (Site(0, ("a.weight", "b.weight"), 64), Site(1, ("c",), 8, 8, 2))
    yield Record("0", "module", sites, KINDS, {"kind": "text", "samples": 4}).to_json().encode()


def target(data: bytes) -> None:
    """Read one record."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    record = outcome(lambda: _parse(text, NAME), names=NAME, errors=(InputError,))
    if record is None:
        return
    require(_parse(record.to_json(), NAME) == record, "another record is read again")
    for site in record.sites:
        require(site.number >= 0 and site.count >= 0 and site.blocks >= 1, "a count out of range")
