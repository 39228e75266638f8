"""Rules of `test_source_lint.py`: what the source of the tool must not contain, found by AST."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

# Runs code from data, reads a language that does, maps files, or speaks to a network.
BANNED_MODULES = {
    "pickle", "_pickle", "cPickle", "marshal", "shelve", "dbm", "dill", "cloudpickle", "joblib",
    "yaml", "jinja2", "runpy", "code", "codeop", "mmap", "socket", "ssl", "urllib", "http",
    "ftplib", "smtplib", "requests", "httpx", "aiohttp", "huggingface_hub", "xmlrpc",
}  # fmt: skip
PROCESS_MODULES = {"subprocess", "multiprocessing", "pty"}
RUN_TEXT = {"eval", "exec", "compile", "__import__"}
SHELLS = {"system", "popen", "fork", "forkpty", "execv", "execve", "execvp", "posix_spawn"}
READERS = {"read_text", "read_bytes", "fromfile", "loadtxt", "genfromtxt"}
ERRORS = {
    "CompressError", "UsageError", "InputError", "GateError", "VerifyError", "ResourceError",
    "BusyError", "AlreadyCompressed",
}  # fmt: skip
# How values that come from files (or from the command line) are called in this code base.
FOREIGN = {
    "name", "path", "file", "filename", "relative", "alias", "shard", "member", "key", "word",
    "pattern", "out", "source", "directory", "folder", "producer", "op_type", "domain",
}  # fmt: skip
QUOTING = {"show", "len", "type", "sorted", "human", "hex", "ord", "round", "min", "max", "sum"}


@dataclass(frozen=True)
class Finding:
    """One place that breaks a rule; `what` is the offending source."""

    rule: str
    line: int
    what: str


def findings(source: str) -> list[Finding]:
    """Everything in a module that breaks a rule."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        found += [Finding(rule, node.lineno, what) for rule, what in _of_node(node)]
    return found


