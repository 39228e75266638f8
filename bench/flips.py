"""Damage outputs of every kind, many times: `verify` must find each one, without the source.

    python bench/flips.py [--flips 10000] [--seed 0]

Single bits of random bytes of random files, the manifest included, and a tenth as many each of
truncations, swapped files, appended bytes and lost pages. Prints the counts by kind of damage and
of output; exit 1 if one was missed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.pop(0)  # this folder, whose onnx.py is not the library
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "robust"))

from damage import DAMAGES, damaged, outputs

from compress.errors import VerifyError
from compress.verification import verify_output


def main() -> int:
    """Damage, verify, count."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    started = time.perf_counter()
    done: Counter[str] = Counter()
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="compress-flips-") as folder:
        made = outputs(Path(folder))
        for how in DAMAGES:
            count = given.flips if how == "flip" else given.flips // 10
            for number in range(count):
                kind = list(made)[number % len(made)]
                with damaged(made[kind], rng, how) as one:
                    caught = is_found(made[kind])
                done.update([how, kind])
                found.update([how, kind] if caught else [])
                if not caught:
                    print(f"missed: {kind}: {one}")
        for out in made.values():
            verify_output(out)
    for name in done:
        print(f"{name:20} {found[name]:6} of {done[name]:6} found")
    print(f"{time.perf_counter() - started:.0f} s, seed {given.seed}")
    return 0 if found == done else 1


def is_found(out: Path) -> bool:
    """Whether `verify` refuses the output."""
    try:
        verify_output(out)
    except VerifyError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
