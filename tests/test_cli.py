"""The skin of the tool: help, speed of start, generated options, pipes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toolbox import tiny_llama, tool, tool_json, tool_process

from compress import kernels
from compress.passes import pass_classes
from compress.passes.base import option_fields

TOOL = shlex.join([sys.executable, "-m", "compress"])


def test_help_lists_every_command_and_is_quick() -> None:
    durations = []
    for _ in range(5):
        started = time.perf_counter()
        done = tool_process("--help")
        durations.append(time.perf_counter() - started)
        assert done.returncode == 0
    for command in [
        "run",
        "plan",
        "inspect",
        "verify",
        "unpack",
        "diff",
        "generate",
        "bench",
        "kernels",
        "eval",
        "sweep",
        "prune",
        "super-weights",
        "quantize",
        "low-rank",
    ]:
        assert command in done.stdout
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import numpy"], check=True)
    # Half a second on a quiet machine; here as a ratio to starting Python with numpy alone.
    assert min(durations) < max(0.5, 4 * (time.perf_counter() - started))


@pytest.mark.parametrize("name", sorted(pass_classes()))
def test_a_pass_command_offers_every_field(name: str) -> None:
    done = tool(name, "--help")
    assert done.returncode == 0
    flat = done.stdout
    for field in option_fields(pass_classes()[name]):
        assert "--" + field.name.replace("_", "-") in flat


def test_a_pass_command_does_what_run_does(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    one = tool_json(
        "quantize", model, "-o", tmp_path / "a", "--bits", "8", "--group", "32", "--no-symmetric",
        "--targets", "*mlp*", "--targets", "*q_proj",
    )  # fmt: skip
    other = tool_json(
        "run", model, "-o", tmp_path / "b",
        'quantize:bits=8,group=32,symmetric=false,targets=["*mlp*", "*q_proj"]',
    )  # fmt: skip
    assert (tmp_path / "a" / "recipe.yaml").read_bytes() == (
        tmp_path / "b" / "recipe.yaml"
    ).read_bytes()
    assert one["totals"]["relative_error"] == other["totals"]["relative_error"]


@pytest.mark.parametrize("value", ["'", "\udcff"])
def test_a_typed_option_that_is_no_yaml_is_a_usage_error(tmp_path: Path, value: str) -> None:
    model = tiny_llama(tmp_path / "model")
    done = tool("quantize", model, "-o", tmp_path / "out", "--overrides", value)
    assert done.returncode == 2, done.stderr
    assert "overrides" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_data_free_work_never_imports_torch(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    script = (
        "import sys; sys.argv = ['compress', 'run', sys.argv[1], '-o', sys.argv[2], "
        "'super-weights', 'prune:sparsity=0.3', 'quantize:bits=4,group=32', 'low-rank:rank=4']\n"
        "from compress.cli import main\n"
        "main()\n"
        "names = {'torch', 'transformers', 'onnx', 'onnxruntime', 'safetensors'}\n"
        "heavy = names & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, model, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", layers=40)
    with subprocess.Popen(
        [sys.executable, "-m", "compress", "inspect", model],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_change_nothing(tmp_path: Path, closed: str) -> None:
    """No file of the output takes the number of a stream, no print is an error."""
    model, out = tiny_llama(tmp_path / "model"), tmp_path / "out"
    words = shlex.join(["run", str(model), "-o", str(out), "quantize:bits=4,group=32"])
    done = shell(f"{TOOL} {words} {closed}")
    assert done.returncode == 0, done.stderr
    assert tool("verify", out).returncode == 0
    assert shell(f"{TOOL} inspect {tmp_path}/none {closed}").returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_stream_that_takes_nothing_is_named(tmp_path: Path) -> None:
    model, out = tiny_llama(tmp_path / "model"), tmp_path / "out"
    words = shlex.join(["run", str(model), "-o", str(out), "quantize:bits=4,group=32"])
    done = shell(f"{TOOL} {words} > /dev/full")
    assert done.returncode == 6
    assert done.stderr.splitlines() == [
        "error: cannot write to standard output: No space left on device",
        "hint: the command itself is done; send its output elsewhere",
    ]
    assert tool("verify", out).returncode == 0
    assert shell(f"{TOOL} inspect {tmp_path}/none 2> /dev/full").returncode == 2


def shell(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, shell=True, capture_output=True, text=True, check=False)


def test_streamed_text_ends_with_its_reader() -> None:
    script = (
        "import typer\nfrom compress.terminal import stream\n"
        "def run() -> None:\n    while True:\n        stream('word ' * 10000)\n"
        "typer.run(run)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_json_stays_alone_on_standard_output(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    body = tool_json("run", model, "-o", tmp_path / "out", "prune:sparsity=0.5")
    assert body["totals"]["sparsity"] == pytest.approx(0.5)
    assert any("hurts large language models" in w for w in body["warnings"])


def test_module_and_version() -> None:
    assert tool_process("--version").stdout.startswith("compress ")
    assert tool("kernels").returncode == 0
    bare = subprocess.run(
        [sys.executable, "-m", "compress"], capture_output=True, text=True, check=False,
        env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip
    assert "Commands" in bare.stdout + bare.stderr


@pytest.mark.skipif(
    os.environ.get("COMPRESS_REQUIRE_SHARED") != "1", reason="only where a compiler is certain"
)
def test_the_compiled_kernels_were_built() -> None:
    assert kernels.backend().name == "c++", kernels.backend().reason
