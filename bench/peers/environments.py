"""The peers' own virtual environments: llm-compressor and HQQ cannot share one.

    python bench/peers/environments.py [--to build/peers] [--python python3]

Makes DIR/llmcompressor and DIR/hqq from the package index that pip is configured for. What pip
would fetch is looked at first: torch's CUDA build is several gigabytes and no peer here needs it,
so that stops the run unless --cuda allows it. A second run finds the stamp of the first and does
nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "peers"

# The releases that the recorded figures are of; torch as constraints.txt pins it for ourselves.
ENVIRONMENTS = {
    "llmcompressor": ["llmcompressor==0.14.0.1", "torch==2.13.0"],
    "hqq": ["hqq==0.2.8.post1", "torch==2.13.0", "safetensors==0.8.0"],
}
CUDA = re.compile(r"nvidia-(cu|nccl|nvj|nvtx|nvshmem)|triton")


def python_of(name: str, folder: Path = FOLDER) -> Path:
    """The interpreter of environment `name`, made or not."""
    return folder / name / "bin" / "python"


def fetched(python: Path, packages: list[str]) -> list[str]:
    """What pip would install, as name==version, without installing it."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        pip(python, "--dry-run", "--report", str(report), *packages)
        found = json.loads(report.read_text())["install"]
    return sorted(f"{p['metadata']['name']}=={p['metadata']['version']}".lower() for p in found)


def pip(python: Path, *arguments: str) -> None:
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments],
        check=True,
        stdout=sys.stderr,
    )


def make(name: str, folder: Path, interpreter: str, cuda: bool) -> str:
    """One environment; says in a line what was done."""
    home, packages = folder / name, ENVIRONMENTS[name]
    stamp, wanted = home / "packages.txt", "\n".join(packages)
    if stamp.exists() and stamp.read_text().startswith(wanted):
        return f"{name}: is there already"
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([interpreter, "-m", "venv", str(home)], check=True)
    python = python_of(name, folder)
    resolved = fetched(python, packages)
    heavy = [p for p in resolved if CUDA.match(p)]
    if heavy and not cuda:
        shutil.rmtree(home)
        raise SystemExit(
            f"{name}: pip would fetch torch's CUDA build ({', '.join(heavy[:3])}, ...), several "
            "gigabytes. Give pip an index or a folder of wheels with the CPU build "
            "(PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS), or pass --cuda."
        )
    pip(python, *packages)
    stamp.write_text("\n".join([wanted, "", *resolved, ""]))
    return f"{name}: installed {len(resolved)} packages"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=FOLDER, help="the folder of both environments")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to build on")
    parser.add_argument("--cuda", action="store_true", help="torch's CUDA build may be fetched")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    for name in ENVIRONMENTS:
        print(make(name, options.to, options.python, options.cuda), flush=True)


if __name__ == "__main__":
    main()
