"""Peak memory of every data-free command beside its bound: 4 x the largest tensor + 500 MB.

    python bench/memory_table.py --work DIR [--sizes 0.1b 1b 8b] [--json FILE]
    python bench/memory_table.py --work DIR --giant [--json FILE]

0.1 B and 1 B are whole models, 8 B is the four first layers of one (every shape, a quarter of the
disk: 4 GB and as much again for outputs). --giant is single tensors of 10.7 GB, sparse files with
values in some rows: what passes can do in slices stays under 500 MB, what needs the matrix whole is
refused before work starts, with the number. Every command is a process of its own (ru_maxrss);
exit 1 where a bound does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.pop(0)  # this folder, whose onnx.py is not the library
sys.path.append(str(Path(__file__).resolve().parent))

from large import make_model
from memory import peak_of

Words = Sequence[str | Path]
ROOM = 500_000_000
SIZES = {"0.1b": "160m", "1b": "1b", "8b": "8b-4layers"}
PLAIN = "quantize:bits=4,group=128,search=none"
SEARCH = "quantize:bits=4,group=128"
RUNS = {
    "4 bits": [PLAIN],
    "4 bits, searched scales": [SEARCH],
    "4 bits, embeddings too": ['quantize:bits=4,group=128,search=none,targets=["*"]'],
    "pruned": ["prune:sparsity=0.5"],
    "pruned, 4 bits": ["prune:sparsity=0.5", PLAIN, "--format", "native"],
    "4 bits, low-rank": [PLAIN, "low-rank:rank=8"],
    "super weights, 4 bits": ["super-weights", PLAIN],
    "8 bits": ["quantize:bits=8,group=-1,search=none"],
}
FAST = ("--jobs", "2", "--no-fsync")
# Outputs that are read again: by verify, unpack, diff.
READ = ("4 bits, embeddings too", "pruned, 4 bits", "4 bits, low-rank")
GIANTS = {"wide": (40960, 131072), "tall": (1_310_720, 4096), "vector": (5_368_709_120,)}


@dataclass(frozen=True)
class Row:
    """One command on one model."""

    model: str
    command: str
    peak: int
    bound: int
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the command stayed under its bound."""
        return self.peak <= self.bound

    def __str__(self) -> str:
        verdict = "" if self.holds else "  TOO MUCH"
        return (
            f"{self.model:7} {self.command:34} {self.peak / 1e6:7.0f} MB of "
            f"{self.bound / 1e6:7.0f}{verdict}{self.note}"
        )


def main() -> int:
    """Print a row as each command ends."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--giant", nargs="*", choices=GIANTS, help="default: every shape")
    parser.add_argument("--json", type=Path, help="append the rows to this file, a line each")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []

    def take(row: Row) -> None:
        rows.append(row)
        print(row, flush=True)
        if given.json is not None:
            with given.json.open("a") as file:
                file.write(json.dumps({"memory": vars(row)}) + "\n")

    if given.giant is not None:
        for name in given.giant or GIANTS:
            giant(given.work, name, take)
    else:
        for size in given.sizes:
            measure(make_model(given.work, SIZES[size]), size, take)
    broken = sum(not row.holds for row in rows)
    print(f"{len(rows) - broken} of {len(rows)} commands within their bound")
    return 1 if broken else 0


def measure(model: Path, size: str, take: Callable[[Row], None]) -> None:
    """Every command on one model; outputs are removed as soon as nothing reads them."""
    bound = 4 * largest(model) + ROOM
    work = model.parent
    for command in (["inspect", model], ["inspect", model, "--values"], ["plan", model, SEARCH]):
        take(row_of(size, " ".join(map(str, [command[0], *command[2:]])), command, bound))
    for name, words in RUNS.items():
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        take(row_of(size, f"run: {name}", ["run", model, "-o", out, *words, *FAST], bound))
        if name not in READ:
            continue
        for reader, command in readers(model, out, work / "dense").items():
            take(row_of(size, f"{reader}: {name}", command, bound))
        shutil.rmtree(work / "dense", ignore_errors=True)
    shutil.rmtree(work / "out", ignore_errors=True)


def readers(model: Path, out: Path, dense: Path) -> dict[str, Words]:
    """The commands that read an output."""
    return {
        "verify --source": ["verify", out, "--source", model],
        "unpack": ["unpack", out, "-o", dense, "--no-fsync"],
        "diff": ["diff", model, out],
    }


def giant(work: Path, name: str, take: Callable[[Row], None]) -> None:
    """One tensor of 10.7 GB: in slices, far under the bound; or refused with the number."""
    model, out, dense = work / f"giant-{name}", work / "out", work / "dense"
    shape = GIANTS[name]
    sparse_model(model, shape)
    targets = ',targets=["*"]'
    take(row_of(name, "plan", ["plan", model, PLAIN + targets], ROOM))
    passes = {"4 bits": PLAIN + targets, "pruned": "prune:sparsity=0.9999" + targets}
    if len(shape) == 1:
        passes = {"untouched": 'quantize:bits=4,targets=["small"]'}
    for what, word in passes.items():
        shutil.rmtree(out, ignore_errors=True)
        take(row_of(name, f"run: {what}", ["run", model, "-o", out, word, *FAST], ROOM))
        if name != "wide" or what != "4 bits":
            continue  # the readers take the same way for the others
        for reader, command in readers(model, out, dense).items():
            take(row_of(name, f"{reader}: {what}", command, ROOM))
            shutil.rmtree(dense, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    if len(shape) == 2:
        words = ["run", model, "-o", out, PLAIN + targets, "low-rank:rank=8" + targets]
        take(row_of(name, "run: 4 bits, low-rank", words, ROOM, code=6))
    shutil.rmtree(model)


def row_of(model: str, name: str, words: Words, bound: int, *, code: int = 0) -> Row:
    """Run one command, which must end with `code`."""
    peak, ended, errors = peak_of([*map(str, words)])
    if ended != code:
        sys.exit(f"{' '.join(map(str, words))}: exit {ended}, not {code}: {errors[-1000:]}")
    note = f"  exit {code}: {errors.splitlines()[0]}" if code else ""
    return Row(model, name, peak, bound, note)


def largest(model: Path) -> int:
    """Bytes of the largest tensor, from the headers."""
    sizes = []
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        spans = (e["data_offsets"] for n, e in header.items() if n != "__metadata__")
        sizes += [stop - start for start, stop in spans]
    return max(sizes)


def sparse_model(folder: Path, shape: tuple[int, ...]) -> None:
    """A bf16 tensor whose first, middle and last megabyte hold values, and a small one."""
    folder.mkdir(parents=True, exist_ok=True)
    nbytes = 2 * math.prod(shape)
    small = [128, 128]
    header = {
        "small": {"dtype": "BF16", "shape": small, "data_offsets": [0, 32768]},
        "big": {"dtype": "BF16", "shape": shape, "data_offsets": [32768, 32768 + nbytes]},
    }
    text = json.dumps(header).encode()
    rng = random.Random(0)
    values = struct.pack("<524288H", *(rng.choice((0x3C00, 0xBC00)) + rng.getrandbits(8)
                                       for _ in range(1 << 19)))  # fmt: skip
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + values[:32768])
        start = file.tell()
        for place in (0, nbytes // 2, nbytes - len(values)):
            file.seek(start + place)
            file.write(values)


if __name__ == "__main__":
    sys.exit(main())
