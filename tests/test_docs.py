"""Documentation that cannot rot: generated pages, README commands, sample recipes."""

from __future__ import annotations

import importlib.util
import re
import shlex
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


def test_every_promise_names_a_test_that_exists() -> None:
    """Files, and words of -k that choose something in them."""
    page = (ROOT / "docs" / "promises.md").read_text()
    commands = re.findall(r"`((?:pytest|python|make) [^`]+)`", page)
    assert len(commands) > 20
    for command in commands:
        words = shlex.split(command)
        files = [ROOT / word for word in words if word.endswith(".py")]
        assert all(path.is_file() for path in files), command
        if words[0] == "make":
            target = words[1].rstrip(",")
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), command
        if "-k" in words:
            wanted = re.split(r" or ", words[words.index("-k") + 1])
            tests = re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in files), re.M)
            for word in wanted:
                assert any(word in name for name in tests), f"{command}: {word}"
