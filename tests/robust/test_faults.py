"""A fault at every operation of every command that writes: all or nothing, and nothing beside it.

One kind of error an operation, in turn; bench/faults.py injects all of them, into graphs too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_cases import cases
from faults import CODES, Act, inject

LEAST = {  # operations that there are at least: a command that hides them from us would pass
    "run": 60,
    "run --overwrite": 60,
    "unpack": 20,
    "export --to genai": 20,
    "calibrate": 20,
    "a report, a sweep's results": 2,
}


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Act]]:
    return cases(tmp_path_factory.mktemp("faults"), graphs=False)


@pytest.mark.parametrize("name", LEAST)
def test_a_fault_at_every_operation(every: dict[str, tuple[Path, Act]], name: str) -> None:
    folder, act = every[name]
    count = inject(folder, act, lambda due: [CODES[due % len(CODES)]])
    assert count.broken == 0
    assert count.operations == count.injected >= LEAST[name]
    assert count.tolerated <= count.injected // 10
