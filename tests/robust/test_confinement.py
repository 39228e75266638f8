"""What the commands touch: the input, the stage beside OUT, Python's installation; no network.

Python's audit events of every command: they see each file that Python code opens, makes, renames or
removes, each socket and each process. Where strace is installed, the system calls of the process
and its children too, and with them what libraries do from C.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from damage import onnx_model
from toolbox import tiny_llama, tree

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
QUANTIZE = "quantize:bits=4,group=32"
# Read outside of the input and Python's installation, and why that is harmless.
SYSTEM = {
    "/proc/self/": "this process: its memory, its maps",
    "/proc/cpuinfo": "what the processor can do",
    "/proc/meminfo": "how much memory there is",
    "/proc/sys/vm/": "how memory is given out",
    "/sys/devices/system/cpu": "how many processors there are",
    "/sys/fs/cgroup": "how many of them are ours",
    "/dev/null": "nothing",
    "/dev/urandom": "seeds of hash tables and names of temporary files",
    "/etc/localtime": "the time zone",
    "/usr/share/zoneinfo": "time zones",
    "/etc/os-release": "which system this is",
    "/etc/debian_version": "which system this is",
    "/sys/bus/pci/devices": "which accelerators there are (onnxruntime)",
    "/sys/devices/pci": "the same, through links",
    "/usr/lib/ssl/openssl.cnf": "how OpenSSL, whose SHA-256 is used, was set up",
    "/etc/ssl/openssl.cnf": "the same",
    "/usr/share/locale/locale.alias": "names of languages",
    "/etc/locale.alias": "the same",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events that change a file system: how many of their first arguments are paths.
CHANGES = {
    "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2,
    "os.chmod": 1, "os.chown": 1, "os.truncate": 1, "os.utime": 1, "os.setxattr": 1,
    "os.removexattr": 1, "shutil.rmtree": 1, "shutil.move": 2, "shutil.copyfile": 2,
    "shutil.copymode": 2, "shutil.copystat": 2, "shutil.copytree": 2, "shutil.chown": 1,
    "tempfile.mkdtemp": 1, "tempfile.mkstemp": 1,
}  # fmt: skip
FORBIDDEN = (
    "socket.", "urllib.", "http.", "ftplib.", "smtplib.", "mmap.", "os.system", "os.fork",
    "os.exec", "os.posix_spawn", "pty.",
)  # fmt: skip
# System calls that open or change something; the last of their paths that must be ours.
CALLS = ("openat", "open", "creat", "mkdir", "mkdirat", "rename", "renameat", "renameat2", "unlink",
         "unlinkat", "rmdir", "link", "linkat", "symlink", "symlinkat", "truncate")  # fmt: skip
NETWORK = ("socket", "socketpair", "connect", "bind", "sendto", "listen", "accept", "accept4")
READS = {"os.listdir", "os.scandir", "os.walk", "os.getxattr", "os.listxattr", "glob.glob",
         "pathlib.Path.glob"}  # fmt: skip


@dataclass
class Audited:
    """A command that ran: its words, its exit code, its events, what it printed."""

    words: list[str]
    code: int
    events: list[list[Any]]
    inputs: list[Path]
    out: Path | None
    calls: list[str] = field(default_factory=list)


def models(root: Path) -> dict[str, Path]:
    """One of every kind, with a config that names code and the code beside it."""
    import torch

    tiny = {"hidden": 32, "ffn": 64, "layers": 1, "vocabulary": 32}
    single = tiny_llama(root / "single" / "m", **tiny)
    config = json.loads((single / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "evil--x.C"}
    (single / "config.json").write_text(json.dumps(config))
    (single / "modeling_evil.py").write_text(f"open({str(root / 'canary')!r}, 'w')\n")
    rng = torch.Generator().manual_seed(0)
    pickled = root / "pickled" / "m"
    pickled.mkdir(parents=True)
    state = {
        f"model.layers.0.mlp.{part}_proj.weight": torch.randn(32, 64, generator=rng)
        for part in ("gate", "up")
    }
    torch.save(state, pickled / "pytorch_model.bin")
    return {
        "single": single,
        "sharded": tiny_llama(root / "sharded" / "m", **tiny, shards=3),
        "onnx": onnx_model(root / "graph" / "m" / "model.onnx"),
        "pickled": pickled,
    }


def commands_of(kind: str, model: Path, outs: Path) -> Iterator[tuple[list[str], list[Path], Any]]:
    """(words, inputs, OUT) of every command on one model."""
    pickle = ["--allow-pickle"] if kind == "pickled" else []
    given = model.parent if kind == "onnx" else model
    m, made = str(model), outs / kind / "run" / "out"
    yield ["inspect", m, "--values", *pickle], [given], None
    if kind == "pickled":
        yield ["plan", m, QUANTIZE], [given], None  # refused: nothing is started
    else:
        yield ["plan", m, QUANTIZE, "--survey"], [given], None
    words = ["prune:sparsity=0.5", QUANTIZE, "super-weights"]
    yield ["run", m, *words, "-o", str(made), *pickle], [given], made
    yield ["verify", str(made)], [made], None
    if kind != "pickled":  # each time it is named, a child reads it, which takes seconds
        yield ["run", m, *words, "-o", str(made), "--overwrite"], [given, made], made
        yield ["verify", str(made), "--source", m], [made, given], None
        yield ["diff", m, str(made)], [made, given], None
    dense = outs / kind / "unpack" / "out"
    yield ["unpack", str(made), "-o", str(dense)], [made], dense
    plain = outs / kind / "dense" / "out"
    yield ["export", str(made), "--to", "dense", "-o", str(plain)], [made], plain
    if kind == "onnx":
        graph = outs / kind / "graph" / "out"
        yield ["export", str(made), "--to", "onnx", "-o", str(graph)], [made], graph
        yield ["export", str(made), "--to", "onnx"], [made], made
    if kind == "single":
        genai = outs / kind / "genai" / "out"
        own = outs / kind / "four" / "out"
        yield ["run", m, QUANTIZE, "-o", str(own), "--format", "native"], [given], own
        words = ["export", str(own), "--to", "genai", "--no-build", "-o", str(genai)]
        yield words, [own], genai


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> list[Audited]:
    """Every command on every kind of model, in one process."""
    root = tmp_path_factory.mktemp("audited").resolve()
    sources = models(root / "in")
    before = tree(root / "in", without_run=False)
    for empty in ("cwd", "home", "tmp"):
        (root / empty).mkdir()
    planned = []
    for kind, model in sources.items():
        for words, inputs, out in commands_of(kind, model, root / "outs"):
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
            planned.append((words, inputs, out))
    planned.append(child_alone(sources["pickled"], root / "child"))
    done = drive([words for words, _, _ in planned], root)
    assert "Traceback" not in done.stderr, done.stderr
    codes = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("== ")]
    assert len(codes) == len(planned)
    # Nothing of the input changed, and nothing is left in any place that nobody named.
    assert tree(root / "in", without_run=False) == before
    assert not (root / "in" / "canary").exists()
    assert [list((root / d).iterdir()) for d in ("cwd", "home", "tmp")] == [[], [], []]
    assert not [p for p in (root / "outs").rglob("*") if p.name.endswith((".partial", ".lock"))]
    events, calls = by_command(root / "log"), calls_by_command(root / "calls")
    return [
        Audited(words, code, events[n], inputs, out, calls.get(n, []))
        for n, ((words, inputs, out), code) in enumerate(zip(planned, codes, strict=True))
    ]


def child_alone(model: Path, place: Path) -> tuple[list[str], list[Path], Path]:
    """The process that reads a PyTorch file, by itself; it gets its files open from its parent."""
    place.mkdir()
    files = [model / "pytorch_model.bin", place / "made", place / "report"]
    return ["torch_child", *map(str, files)], [model], place / "made"


def strace(log: Path) -> list[str]:
    """The command that records system calls in `log`; empty where it cannot."""
    if shutil.which("strace") is None:
        return []
    words = ["strace", "-f", "--seccomp-bpf", "-qq", "-y", "-s", "4096", "-o", str(log), "-e"]
    words.append(f"trace={','.join((*CALLS, *NETWORK, 'faccessat', 'access'))}")
    tried = subprocess.run([*words, "true"], capture_output=True, check=False)
    return words if tried.returncode == 0 else []


def drive(commands: list[list[str]], root: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(PROJECT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(root / "home"),
        "TMPDIR": str(root / "tmp"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*strace(root / "calls"), sys.executable, str(HERE / "several.py"), str(root / "log")],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=root / "cwd",
        env=environment,
    )


def by_command(log: Path) -> dict[int, list[list[Any]]]:
    found: dict[int, list[list[Any]]] = {}
    number = -1
    for line in log.read_text().splitlines():
        event = json.loads(line)
        if event[0] == "command":
            number = event[1]
        found.setdefault(number, []).append(event)
    return found


def calls_by_command(log: Path) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    number = -1
    for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
        mark = re.search(r'access[a-z0-9]*\(.*"/command/(\d+)"', line)
        number = int(mark[1]) if mark else number
        found.setdefault(number, []).append(line)
    return found


@cache
def installation() -> list[Path]:
    """Where Python, its packages and this package lie, and what shared libraries are found by."""
    places = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *site.getsitepackages()}
    fixed = ["/lib", "/lib64", "/usr/lib", "/usr/local/lib", "/etc/ld.so.cache"]
    return [Path(p).resolve() for p in (*places, *fixed, PROJECT / "compress", HERE)]


@cache
def real_path(path: str) -> Path:
    return Path(os.path.realpath(path))


def inside(path: str, roots: list[Path]) -> bool:
    real = real_path(path)
    return any(real == root or root in real.parents for root in roots)


def escapes(one: Audited) -> list[Any]:
    """Events of a command that are outside of what it may do."""
    wrong: list[Any] = []
    ours = [] if one.out is None else [one.out.parent]
    readable = [*one.inputs, *ours, *installation()]
    for event in one.events:
        name, arguments = event[0], event[1:]
        if name == "open":
            wrong += _opened(event, readable, ours)
        elif name in CHANGES:
            paths = arguments[: CHANGES[name]]
            if not all(_is_known(p, arguments[CHANGES[name] :], ours) for p in paths):
                wrong.append(event)
        elif name in READS:
            path = arguments[0]
            known = path is None or isinstance(path, int) or inside(path, readable)
            wrong += [] if known or _of_system(path) else [event]
        elif name.startswith(FORBIDDEN):
            wrong.append(event)
        elif name == "subprocess.Popen":
            child = "torch_child.py" in str(arguments) and "--allow-pickle" in one.words
            wrong += [] if child else [event]
    return wrong


def _is_known(path: Any, more: list[Any], ours: list[Path]) -> bool:
    """Whether a path that is changed is ours; below a descriptor, its folder was opened before."""
    if isinstance(path, int) or (not os.path.isabs(path) and any(n != -1 for n in more[:1])):
        return True
    return inside(path, ours) or _is_probe(path)


def _is_probe(path: str) -> bool:
    """A file that Python's `tempfile` makes and removes to see whether TMPDIR can be written."""
    return bool(re.search(r"/audited\d+/tmp/[a-z0-9_]{8}$", path))


