"""Limits of control groups, of both versions, as files that a test makes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from toolbox import tiny_llama

from compress import machine_memory
from compress.checkpoint import open_checkpoint
from compress.errors import ResourceError
from compress.machine_memory import group_limits, usable_memory
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass
from compress.run import RunOptions, run


def _groups(root: Path, membership: str, limits: dict[str, str]) -> tuple[Path, Path]:
    file = root / "cgroup"
    file.write_text(membership)
    for name, text in limits.items():
        path = root / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return file, root / "groups"


@pytest.mark.parametrize(
    ("membership", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "4096\n"}, [4096]),
        ("0::/a/b\n", {"a/b/memory.max": "8192\n", "a/memory.max": "4096\n"}, [8192, 4096]),
        ("0::/\n", {"memory.max": "5000\n"}, [5000]),  # a container that sees its own root
        ("0::/../x\n", {"memory.max": "5000\n"}, [5000]),
        ("0::/a\n", {"a/memory.max": "nonsense\n"}, []),
        ("0::/a\n", {}, []),
        ("nonsense\n\n:\n", {}, []),
        (
            "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n",
            {
                "memory/a/memory.limit_in_bytes": "7000\n",
                "memory/memory.limit_in_bytes": f"{(1 << 63) - 4096}\n",
                "cpu/a/memory.limit_in_bytes": "1\n",
            },
            [7000, (1 << 63) - 4096],
        ),
    ],
)
def test_limits(
    tmp_path: Path, membership: str, limits: dict[str, str], expected: list[int]
) -> None:
    assert list(group_limits(*_groups(tmp_path, membership, limits))) == expected


def test_without_limits_it_is_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert usable_memory() <= machine
    monkeypatch.setattr(machine_memory, "_MEMBERSHIP", tmp_path / "none")
    assert usable_memory() == machine


def test_a_run_that_would_be_killed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(tmp_path / "model")
    file, groups = _groups(tmp_path, "0::/job\n", {"job/memory.max": "1000\n"})
    monkeypatch.setattr(machine_memory, "_MEMBERSHIP", file)
    monkeypatch.setattr(machine_memory, "_GROUPS", groups)
    with open_checkpoint(model) as checkpoint:
        plan = make_plan(checkpoint, Recipe((parse_pass("quantize:group=32"),)), Options())
        with pytest.raises(ResourceError, match=r"bytes of memory needed, 1,000 allowed"):
            run(plan, tmp_path / "out", RunOptions())
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
