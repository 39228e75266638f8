"""Run as a script: several commands of the tool in one process, the audit events of each in a log.

    python several.py LOG < COMMANDS        COMMANDS: a JSON list of argument lists

Prints `== N exit CODE` after each command, on standard output. LOG gets a JSON line an event.
A command ["torch_child", INPUT, OUTPUT, REPORT] is the converter of PyTorch files, called as its
process is; it limits the memory of this process and so must be the last.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

WATCHED = (
    "open", "os.", "shutil.", "tempfile.", "socket.", "subprocess.", "ctypes.dlopen", "mmap.",
    "urllib.", "http.", "ftplib.", "smtplib.", "pty.", "winreg.", "exec", "marshal.", "pickle.",
    "glob.", "pathlib.",
)  # fmt: skip
IGNORED = ("exec", "marshal.")  # what importing any module does


def watch(log: int) -> None:
    """Write a line for each event from here on; there is no way to switch it off."""
    busy = False

    def plain(value: Any) -> Any:
        if isinstance(value, bytes | os.PathLike):
            return os.fsdecode(value)
        return value if isinstance(value, str | int | None) else repr(value)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy or not event.startswith(WATCHED) or event.startswith(IGNORED):
            return
        busy = True
        try:
            line = json.dumps([event, *map(plain, arguments[:4])])
            os.write(log, line.encode() + b"\n")
        finally:
            busy = False

    sys.addaudithook(hook)


def run(words: list[str]) -> int:
    """One command; its exit code."""
    if words[0] == "torch_child":
        from compress.checkpoint import torch_child

        given = os.open(words[1], os.O_RDONLY)
        made, report = (os.open(w, os.O_RDWR | os.O_CREAT, 0o600) for w in words[2:])
        return torch_child.main([str(n) for n in (given, made, report, os.fstat(given).st_size)])
    from compress import cli

    sys.argv = ["compress", *words]
    try:
        cli.main()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1
    return 0


def main() -> None:
    commands = json.load(sys.stdin)
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    watch(log)
    for number, words in enumerate(commands):
        os.write(log, json.dumps(["command", number]).encode() + b"\n")
        os.access(f"/command/{number}", os.F_OK)  # a mark in the log of system calls
        code = 0
        try:
            code = run(words)
        finally:
            print(f"== {number} exit {code}", flush=True)
            sys.stderr.flush()


if __name__ == "__main__":
    main()
