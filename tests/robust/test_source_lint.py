"""What the source of the tool must not contain: code from data, networks, maps, markup, raw names.

Each exception is listed with its reason; a reason that nothing needs any more fails the test.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from source_rules import findings

PACKAGE = Path(__file__).resolve().parents[2] / "compress"

_OWN_WORDS = "words of this program: options, passes, fields; no text from a file"
_OWN_STAGE = "reads back what this run wrote into its own stage"
# Who may do what: (module, rule) -> (what, why). "*" is anything under that rule.
ALLOWED: dict[tuple[str, str], tuple[set[str], str]] = {
    # Files that are opened for reading without `checkpoint.files`.
    ("checkpoint/files.py", "reads"): ({"os.open"}, "the one place that opens input"),
    ("checkpoint/out_lock.py", "reads"): ({"os.open"}, "the lock beside OUT"),
    ("checkpoint/torch_child.py", "reads"): ({"open"}, "descriptors it inherits; /proc/self"),
    ("checkpoint/torch_file.py", "reads"): ({"open"}, "a copy of a descriptor that was checked"),
    ("recipe.py", "reads"): ({"path.open"}, "a recipe that the user names; at most 1 MB"),
    ("calibrate/given_files.py", "reads"): (
        {"os.open"},
        "texts and arrays that the user names, of numbers only; bounded",
    ),
    ("calibrate/hf.py", "reads"): ({"open"}, _OWN_STAGE),
    ("calibrate/left_state.py", "reads"): ({"os.open"}, "files of a stage that was left, no links"),
    ("spills.py", "reads"): ({"open"}, _OWN_STAGE),
    ("export_onnx/genai.py", "reads"): ({"open"}, _OWN_STAGE),
    ("export_onnx/genai_builder.py", "reads"): ({"open"}, "the builder's log, in the stage"),
    ("machine_memory.py", "reads"): (
        {"file.read_text", "membership.read_text"},
        "limits of this process's control groups, by the kernel",
    ),
    ("run.py", "reads"): ({"Path('/proc/self/status').read_text"}, "this process's own memory"),
    # Code.
    ("checkpoint/config.py", "trust_remote_code"): ({"a string"}, "listed to be dropped"),
    ("runtime/tokenizer.py", "trust_remote_code"): (
        {
            "transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True, "
            "trust_remote_code=False)"
        },
        "switched off by name",
    ),
    ("runtime/tokenizer.py", "from_pretrained"): (
        {"transformers.AutoTokenizer.from_pretrained"},
        "tokenizers have no other loader; local files only, and no command that only"
        " rewrites weights calls it",
    ),
    ("checkpoint/torch_file.py", "process"): ({"subprocess"}, "the limited child for pickles"),
    ("export_onnx/genai_builder.py", "process"): ({"subprocess"}, "an engine's own builder"),
    ("calibrate/calibrate.py", "dynamic import"): ({"importlib"}, "engines of this program"),
    ("engines/module.py", "dynamic import"): ({"importlib.util"}, "--module: the user's own code"),
    ("export_onnx/torch_exporter.py", "dynamic import"): ({"importlib.util"}, "is it installed?"),
    ("export_onnx/genai_builder.py", "dynamic import"): ({"importlib.util"}, "is it installed?"),
    ("kernels/dispatch.py", "dynamic import"): ({"importlib"}, "the compiled kernels"),
    ("passes/__init__.py", "dynamic import"): ({"importlib"}, "installed passes"),
    # Interpolated into errors as they are.
    ("calibrate/on_the_way.py", "unescaped"): ({"' and '.join(given)"}, _OWN_WORDS),
    ("calibrate_command.py", "unescaped"): ({"name"}, _OWN_WORDS),
    ("checkpoint/config.py", "unescaped"): ({"key"}, "one of the keys that are looked at"),
    ("checkpoint/strict_json.py", "unescaped"): ({"word"}, "NaN, Infinity or -Infinity"),
    ("checkpoint/torch_file.py", "unescaped"): ({"name"}, "a key of a table of ours"),
    ("evaluate/data.py", "unescaped"): ({"name", "source"}, _OWN_WORDS),
    ("evaluate/onnx_outputs.py", "unescaped"): (
        {"' or '.join(names)", "', '.join(known)"},
        _OWN_WORDS,
    ),
    ("evaluation_commands.py", "unescaped"): ({"name"}, _OWN_WORDS),
    ("export_onnx/exporting_model.py", "unescaped"): ({"reason(error)"}, "it calls show"),
    ("export_onnx/exporting_module.py", "unescaped"): ({"reason(error)"}, "it calls show"),
    ("export_onnx/genai_builder.py", "unescaped"): ({"', '.join(known)"}, _OWN_WORDS),
    ("export_onnx/genai_layout.py", "unescaped"): ({"key"}, "one of the keys that are needed"),
    ("export_onnx/rewriting.py", "unescaped"): ({"one.name"}, "inputs as this program calls them"),
    ("formats/metadata.py", "unescaped"): ({"', '.join(sorted(allowed))"}, _OWN_WORDS),
    ("kernels/dispatch.py", "unescaped"): ({"', '.join(available)"}, _OWN_WORDS),
    ("passes/prune.py", "unescaped"): (
        {"self.pattern", "name", "getattr(self, name)"},
        "an N:M that was parsed; options",
    ),
    ("passes/quantize_budget.py", "unescaped"): ({"key"}, _OWN_WORDS),
    ("passes/quantize_overrides.py", "unescaped"): ({"name"}, _OWN_WORDS),
    ("passes/rank_budget.py", "unescaped"): ({"' and '.join(given)"}, _OWN_WORDS),
    ("plan.py", "unescaped"): (
        {"one.name", "before.name", "after.name", "later.name", "', '.join(sorted(one.needs))"},
        "names of passes",
    ),
    ("recipe.py", "unescaped"): (
        {"name", "key", "target.name", "', '.join(allowed)"},
        "passes and options that were found by these names",
    ),
    ("run_command.py", "unescaped"): ({"', '.join(known)"}, _OWN_WORDS),
    ("runtime/architecture.py", "unescaped"): ({"error.name"}, "a module that is not installed"),
    ("sweep/grid.py", "unescaped"): ({"name", "one.name"}, "passes that the recipe has"),
    ("sweep/sweep.py", "unescaped"): ({"', '.join(there)"}, _OWN_WORDS),
}


def test_the_source_keeps_the_rules() -> None:
    wrong, used = [], set()
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 150
    for path in modules:
        module = path.relative_to(PACKAGE).as_posix()
        for one in findings(path.read_text()):
            allowed = ALLOWED.get((module, one.rule), (set(), ""))[0]
            if one.what in allowed:
                used.add((module, one.rule, one.what))
            else:
                wrong.append(f"{module}:{one.line}: {one.rule}: {one.what}")
    assert wrong == []
    every = {(*key, what) for key, (whats, _) in ALLOWED.items() for what in whats}
    assert every - used == set(), "reasons that nothing needs any more"


BAD = {
    "import pickle": "banned module",
    "from marshal import loads": "banned module",
    "import numpy, urllib.request": "banned module",
    "import yaml": "banned module",
    "import mmap": "banned module",
    "import subprocess": "process",
    "from importlib import import_module": "dynamic import",
    "eval(text)": "runs text",
    "exec(compile(text, 'x', 'exec'))": "runs text",
    "f(trust_remote_code=True)": "trust_remote_code",
    "f(**{'trust_remote_code': True})": "trust_remote_code",
    "M.from_pretrained(path)": "from_pretrained",
    "torch.load(f)": "torch.load",
    "torch.load(f, weights_only=False)": "torch.load",
    "torch.load(f, weights_only=True, mmap=True)": "mmap",
    "np.memmap(path)": "mmap",
    "from numpy import memmap": "mmap",
    "np.load(f, allow_pickle=False, mmap_mode='r')": "mmap",
    "np.load(f)": "allow_pickle",
    "np.load(f, allow_pickle=True)": "allow_pickle",
    "open(path)": "reads",
    "open(path, 'rb')": "reads",
    "open(path, mode='r+b')": "reads",
    "path.open('rb')": "reads",
    "path.read_text()": "reads",
    "path.read_bytes()": "reads",
    "np.fromfile(path)": "reads",
    "os.open(path, os.O_RDONLY)": "reads",
    "run(words, shell=True)": "shell",
    "os.system('ls')": "shell",
    "tempfile.mktemp()": "mktemp",
    "console.print(name)": "markup",
    "console.print(f'{name}')": "markup",
    "console.print('tensor ' + name)": "markup",
    "Console()": "markup",
    "Text.from_markup(name)": "markup",
    "raise InputError(f'{info.name}: odd')": "unescaped",
    "raise InputError(f'x {info.name!r}')": "unescaped",
    "raise errors.VerifyError('a', hint=f'{path}')": "unescaped",
    "raise UsageError(f'{str(path)}')": "unescaped",
    "raise InputError(f'x: {error}') from error": "unescaped",
    "raise InputError(', '.join(['a']) + f'{\", \".join(names)}')": "unescaped",
    "raise InputError(f'{name if name else 1}')": "unescaped",
}


@pytest.mark.parametrize("source", BAD)
def test_each_rule_finds_what_it_is_for(source: str) -> None:
    assert BAD[source] in {one.rule for one in findings(source)}


GOOD = [
    "import json, pickletools",
    "model.eval()",
    "re.compile(x)",
    "torch.load(f, weights_only=True, mmap=False)",
    "checkpoint.read_bytes(info, 0, 4)",
    "open(path, 'wb')",
    "open(path, 'wb' if fresh else 'r+b')",
    "stage.open(key=key)",
    "os.open(path, os.O_RDONLY | os.O_DIRECTORY)",
    "console.print(Text(name))",
    "console.print('three words')",
    "console.print(line, markup=False)",
    "raise InputError(f'{show(info.name)}: {len(names)} and {info.dtype}')",
    "raise InputError(f'{\", \".join(show(n) for n in names)}: {show(str(error))}')",
    "raise InputError(f'one of {\", \".join(FORMATS)}')",
    "log(f'{info.name}')",
]


@pytest.mark.parametrize("source", GOOD)
def test_no_rule_finds_what_is_right(source: str) -> None:
    assert findings(source) == []
