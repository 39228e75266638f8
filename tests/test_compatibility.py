"""What the package says of versions: bounds, pins and the cells of the matrix agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PYPROJECT = (PROJECT / "pyproject.toml").read_text()

BOUND = re.compile(r'"([A-Za-z0-9_.-]+)>=([0-9.]+)"')


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def pins(name: str) -> dict[str, str]:
    lines = (PROJECT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def bounds(start: str) -> dict[str, str]:
    """The bounds of the list that begins at `start`."""
    text = PYPROJECT[PYPROJECT.index(start) :]
    return dict(BOUND.findall(text[: text.index("]")]))


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    claimed = bounds("dependencies = [") | bounds("test = [")
    oldest = pins("constraints-oldest.txt")
    assert claimed.keys() <= oldest.keys()
    for name, bound in claimed.items():
        length = len(version(bound))
        assert version(oldest[name])[:length] == version(bound), name


def test_the_pins_are_inside_the_bounds() -> None:
    claimed = bounds("dependencies = [") | bounds("test = [")
    for name, pin in pins("constraints.txt").items():
        assert version(pin) >= version(claimed.get(name, "0")), name


def test_the_matrix_has_every_python_that_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROJECT / "bench"))
    import matrix

    claimed = re.findall(r'"Programming Language :: Python :: (3\.[0-9]+)"', PYPROJECT)
    newest = [cell.python for cell in matrix.CELLS if cell.dependencies == "newest"]
    assert newest == claimed
    (least,) = re.findall(r'requires-python = ">=(3\.[0-9]+)"', PYPROJECT)
    oldest = [cell.python for cell in matrix.CELLS if cell.dependencies == "oldest"]
    assert oldest == [least] == [claimed[0]]


def test_the_classifier_typed_is_kept() -> None:
    """Type checkers read annotations of an installed package beside this file alone (PEP 561)."""
    assert '"Typing :: Typed"' in PYPROJECT
    assert (PROJECT / "compress" / "py.typed").is_file()
