"""Kill -9 a run that replaces an output, many times: it is old or new afterwards, never mixed.

    python bench/kills.py [--kills 1000]

Every kill hits at a random moment of a run with --overwrite on a sharded model; afterwards OUT must
be byte for byte the old or the new result. Prints the counts; exit 1 at the first mixed output.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from toolbox import tiny_llama, tree

TOOL = [sys.executable, "-m", "compress", "run"]
OLD = ["quantize:bits=8,group=-1"]
NEW = ["prune:sparsity=0.3", "quantize:bits=4,group=32", "low-rank:rank=4"]
SHARDS = ["--max-shard-size", "1MiB"]


def main() -> int:
    """Run the kills and count what OUT was after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=1000)
    kills = parser.parse_args().kills
    folder = Path(tempfile.mkdtemp(prefix="compress-kills-"))
    try:
        return soak(folder, kills)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def soak(folder: Path, kills: int) -> int:
    """`kills` kills in one folder; the old output is put back whenever the new one got through."""
    model = tiny_llama(folder / "model", hidden=256, ffn=512, shards=2)
    out, spare = folder / "out", folder / "spare"
    run(model, spare, OLD)
    old = tree(spare)
    started = time.perf_counter()
    run(model, folder / "new", NEW)
    duration = time.perf_counter() - started
    new = tree(folder / "new")
    shutil.copytree(spare, out)
    moments = random.Random(0)
    seen = {"old": 0, "new": 0, "resumed": 0}
    for number in range(kills):
        resume = ["--resume"] if number % 2 else []
        command = [*TOOL, str(model), "-o", str(out), *NEW, *SHARDS, "--overwrite", *resume]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.3, 1.05) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen["resumed"] += bool(resume)
        now = tree(out)
        if now == new:
            seen["new"] += 1
            shutil.rmtree(out)
            shutil.copytree(spare, out)
        elif now == old:
            seen["old"] += 1
        else:
            print(f"kill {number}: a mixed output in {out}")
            return 1
    run(model, out, [*NEW, "--overwrite"])
    litter = [p.name for p in folder.iterdir() if p.name not in ("model", "out", "spare", "new")]
    print(f"{kills} kills: {seen}, never mixed; left after a clean run: {litter or 'nothing'}")
    return 1 if litter or tree(out) != new else 0


def run(model: Path, out: Path, words: list[str]) -> None:
    """A run that must succeed."""
    command = [*TOOL, str(model), "-o", str(out), *words, *SHARDS]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