def _opened(event: list[Any], readable: list[Path], ours: list[Path]) -> list[Any]:
    path, mode, flags = (event[1:] + [None] * 3)[:3]
    if path is None or isinstance(path, int):
        return []
    flags = flags if isinstance(flags, int) else 0
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        return []  # a file without a name
    writes = flags & WRITING or (isinstance(mode, str) and set(mode) & set("wax+"))
    if writes:
        # A directory cannot be written to: this is the same file without a name, seen once more.
        nameless = mode == "w+" and path.endswith("/tmp")
        known = nameless or path == os.devnull or _is_probe(path) or inside(path, ours)
        return [] if known else [event]
    return [] if inside(path, readable) or _of_system(path) else [event]


def escaping_calls(one: Audited) -> list[str]:
    """System calls of a command that are outside of what it may do."""
    ours = [] if one.out is None else [one.out.parent]
    readable = [*one.inputs, *ours, *installation()]
    wrong = []
    for line in one.calls:
        found = re.match(r"\d+ +([a-z0-9]+)\((.*)", line)
        if found is None or found[1] in ("access", "faccessat") or found[1] not in CALLS + NETWORK:
            continue
        name, rest = found[1], found[2]
        if name in NETWORK:
            wrong.append(line)
            continue
        changes = name not in ("openat", "open") or bool(re.search(r"O_(WRONLY|RDWR|CREAT)", rest))
        if "O_TMPFILE" in rest or (not changes and " = -1 " in rest):
            continue
        for path in _paths(rest):
            known = inside(path, ours) or path == os.devnull or _is_probe(path)
            if not known and (changes or not (inside(path, readable) or _of_system(path))):
                wrong.append(line)
    return wrong


