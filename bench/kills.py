"""Cut commands off, many times: the output is the old or the new one afterwards, never a mixture.

    python bench/kills.py [--kills 1000] [--signals 300] [--log build/kills.jsonl] [--json FILE]

SIGKILL, and then SIGTERM and SIGINT (some of these twice in a row), at random moments of every
command that replaces an output (bench/kill_commands.py): half of them at any moment of the process,
half while its stage exists. Afterwards the output must be the old or the new one byte for byte and
pass `verify`. After SIGTERM and SIGINT the exit code must be 143 or 130, there must be no
traceback, no lock, and no stage but one that --resume can use. After every twentieth kill, after a
signal that left a stage, and in the end, the command runs undisturbed: it must give the new output
and leave nothing else.

Most commands run as forks of this process, which saves their imports; a tenth of the kills and half
of the signals hit an interpreter of their own. Each is a line of the log; a soak that was cut off
goes on where it was. Exit 1 where one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # forks of this process would share its threads' locks
sys.path.pop(0)  # this folder, whose onnx.py is not the library
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "robust")]
sys.path.append(str(ROOT / "bench"))

from kill_commands import SHARES, Command, content, prepare  # noqa: E402

from compress.checkpoint import manifest  # noqa: E402
from compress.errors import CompressError  # noqa: E402
from compress.verification import verify_output  # noqa: E402

KILL, TERM, INT, TWICE = "SIGKILL", "SIGTERM", "SIGINT", "SIGINT twice"
NUMBERS = {KILL: signal.SIGKILL, TERM: signal.SIGTERM, INT: signal.SIGINT, TWICE: signal.SIGINT}
CLEAN_EVERY = 20
Record = dict[str, Any]


def main() -> int:
    """Every kill that the log does not hold yet, then the counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--signals", type=int, default=300)
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "kills.jsonl")
    parser.add_argument("--json", type=Path, help="append the counts to this file, as a line")
    given = parser.parse_args()
    given.log.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="compress-kills-"))
    try:
        with given.log.open("a") as log:
            soak(folder, schedule(given.kills, given.signals), read(given.log), log)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    records = read(given.log)
    counts = summary(records)
    for line in lines(records):
        print(line)
    if given.json is not None:
        with given.json.open("a") as file:
            file.write(json.dumps({"kills": counts}) + "\n")
    print(json.dumps(counts))
    given.log.replace(given.log.with_name(f"{given.log.stem}-done.jsonl"))  # the next starts afresh
    return 1 if counts["failed"] else 0


def schedule(kills: int, signals: int) -> list[tuple[str, str]]:
    """(command, signal) of each kill, the same in every process."""
    order = random.Random(0)
    names, weights = list(SHARES), list(SHARES.values())
    softer = [TERM, TERM, INT, TWICE]
    first = [(name, KILL) for name in shared(names, weights, kills)]
    later = [(name, softer[i % 4]) for i, name in enumerate(shared(names, weights, signals))]
    order.shuffle(first)
    order.shuffle(later)
    return first + later


