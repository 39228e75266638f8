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


def test_no_banned_call_stands_in_the_package() -> None:
    import ast

    for path in (ROOT / "compress").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "marshal", "mmap", "yaml"} & set(names), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "yaml.load", "pickle.load"), path
                if called.endswith("torch.load"):
                    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert keywords.get("weights_only") == "True", path
                if called == "transformers.AutoTokenizer.from_pretrained":  # reads no weights
                    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert keywords["local_files_only"] == "True", path
                    assert keywords["trust_remote_code"] == "False", path
                else:
                    assert "from_pretrained" not in called, path
