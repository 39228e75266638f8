"""The tests on every supported Python, with the newest and with the oldest dependencies.

    python bench/matrix.py [--only 3.13] [--python 3.10=/opt/python3.10/bin/python3 ...]

Each cell is an environment of its own: the tracked files are copied, installed with the extras of
the tests (which builds the kernels for that Python), and pytest runs there in one process. "newest"
takes what pip finds, "oldest" what constraints-oldest.txt pins, the lower bounds of pyproject.toml.
Tests with real models and the slow ones are left out; --select runs a part of the rest, which the
table says. Cells are added to --json one by one, and the table of all that it has is printed in the
end. An environment takes up to 8 GB, because pip may fetch torch's CUDA build, and is removed after
its run; the log of its tests stays in --work.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
MARKERS = "not slow and not model"
FREE = 20 << 30  # bytes of disk that a cell must find
SHOWN = (
    "torch", "onnxruntime", "onnx", "transformers", "numpy", "ml_dtypes", "safetensors", "msgspec",
    "typer", "rich", "ruamel.yaml", "compressed-tensors", "peft",
)  # fmt: skip
KERNELS = "from compress import kernels; b = kernels.backend(); print(b.name, b.isa)"
PYTHON = "import platform; print(platform.python_version())"


@dataclass(frozen=True)
class Cell:
    """A version of Python and what pip is held to: "newest" or "oldest"."""

    python: str
    dependencies: str

    @property
    def name(self) -> str:
        """As --only knows it."""
        return f"{self.python} {self.dependencies}"


CELLS = (
    Cell("3.10", "newest"),
    Cell("3.11", "newest"),
    Cell("3.12", "newest"),
    Cell("3.13", "newest"),
    Cell("3.10", "oldest"),
)


def main() -> int:
    """Run the cells that were asked for; 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cells whose name contains this: '3.12 newest'")
    parser.add_argument("--python", action="append", default=[], metavar="3.10=PATH",
                        help="an interpreter; otherwise python3.10 and so on of PATH")  # fmt: skip
    parser.add_argument("--select", nargs="*", default=["tests"], help="files or folders of tests")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "matrix.json")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "matrix")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    options = parser.parse_args()
    if not any(options.only in cell.name for cell in CELLS):
        parser.error(f"--only: one of {', '.join(cell.name for cell in CELLS)}, or a part of it")
    given = dict(word.split("=", 1) for word in options.python)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(options.json.read_text()) if options.json.exists() else {}
    bad = False
    for cell in CELLS:
        if options.only not in cell.name:
            continue
        interpreter = given.get(cell.python) or shutil.which(f"python{cell.python}")
        if interpreter is None:
            print(f"{cell.name}: no interpreter: --python {cell.python}=PATH", flush=True)
            bad = True
            continue
        home = options.work.absolute() / cell.name.replace(" ", "-")
        try:
            known[cell.name] = run_cell(cell, interpreter, home, options.select)
        finally:
            if not options.keep:
                shutil.rmtree(home, ignore_errors=True)
        options.json.write_text(json.dumps(known, indent=1) + "\n")
        bad |= bool(known[cell.name]["failed"])
        print(f"{cell.name}: {outcome(known[cell.name])}", flush=True)
    print(table(known))
    return int(bad)


def run_cell(cell: Cell, interpreter: str, home: Path, select: Sequence[str]) -> dict[str, Any]:
    """One cell: what was installed, and what became of the tests."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    if shutil.disk_usage(home).free < FREE:
        raise SystemExit(f"{home}: less than {FREE >> 30} GB free: name another folder by --work")
    tree = copy_tree(home / "tree")
    started = time.perf_counter()
    python = install(cell, interpreter, home, tree)
    installed = time.perf_counter()
    report = home / "junit.xml"
    shared = os.environ.get("COMPRESS_SHARED", str(ROOT.parent / "shared"))
    command = [python, "-m", "pytest", "-q", "-m", MARKERS, f"--junitxml={report}", *select]
    with open(home.with_name(f"{home.name}.log"), "wb") as log:
        environment = os.environ | {"COMPRESS_SHARED": shared}
        subprocess.run(command, cwd=tree, env=environment, stdout=log, stderr=log, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "python": capture([python, "-c", PYTHON]),
        "kernels": capture([python, "-c", KERNELS], tree),
        "versions": versions(python),
        "select": list(select),
        "install_seconds": round(installed - started),
        "test_seconds": round(time.perf_counter() - installed),
    } | counts(report)


def copy_tree(tree: Path) -> Path:
    """The files that git tracks or would: nothing that another Python has built."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in capture(words, ROOT).splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def install(cell: Cell, interpreter: str, home: Path, tree: Path) -> str:
    """A virtual environment with the tree in it; returns its interpreter."""
    subprocess.run([interpreter, "-m", "venv", str(home / "env")], check=True)
    python = str(home / "env" / "bin" / "python")
    held = ["-c", "constraints-oldest.txt"] if cell.dependencies == "oldest" else []
    words = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *held]
    subprocess.run([*words, "-e", ".[test]"], cwd=tree, check=True)
    return python


def versions(python: str) -> dict[str, str]:
    """Name -> version of what is installed; names in lower case, "-" for "_" and "."."""
    listed = json.loads(capture([python, "-m", "pip", "list", "--format", "json"]))
    return {normal(one["name"]): one["version"] for one in listed}


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def counts(report: Path) -> dict[str, Any]:
    """How many tests passed, were skipped and failed, and the names of those that failed."""
    if not report.exists():
        return {"passed": 0, "skipped": 0, "failed": ["pytest did not finish: see the log"]}
    passed, skipped, failed = 0, 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "skipped" in kinds:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "skipped": skipped, "failed": failed}


def outcome(result: dict[str, Any]) -> str:
    said = f"{result['passed']} passed, {result['skipped']} skipped, {len(result['failed'])} failed"
    return f"{said} in {result['test_seconds']} s" + "".join(f"\n  {f}" for f in result["failed"])


def table(known: dict[str, Any]) -> str:
    """Every cell that was run, as Markdown: a column a cell."""
    names = [cell.name for cell in CELLS if cell.name in known]
    cells = [known[name] for name in names]
    rows = [("", *names), ("---",) * (len(names) + 1)]
    rows.append(("Python", *(one["python"] for one in cells)))
    rows += [(what, *(one["versions"].get(normal(what), "-") for one in cells)) for what in SHOWN]
    rows.append(("kernels", *(one["kernels"] for one in cells)))
    for what in ("passed", "skipped"):
        rows.append((what, *(str(one[what]) for one in cells)))
    rows.append(("failed", *(str(len(one["failed"])) for one in cells)))
    rows.append(("tests", *(" ".join(one["select"]) for one in cells)))
    rows.append(("run on", *(one["date"] for one in cells)))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def capture(command: Sequence[str], cwd: Path | None = None) -> str:
    """What a command prints."""
    return subprocess.run(
        command, cwd=cwd, check=True, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