def shared(names: Sequence[str], weights: Sequence[int], total: int) -> list[str]:
    """`total` names, each as often as its weight says; what rounding leaves goes to the first."""
    counts = {n: total * w // sum(weights) for n, w in zip(names, weights, strict=True)}
    counts[names[0]] += total - sum(counts.values())
    return [name for name, count in counts.items() for _ in range(count)]


def read(log: Path) -> list[Record]:
    """The kills so far."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def soak(
    folder: Path, todo: Sequence[tuple[str, str]], done: Sequence[Record], log: TextIO
) -> None:
    """Do what is left, a line of the log each; a line of progress every minute."""
    finished = {record["number"] for record in done}
    left = [i for i in range(len(todo)) if i not in finished]
    if not left:
        return
    commands = prepare(folder)
    news = {name: content(one.folder / "new") for name, one in commands.items()}
    olds = {name: content(one.folder / "spare") for name, one in commands.items()}
    count: Counter[str] = Counter()
    failed, shown = 0, time.monotonic()
    for number in left:
        name, how = todo[number]
        command = commands[name]
        if how != KILL and count[name] == 0 and command.litter():
            runs_clean(command, news[name])
        record = {"number": number, "command": name, "signal": how}
        record |= cut_off(command, how, random.Random(number), (olds[name], news[name]))
        count[name] += 1
        # A stage that is left by a signal must serve the next run; those of kills pile up a while.
        if command.litter() if how != KILL else count[name] % CLEAN_EVERY == 0:
            record["clean"] = runs_clean(command, news[name])
        record["held"] = not record["wrong"] and record.get("clean", True)
        failed += not record["held"]
        log.write(json.dumps(record) + "\n")
        log.flush()
        if not record["held"]:
            print(f"failed: {record}", flush=True)
        if time.monotonic() - shown > 60:
            shown = time.monotonic()
            print(f"{number + 1} of {len(todo)}, {failed} failed", flush=True)
    for name, command in commands.items():
        if count[name] and not runs_clean(command, news[name]):
            log.write(json.dumps({"number": -1, "command": name, "held": False}) + "\n")
            print(f"failed: {name} did not run clean in the end", flush=True)


def cut_off(
    command: Command, how: str, rng: random.Random, known: tuple[dict[str, str], dict[str, str]]
) -> Record:
    """One kill: where it hit, how the process ended, what the output is, and what is wrong."""
    before = command.touched()  # an earlier kill may have left a stage
    fork = rng.random() > (0.1 if how == KILL else 0.5)
    process = command.start(fork=fork)
    while_writing = rng.random() < 0.5
    if while_writing:
        while not process.poll() and command.touched() == before:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 1.05) * command.writing)
    else:
        time.sleep(rng.uniform(0, 1.05) * (command.seconds + (0 if fork else command.importing)))
    where = place(command, before, process.poll())
    process.send(NUMBERS[how])
    if how == TWICE:
        time.sleep(rng.uniform(0, 0.02))
        process.send(NUMBERS[how])
    code = process.wait()
    # Drift with the machine's load, so that about one in ten comes too late.
    command.writing *= (0.98 if where == "ended" else 1.003) if while_writing else 1
    command.seconds *= 1 if while_writing else 0.98 if where == "ended" else 1.003
    now = content(command.out)
    outcome = "new" if now == known[1] else "old" if now == known[0] else "mixed"
    wrong = []
    if outcome == "mixed" or not passes_verify(command.out):
        wrong.append("the output is neither the old nor the new one")
    if code == 0 and outcome != "new":
        wrong.append("exit 0 without the new output")
    if how != KILL:
        wrong += complaints(command, how, code, where, process.errors())
    if outcome == "new":
        where = where if where == "ended" or command.stage.exists() else "published"
        command.put_back()
    return {"where": where, "fork": fork, "code": code, "outcome": outcome, "wrong": wrong}


def place(command: Command, before: tuple[int, ...], ended: bool) -> str:
    """How far the process is, as its files tell."""
    if ended:
        return "ended"
    if command.touched() == before:
        return "no stage"
    return "shards finished" if is_resumable(command) else "stage"


def is_resumable(command: Command) -> bool:
    """Whether the stage holds work that --resume takes up."""
    return any((command.stage / name).exists() for name in (".resume.json", ".calibration.json"))


def complaints(command: Command, how: str, code: int, where: str, errors: str) -> list[str]:
    """What a signal that can be answered must not leave."""
    number = NUMBERS[how]
    wrong = []
    # Python itself starts and ends without our handlers: it dies of the signal, which is the same
    # exit code to a shell.
    if code not in (0, 128 + number, -number):
        wrong.append(f"exit {code}: {errors[-600:]}")
    if "Traceback" in errors and ("compress/" in errors or where != "no stage"):
        wrong.append(f"a traceback: {errors[-600:]}")
    if command.lock.exists():
        wrong.append("the lock was left")
    if command.stage.exists() and not is_resumable(command):
        wrong.append(f"a stage was left that nothing can use: {sorted(command.stage.iterdir())}")
    return wrong


def passes_verify(out: Path) -> bool:
    """Whether the output is whole; a file of statistics has no manifest."""
    if not (out / manifest.NAME).exists():
        return out.is_file()
    try:
        verify_output(out)
    except CompressError:
        return False
    return True


def runs_clean(command: Command, new: dict[str, str]) -> bool:
    """Whether the command, undisturbed, gives the new output and leaves nothing beside it."""
    held = command.start().wait() == 0 and content(command.out) == new and not command.litter()
    command.put_back()
    return held


def summary(records: Iterable[Record]) -> Record:
    """Counts by signal: kills, outcomes, places; and of the undisturbed runs in between."""
    counts: dict[str, Any] = {"failed": 0, "clean": [0, 0]}
    for record in records:
        counts["failed"] += not record["held"]
        if "clean" in record:
            counts["clean"][0] += record["clean"]
            counts["clean"][1] += 1
        if "signal" in record:
            one = counts.setdefault(record["signal"], {"kills": 0, "held": 0})
            one["kills"] += 1
            one["held"] += record["held"]
            for key in (record["outcome"], record["where"], f"exit {record['code']}"):
                one[key] = one.get(key, 0) + 1
    return counts


def lines(records: Sequence[Record]) -> list[str]:
    """A table: command, signal, kills that held, and where they hit."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    for record in records:
        if "signal" in record:
            row = rows.setdefault((record["command"], record["signal"]), Counter())
            row.update(["kills", record["outcome"], record["where"]])
            row["held"] += record["held"]
    return [
        f"{name:22} {how:13} {row['held']:4} of {row['kills']:4} held: old {row['old']}, "
        f"new {row['new']}; before the stage {row['no stage']}, in it {row['stage']}, with "
        f"finished shards {row['shards finished']}, published {row['published']}, "
        f"too late {row['ended']}"
        for (name, how), row in sorted(rows.items())
    ]


if __name__ == "__main__":
    sys.exit(main())