def _of_node(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from _of_import(alias.name)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        yield from _of_import(node.module or "", tuple(alias.name for alias in node.names))
    elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
        yield "trust_remote_code", "a string"
    elif isinstance(node, ast.Attribute) and node.attr == "memmap":
        yield "mmap", ast.unparse(node)
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_import(module: str, names: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    top = module.split(".", maxsplit=1)[0]
    if top in BANNED_MODULES:
        yield "banned module", module
    if top in PROCESS_MODULES:
        yield "process", module
    if top == "importlib" and module != "importlib.metadata":
        yield "dynamic import", module
    for name in names:
        if name in ("mktemp", "memmap"):
            yield "mktemp" if name == "mktemp" else "mmap", f"{module}.{name}"


def _of_call(call: ast.Call) -> Iterator[tuple[str, str]]:
    callee = ast.unparse(call.func)
    last = callee.rsplit(".", 1)[-1]
    owner = callee.rsplit(".", 2)[-2] if "." in callee else ""
    keywords = {k.arg: k.value for k in call.keywords if k.arg is not None}
    if callee in RUN_TEXT or callee.removeprefix("builtins.") in RUN_TEXT:
        yield "runs text", callee
    if "trust_remote_code" in keywords:
        yield "trust_remote_code", ast.unparse(call)
    if last in ("from_pretrained", "from_config"):
        yield "from_pretrained", callee
    if callee == "torch.load" and not _is(keywords.get("weights_only"), True):
        yield "torch.load", ast.unparse(call)
    if "mmap_mode" in keywords or ("mmap" in keywords and not _is(keywords["mmap"], False)):
        yield "mmap", ast.unparse(call)
    if callee in ("np.load", "numpy.load") or last == "read_array":
        if not _is(keywords.get("allow_pickle"), False):
            yield "allow_pickle", ast.unparse(call)
        yield "reads", ast.unparse(call.func)
    if "shell" in keywords or (owner == "os" and last in SHELLS):
        yield "shell", ast.unparse(call)
    if last == "mktemp":
        yield "mktemp", callee
    if _reads(call, callee, last):
        yield "reads", callee
    yield from _of_printing(call, last, keywords)
    if last in ERRORS or last in ("_damaged", "refuse"):
        yield from _unescaped(call)


def _is(value: ast.expr | None, constant: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


def _reads(call: ast.Call, callee: str, last: str) -> bool:
    """Whether a file is opened for reading. `os.open` of directories, to fsync them, is not."""
    words = " ".join(ast.unparse(a) for a in (*call.args, *[k.value for k in call.keywords]))
    if callee == "os.open":
        return "O_DIRECTORY" not in words and "O_WRONLY" not in words and "devnull" not in words
    if callee in ("open", "io.open") or (last == "open" and _mode(call, 0) is not None):
        mode = _mode(call, 0 if last == "open" and callee not in ("open", "io.open") else 1) or "r"
        return not set(mode) & set("wax")
    if callee in ("sys.stdin.read", "sys.stdin.buffer.read"):
        return True
    # checkpoint.read_bytes(info, start, stop) is a reader of ours, Path.read_bytes() takes nothing
    return last in READERS and len(call.args) <= (last in ("fromfile", "loadtxt", "genfromtxt"))


def _mode(call: ast.Call, place: int) -> str | None:
    values = [k.value for k in call.keywords if k.arg == "mode"] + call.args[place : place + 1]
    for value in values:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value.value if set(value.value) <= set("rwaxbt+") else None
        if isinstance(value, ast.IfExp):
            return ast.unparse(value.body).strip("'\"")
    return None


def _of_printing(
    call: ast.Call, last: str, keywords: dict[str, ast.expr]
) -> Iterator[tuple[str, str]]:
    """rich reads `[red]` in a str as markup, unless it was told not to."""
    if last in ("Console", "Quiet", "TextColumn") and not _is(keywords.get("markup"), False):
        yield "markup", ast.unparse(call)
    if last == "from_markup":
        yield "markup", ast.unparse(call)
    if last != "print" or not isinstance(call.func, ast.Attribute):
        return
    if _is(keywords.get("markup"), False):
        return
    for value in call.args:
        plain = isinstance(value, ast.Constant)
        text = isinstance(value, ast.Call) and ast.unparse(value.func) in ("Text", "_layer_table")
        table = isinstance(value, ast.Name) and value.id in ("table", "speeds")
        if not (plain or text or table):
            yield "markup", ast.unparse(call)


def _unescaped(call: ast.Call) -> Iterator[tuple[str, str]]:
    """Names and paths that an error's message holds as they are."""
    for part in ast.walk(call):
        if isinstance(part, ast.FormattedValue) and _is_foreign(part.value):
            if part.conversion != ord("r"):
                yield "unescaped", ast.unparse(part.value)
            else:
                yield "unescaped", f"{ast.unparse(part.value)}!r"


def _is_foreign(value: ast.expr) -> bool:
    if isinstance(value, ast.Name):
        return value.id in FOREIGN or value.id == "error"
    if isinstance(value, ast.Attribute):
        return value.attr in FOREIGN
    if isinstance(value, ast.Call):
        name = ast.unparse(value.func)
        if name.rsplit(".", 1)[-1] in QUOTING:
            return False
        return any(_is_foreign(a) for a in value.args) or (
            isinstance(value.func, ast.Attribute)
            and name.rsplit(".", 1)[-1] in ("join", "decode", "as_posix")
            and not _joins_known(value)
        )
    if isinstance(value, ast.IfExp):
        return _is_foreign(value.body) or _is_foreign(value.orelse)
    if isinstance(value, ast.Subscript):
        return isinstance(value.value, ast.Name) and _is_foreign(value.value)
    return False


def _joins_known(call: ast.Call) -> bool:
    """`', '.join(show(n) for n in names)`, or a constant of the module."""
    words = [ast.unparse(a) for a in call.args]
    return any("show(" in word or word.strip("_").isupper() for word in words)
