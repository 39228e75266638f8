"""The main job from end to end, through the command line: files, plan, resume, crash, gates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from toolbox import tiny_llama, tool, tool_json, tool_process, tree, write_safetensors

QUANTIZE = "quantize:bits=4,group=32"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


def size_of(folder: Path) -> int:
    """Bytes of all files but the two that the plan leaves out."""
    apart = {"report.json", "manifest.json"}
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name not in apart)


@pytest.mark.parametrize(
    "words",
    [
        [QUANTIZE],
        ["quantize:bits=8,group=-1"],
        ["quantize:bits=3,group=32"],
        ["quantize:bits=4,group=32,symmetric=false"],
        [QUANTIZE, "quantize:bits=8,group=-1,targets=[model.embed_tokens]"],
        ["prune:sparsity=0.5"],
        [QUANTIZE, "low-rank:rank=4"],
        [QUANTIZE, "--format", "dense"],
        ["prune:sparsity=0.5", "--untouched", "bf16"],
    ],
    ids=" ".join,
)
def test_the_plan_is_exact_to_the_byte(model: Path, tmp_path: Path, words: list[str]) -> None:
    plan = tool_json("plan", model, *words)
    tool_json("run", model, "-o", tmp_path / "out", *words)
    assert plan["exact"]
    assert plan["bytes"] == [size_of(tmp_path / "out")] * 2


@pytest.mark.parametrize(
    "words",
    [
        ["prune:sparsity=0.6", "--format", "native"],
        ["prune:sparsity=0.6", QUANTIZE, "--format", "native"],
        ["prune:pattern=2:4", QUANTIZE, "--format", "native"],
    ],
    ids=" ".join,
)
def test_a_survey_makes_the_range_exact(model: Path, tmp_path: Path, words: list[str]) -> None:
    rough = tool_json("plan", model, *words)
    exact = tool_json("plan", model, *words, "--survey")
    tool_json("run", model, "-o", tmp_path / "out", *words)
    measured = size_of(tmp_path / "out")
    assert rough["bytes"][0] <= measured <= rough["bytes"][1]
    assert exact["bytes"] == [measured, measured]


def test_the_output_verifies_unpacks_and_compares(model: Path, tmp_path: Path) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    tool_json("run", model, "-o", out, "prune:sparsity=0.3", QUANTIZE, "--format", "native")
    assert tool_json("verify", out, "--source", model)["untouched_compared"] == 6
    tool_json("unpack", out, "-o", dense)
    assert tool_json("verify", dense)["ok"]
    assert tool_json("diff", out, dense)["relative_error"] == 0
    report = json.loads((out / "report.json").read_text())
    difference = tool_json("diff", model, out)
    changed = {r["name"]: r["relative_error"] for r in report["tensors"] if r["passes"]}
    for row in difference["tensors"]:
        assert row["relative_error"] == pytest.approx(changed.get(row["name"], 0.0), abs=2e-6)
    assert (dense / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_a_pruned_model_has_exactly_the_zeros_asked_for(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tool_json("run", model, "-o", out, "prune:sparsity=0.37", "--format", "native")
    report = json.loads((out / "report.json").read_text())
    targeted = [r for r in report["tensors"] if r["passes"]]
    weights = sum(np.prod(r["shape"]) for r in targeted)
    zeros = sum(round(r["sparsity"] * np.prod(r["shape"])) for r in targeted)
    assert zeros == round(0.37 * weights)


def test_integers_and_untouched_floats_pass_through(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    ids = np.arange(7, dtype=np.int64)
    write_safetensors(
        model / "model.safetensors",
        {
            "fc.weight": np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32),
            "position_ids": ids,
            "norm.weight": np.ones(3, np.float32),
        },
    )
    out = tmp_path / "out"
    tool_json("run", model, "-o", out, "quantize:bits=4,group=32", "--untouched", "bf16")
    from compress.checkpoint import open_checkpoint
    from compress.output import open_any

    with open_any(out) as checkpoint:
        assert np.array_equal(checkpoint.read(checkpoint.info("position_ids")), ids)
        assert checkpoint.info("norm.weight").dtype == "F32"  # unpack restores the source's dtype
    with open_checkpoint(out / "model.safetensors", allow_quantized=True) as stored:
        assert stored.info("norm.weight").dtype == "BF16"


def test_threads_and_environment_do_not_change_a_byte(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", dtype=ml_dtypes.bfloat16, hidden=128, ffn=320)
    words = ["super-weights", "prune:sparsity=0.4", "quantize:bits=4,group=32", "low-rank:rank=4"]
    trees = []
    for number, (jobs, extra) in enumerate(
        [("1", {}), ("4", {"PYTHONHASHSEED": "7"}), ("2", {"LC_ALL": "C", "TZ": "Asia/Tokyo"})]
    ):
        out = tmp_path / f"out{number}"
        done = tool_process("run", model, "-o", out, *words, "--jobs", jobs, **extra)
        assert done.returncode == 0, done.stderr
        trees.append(tree(out))
    assert trees[0] == trees[1] == trees[2]


def test_shards_resume_to_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", hidden=512, ffn=1024, layers=3, shards=3)
    words = ["prune:sparsity=0.3", "quantize:bits=4,group=32", "low-rank:rank=2"]
    flags = ["--max-shard-size", "2MB"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert tool("run", model, "-o", whole, *words, *flags).returncode == 0
    assert (whole / "model.safetensors.index.json").exists()
    started = subprocess.Popen(
        [sys.executable, "-m", "compress", "run", model, "-o", cut, *words, *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    state = cut.with_name("cut.partial") / ".resume.json"
    deadline = time.monotonic() + 60
    while not state.exists() and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not cut.exists()
    assert state.exists(), "no shard was finished before the kill"
    other = tool("run", model, "-o", cut, "quantize:bits=8,group=32", *flags, "--resume")
    assert other.returncode == 2
    assert "another model, recipe or version" in other.stderr
    done = tool("run", model, "-o", cut, *words, *flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert tree(cut) == tree(whole)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*lock"))


@pytest.mark.slow
def test_thirty_kills_never_leave_a_mixed_output(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", hidden=256, ffn=512, shards=2)
    out = tmp_path / "out"
    assert tool("run", model, "-o", out, "quantize:bits=8,group=-1").returncode == 0
    old = tree(out)
    started = time.monotonic()
    assert tool_process("run", model, "-o", tmp_path / "new", QUANTIZE).returncode == 0
    duration = time.monotonic() - started
    new = tree(tmp_path / "new")
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(30):
        process = subprocess.Popen(
            [sys.executable, "-m", "compress", "run", model, "-o", out, QUANTIZE, "--overwrite"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(float(rng.uniform(0.2, 1.1)) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = tree(out)
        assert now in (old, new)
        seen.add("old" if now == old else "new")
        if now == new:  # put the old one back, so that every kill has something to lose
            assert (
                tool("run", model, "-o", out, "quantize:bits=8,group=-1", "--overwrite").returncode
                == 0
            )
    assert tool("run", model, "-o", out, QUANTIZE, "--overwrite").returncode == 0
    assert tree(out) == new
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*lock"))
    assert "old" in seen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    model = tiny_llama(tmp_path / "model", hidden=512, ffn=2048, layers=6)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "compress", "run", model, "-o", out, QUANTIZE, "low-rank:rank=64"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not out.with_name("out.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert not out.exists() and not out.with_name("out.partial").exists()


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    out = tmp_path / "out"
    import fcntl

    lock = tmp_path / ".out.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = tool("run", model, "-o", out, QUANTIZE)
    assert done.returncode == 75
    assert "another run" in done.stderr
    assert not out.exists()


def test_a_failed_gate_publishes_nothing_but_writes_the_report(model: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    words = [QUANTIZE, "--fail-if", "relative_error>0.01", "--report", report]
    done = tool("run", model, "-o", out, *words)
    assert done.returncode == 4
    assert "relative_error is 0." in done.stderr
    assert not out.exists() and not out.with_name("out.partial").exists()
    assert json.loads(report.read_text())["totals"]["relative_error"] > 0.01
    ok = tool("run", model, "-o", out, QUANTIZE, "--fail-if", "relative_error>0.9")
    assert ok.returncode == 0
    assert out.exists()


def test_a_recipe_file_with_gates(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nmodel: {model}\npasses:\n  - quantize: {{bits: 4, group: 32}}\n"
        "output: {format: native}\ngates: [{metric: bytes, max: 10}]\n"
    )
    assert tool("run", "--recipe", recipe, "-o", tmp_path / "out").returncode == 4
    again = tool("plan", "--recipe", recipe, "--json")
    assert json.loads(again.stdout)["format"] == "native"


BAD = {
    "no such model": (["plan", "{tmp}/none", QUANTIZE], 2),
    "no pass": (["run", "{model}", "-o", "{tmp}/out"], 2),
    "no output": (["run", "{model}", QUANTIZE], 2),
    "unknown pass": (["run", "{model}", "-o", "{tmp}/out", "quantiz"], 2),
    "unknown key": (["run", "{model}", "-o", "{tmp}/out", "quantize:bit=4"], 2),
    "pattern without match": (["plan", "{model}", "quantize:targets=[nothing*]"], 2),
    "indivisible group": (["plan", "{model}", "quantize:group=48"], 2),
    "low-rank before quantize": (["plan", "{model}", "low-rank", QUANTIZE], 2),
    "prune after quantize": (["plan", "{model}", QUANTIZE, "prune"], 2),
    "two writers": (["plan", "{model}", QUANTIZE, QUANTIZE], 2),
    "rank too large": (["plan", "{model}", QUANTIZE, "low-rank:rank=5000"], 2),
    "format that cannot": (
        ["plan", "{model}", "quantize:bits=3,group=32", "--format", "compressed-tensors"],
        2,
    ),
    "unknown format": (["plan", "{model}", QUANTIZE, "--format", "gguf"], 2),
    "bad memory": (["plan", "{model}", QUANTIZE, "--memory", "lots"], 2),
    "bad gate": (["run", "{model}", "-o", "{tmp}/out", QUANTIZE, "--fail-if", "x>1"], 2),
    "output inside the model": (["run", "{model}", "-o", "{model}/out", QUANTIZE], 2),
    "existing output": (["run", "{model}", "-o", "{tmp}", QUANTIZE], 2),
    "unknown flag": (["run", "{model}", "--nope"], 2),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_one_line(model: Path, tmp_path: Path, case: str) -> None:
    words, code = BAD[case]
    before = tree(model)
    done = tool(*[w.format(tmp=tmp_path, model=model) for w in words])
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if case != "unknown flag":
        assert lines[0].startswith("error: ")
        assert len(lines) <= 2
    assert done.stdout == ""
    assert tree(model) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("word", [QUANTIZE, "prune"])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float, word: str) -> None:
    weight = np.ones((64, 64), np.float32)
    weight[3, 5] = value
    model = tmp_path / "model.safetensors"
    write_safetensors(model, {"fc.weight": weight})
    done = tool("run", model, "-o", tmp_path / "out", word, "--format", "native")
    assert done.returncode == 3
    assert "fc.weight" in done.stderr
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_only_our_own_outputs(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    done = tool("run", model, "-o", out, QUANTIZE, "--overwrite")
    assert done.returncode == 2
    assert (out / "precious.txt").read_text() == "mine"
    (out / "precious.txt").unlink()
    assert tool("run", model, "-o", out, QUANTIZE, "--overwrite").returncode == 0
    assert tool("run", model, "-o", out, QUANTIZE, "--overwrite").returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", hidden=256, ffn=1024)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", small],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("no mount here")
    try:
        done = tool("run", model, "-o", small / "out", QUANTIZE)
        assert done.returncode == 6
        assert "Traceback" not in done.stderr
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", small], check=False)


def test_a_verify_finds_a_flipped_bit_a_truncation_and_a_stray_file(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tool_json("run", model, "-o", out, QUANTIZE)
    weights = out / "model.safetensors"
    content = bytearray(weights.read_bytes())
    for position in (10, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 1
        weights.write_bytes(damaged)
        assert tool("verify", out).returncode == 5
    weights.write_bytes(content[:-1])
    assert tool("verify", out).returncode == 5
    weights.write_bytes(content)
    (out / "stray").write_text("")
    assert tool("verify", out).returncode == 5
    (out / "stray").unlink()
    manifest = out / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"seconds": 0', '"seconds": 1', 1).replace("4", "5", 1))
    assert tool("verify", out).returncode == 5
    manifest.write_text(text)
    assert tool("verify", out).returncode == 0


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_get_the_umask(model: Path, tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        tool_json("run", model, "-o", tmp_path / "out", QUANTIZE)
    finally:
        os.umask(old)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask
