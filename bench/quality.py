"""Every figure of quality beside its goal, the peers' numbers from the same run.

    python bench/peers/environments.py            once: the peers' environments
    COMPRESS_SHARED=DIR python bench/quality.py [--json FILE] [--only WORD] [--no-peers]

One part after the other, each in a process of its own; about half an hour on a quiet machine with
two processors, of which the peers take half. Each part can be run alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS: tuple[tuple[str, ...], ...] = (
    ("quality_decoders.py",),
    ("quality_resnet.py",),
    ("quality_minilm_calibrated.py",),
    (
        "super_weights.py",
        *("--model", "{shared}/models/tiny-llama-en"),
        *("--tokens", "{shared}/data/wikitext2_valid.txt"),
        *("--text", "{shared}/data/wikitext2_test.txt"),
    ),
    ("quality_tiny_llama.py",),
)


def main() -> None:
    """Run the parts and print all their tables again, together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=HERE.parent / "build" / "quality.json")
    parser.add_argument("--only", default="", help="parts whose file name contains this")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    options = parser.parse_args()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    shared = os.environ.setdefault("COMPRESS_SHARED", str(HERE.parents[1] / "shared"))
    failed = []
    for script, *arguments in PARTS:
        if options.only not in script:
            continue
        words = [argument.format(shared=shared) for argument in arguments]
        command = [sys.executable, str(HERE / script), *words, "--json", str(options.json)]
        if options.no_peers and script == "quality_tiny_llama.py":
            command.append("--no-peers")
        if subprocess.run(command, check=False).returncode:
            failed.append(script)
    subprocess.run([sys.executable, str(HERE / "goals.py"), str(options.json)], check=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