def _paths(rest: str) -> list[str]:
    """Absolute paths of a call's arguments; -y shows what descriptors stand for."""
    arguments = rest.split(") = ", maxsplit=1)[0]
    found = re.findall(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"', arguments)
    return [os.path.normpath(os.path.join(folder or "/", path)) for folder, path in found]


def _of_system(path: str) -> bool:
    return path == str(PROJECT) or path.startswith(tuple(SYSTEM))


@pytest.mark.slow
def test_every_command_worked(audited: list[Audited]) -> None:
    failed = {" ".join(one.words): one.code for one in audited if one.code}
    refused = [words for words, code in failed.items() if code == 3]
    assert len(failed) == len(refused) == 1, failed  # a PyTorch file without --allow-pickle
    assert len(audited) > 30


@pytest.mark.slow
def test_nothing_outside_the_named_places(audited: list[Audited]) -> None:
    wrong = {" ".join(one.words): escapes(one)[:4] for one in audited}
    assert {words: events for words, events in wrong.items() if events} == {}


@pytest.mark.slow
def test_no_system_call_outside_the_named_places(audited: list[Audited]) -> None:
    if not any(one.calls for one in audited):
        pytest.skip("no strace here, or it may not trace")
    assert all('"/command/' in one.calls[0] for one in audited)
    for one in audited:
        if one.out is not None:
            assert any("O_CREAT" in c and str(one.out.parent) in c for c in one.calls), one.words
    wrong = {" ".join(one.words): escaping_calls(one)[:4] for one in audited}
    assert {words: calls for words, calls in wrong.items() if calls} == {}


@pytest.mark.slow
def test_the_log_sees_what_the_commands_do(audited: list[Audited]) -> None:
    """A log that missed events would prove nothing."""
    for one in audited:
        opened = [e[1] for e in one.events if e[0] == "open" and isinstance(e[1], str)]
        if one.code == 0:
            assert any(inside(path, one.inputs) for path in opened), one.words
        if one.out is not None and one.words[0] != "torch_child":
            made = [e for e in one.events if e[0] in ("os.mkdir", "os.rename")]
            assert any(inside(str(e[1]), [one.out.parent]) for e in made), one.words
    children = [one for one in audited if any(e[0] == "subprocess.Popen" for e in one.events)]
    assert {"--allow-pickle" in one.words for one in children} == {True}


def test_an_escape_would_be_found(tmp_path: Path) -> None:
    here = [tmp_path / "in"]
    bad = [
        ["open", str(tmp_path / "other"), "r", os.O_RDONLY],
        ["open", str(tmp_path / "in" / "x"), "w", os.O_WRONLY | os.O_CREAT],
        ["open", "/etc/passwd", None, os.O_RDONLY],
        ["open", str(tmp_path / "in" / ".." / "other"), "r", 0],
        ["os.mkdir", str(tmp_path / "in" / "y"), 0o777, -1],
        ["os.rename", str(tmp_path / "out" / "y"), str(tmp_path / "z"), -1, -1],
        ["os.listdir", str(tmp_path)],
        ["socket.__new__", "s", 2, 1, 0],
        ["subprocess.Popen", "sh", "['sh']", None, None],
        ["os.system", "true"],
        ["mmap.__new__", 3, 10, 1],
    ]
    calls = [
        f'7 openat(AT_FDCWD</>, "{tmp_path}/other", O_RDONLY|O_CLOEXEC) = 3',
        f'7 openat(9<{tmp_path}/in>, "../other", O_RDONLY) = 3',
        f'7 openat(AT_FDCWD<{tmp_path}>, "in/x", O_WRONLY|O_CREAT <unfinished ...>',
        f'7 rename("{tmp_path}/out/y", "{tmp_path}/y") = 0',
        "7 socket(AF_INET, SOCK_STREAM, IPPROTO_IP) = 3<socket:[1]>",
    ]
    one = Audited(["plan"], 0, bad, here, tmp_path / "out" / "o", calls)
    assert escapes(one) == bad
    assert escaping_calls(one) == calls
