"""Every figure of the ONNX export beside its goal.

    COMPRESS_SHARED=DIR python bench/onnx.py [--json FILE] [--only WORD] [--work DIR]

Each part is a program in bench/onnx_figures, run in a process of its own, one after the other; each
can be run alone. What they make goes into a folder that is removed, unless --work names one. The
whole takes half an hour on a quiet machine with two processors, and 8 GB of disk; the two
environments of `versions.py` are made by pip, which needs a package index (or --only another part).

This file has the name of a package that the parts import, so they lie in another folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("encoder", "decoders", "classifier", "sizes", "speed", "accuracy", "large", "versions")


def main() -> None:
    """Run the parts and print all their tables again, together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=HERE.parent / "build" / "onnx.json")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--work", type=Path, help="keep here what is made")
    options = parser.parse_args()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("COMPRESS_SHARED", str(HERE.parents[1] / "shared"))
    work = options.work or Path(tempfile.mkdtemp(prefix="compress-onnx-"))
    failed = []
    try:
        for part in PARTS:
            if options.only not in part:
                continue
            command = [sys.executable, str(HERE / "onnx_figures" / f"{part}.py")]
            command += ["--json", str(options.json), "--work", str(work)]
            if subprocess.run(command, check=False).returncode:
                failed.append(part)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    if options.json.exists():
        subprocess.run([sys.executable, str(HERE / "goals.py"), str(options.json)], check=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
