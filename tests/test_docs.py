"""Documentation that cannot rot: generated pages, README commands, sample recipes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from toolbox import tool

ROOT = Path(__file__).resolve().parent.parent


def test_passes_page_is_generated_from_the_dataclasses() -> None:
    spec = importlib.util.spec_from_file_location(
        "generate_passes", ROOT / "docs" / "generate_passes.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run: python docs/generate_passes.py"


def test_readme_names_every_command_and_exit_code() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = tool("--help").stdout.split("Commands:")[1].split()
    for name in ("run", "plan", "inspect", "verify", "unpack", "diff", "kernels", "quantize"):
        assert name in commands
        assert f"compress {name}" in readme
    for code in ("0", "1", "2", "3", "4", "5", "6", "75", "130", "143"):
        assert f"| {code} |" in readme
