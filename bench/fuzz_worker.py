"""The process that libFuzzer runs in: bench/fuzz.py starts it with a target and a folder.

Every run is one call of the target. An input that breaks a promise, takes more than a second of
processor time or more than 100 MB is written to tests/fuzz/finds, and the fuzzing goes on.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import mmap
import os
import resource
import sys
import time
import traceback
from pathlib import Path

import atheris

SECONDS = 1.0
BYTES = 100 << 20
ADDRESSES = 4 << 30  # bytes of addresses beside those of the libraries


class Worker:
    """A target that is never broken: what breaks it is kept, once for every place."""

    def __init__(self, name: str, work: Path) -> None:
        import fuzz

        # Coverage of the product alone: that of libraries would cost more than it tells.
        with atheris.instrument_imports(include=["compress"], enable_loader_override=False):
            self.target = fuzz.load(name)
        self._finds, self._broken = fuzz.FINDS / name, work / "broken"
        self._known: dict[str, tuple[int, str]] = {}
        self._peak = 0
        with open(work / "counter", "r+b") as file:
            self._counter = mmap.mmap(file.fileno(), 8)
        self._runs = 0

    def __call__(self, data: bytes) -> None:
        """One run."""
        self._runs += 1
        if not self._runs & 63:
            self._counter[:] = self._runs.to_bytes(8, "little")
        started = time.process_time()
        try:
            self.target.run(data)
        except MemoryError as error:
            self._keep(f"memory at {place(error)}", data)
        except Exception as error:  # whatever it is: that is what is looked for
            said = f": {error}" if isinstance(error, AssertionError) else ""
            self._keep(f"{type(error).__name__} at {place(error)}{said}", data)
        if time.process_time() - started > SECONDS and self._runs > 1:
            self._keep("more than a second", data)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if self._runs > 1000 and peak - self._peak > BYTES:
            self._keep("more than 100 MB", data)
        self._peak = peak

    def _keep(self, what: str, data: bytes) -> None:
        """The shortest input of every place; one that is known already is not kept again."""
        least, old = self._known.get(what, (1 << 60, ""))
        if len(data) >= least:
            return
        name = f"{hashlib.sha256(data).hexdigest()[:16]}.bin"
        self._finds.mkdir(parents=True, exist_ok=True)
        (self._finds / name).write_bytes(data)
        (self._broken / name).write_text(what)
        if old and old != name:
            for folder in (self._finds, self._broken):
                (folder / old).unlink(missing_ok=True)
        self._known[what] = (len(data), name)


def place(error: BaseException) -> str:
    """The last line of this project that an error came through."""
    root = str(Path(__file__).resolve().parent.parent) + os.sep
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(root):
            return f"{frame.filename[len(root) :]}:{frame.lineno}"
    return "outside"


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    name, work, *arguments = sys.argv[1:]
    # In the place of bench/, whose onnx.py would be taken for the package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent / "tests")
    worker = Worker(name, Path(work))
    for find in worker.target.finds():  # what is not mended yet is known
        worker(find.read_bytes())
    with contextlib.suppress(OSError):
        with open("/proc/self/statm", encoding="ascii") as status:
            mapped = int(status.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    own = worker.target.mutate
    mutators = {}
    if own is not None:

        def mutate(data: bytes, most: int, seed: int) -> bytes:
            return own(data, most, seed) if seed % 4 else atheris.Mutate(data, most)

        mutators["custom_mutator"] = mutate
    gc.collect()
    gc.freeze()
    atheris.Setup([sys.argv[0], *arguments], worker, **mutators)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
