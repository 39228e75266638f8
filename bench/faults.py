"""Every operation of every command that writes fails once with every error: all or nothing?

    python bench/faults.py [--json FILE]

The Nth write, fsync, rename, mkdir or open for writing fails with ENOSPC, EIO and EACCES, for every
N until a command gets through. It must end with the error's own words (exit 6) and leave everything
as it was, to the byte; or, where the step is not needed, complete its output all the same. Exit 1
where one did neither.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.pop(0)  # this folder, whose onnx.py is not the library
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "robust")]

from fault_cases import cases  # noqa: E402
from faults import CODES, inject  # noqa: E402


def main() -> int:
    """A line a command, then the sums."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", type=Path, help="append the counts to this file, as a line")
    given = parser.parse_args()
    started = time.perf_counter()
    counts = {}
    with tempfile.TemporaryDirectory(prefix="compress-faults-") as folder:
        for name, (place, act) in cases(Path(folder), graphs=True).items():
            one = counts[name] = inject(place, act, lambda _: CODES)
            print(
                f"{name:28} {one.operations:4} operations, {one.injected:4} faults: "
                f"{one.refused:4} refused, {one.tolerated:3} not needed, {one.broken} broken",
                flush=True,
            )
    total = {key: sum(vars(one)[key] for one in counts.values()) for key in vars(one)}
    seconds = round(time.perf_counter() - started)
    print(f"{total['injected'] - total['broken']} of {total['injected']} faults held, {seconds} s")
    if given.json is not None:
        rows = {name: vars(one) for name, one in counts.items()}
        with given.json.open("a") as file:
            file.write(json.dumps({"faults": rows, "total": total}) + "\n")
    return 1 if total["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
