"""`compress run` with data: on the way or from a file, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from toolbox import tool, tool_json

from compress.calibrate.calibrate import Settings, calibrate
from compress.calibrate.data import text_ids
from compress.calibrate.statistics import open_statistics
from compress.checkpoint import open_checkpoint
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass
from compress.run import RunOptions, run

pytestmark = pytest.mark.model
PASS = "quantize:bits=3,group=32,on_indivisible=short,solver=obs"


@pytest.fixture(scope="module")
def model(shared_dir: Path) -> Path:
    return shared_dir / "models" / "stories260k"


@pytest.fixture(scope="module")
def text(shared_dir: Path) -> Path:
    return shared_dir / "data" / "stories_calib.txt"


@pytest.mark.usefixtures("one_thread")
def test_calibrating_on_the_way_is_calibrating_before(
    model: Path, text: Path, tmp_path: Path
) -> None:
    data = ["--text", text, "--samples", "4", "--length", "64"]
    body = tool_json("run", model, PASS, *data, "-o", tmp_path / "a" / "out")
    assert body["calibration"]["samples"] == 4
    assert body["calibration"]["tokens"] == 256
    assert "relative error of the outputs" in body["verdict"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]  # the statistics are gone
    again = tmp_path / "again"
    with open_checkpoint(model) as source:
        inputs = text_ids(text, source, length=64, samples=4, seed=0)
        recipe = Recipe((parse_pass(PASS),))
        file = tmp_path / "stats.safetensors"
        calibrate(make_plan(source, recipe, Options(), calibrated=True), inputs, file, Settings())
        with open_statistics(file) as statistics:
            run(make_plan(source, recipe, Options(), statistics), again, RunOptions(fsync=False))
    name = "model.compress.safetensors"
    assert (tmp_path / "a" / "out" / name).read_bytes() == (again / name).read_bytes()


def test_what_is_refused_before_any_work(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words, says in (
        ([PASS], "needs statistics of the model's inputs (second_moment)"),
        ([PASS, "--text", text, "--stats", text], "--stats and --text"),
        ([PASS, "--text", text, "--ids", text], "--text and --ids"),
        ([PASS, "--samples", "4"], "--samples: there are no calibration inputs"),
        ([PASS, "--ids", tmp_path / "none.npy"], "none.npy"),
        ([PASS, "--stats", model / "model.safetensors"], "not a statistics file"),
        (["quantize:follow=true", "--text", text], "follow=true needs solver=obs"),
    ):
        done = tool("run", model, *words, "-o", out)
        assert done.returncode in (2, 3), done.stderr
        assert says in done.stderr
        assert "Traceback" not in done.stderr
        assert not out.exists()


def test_statistics_of_another_model_are_refused(
    model: Path, text: Path, shared_dir: Path, tmp_path: Path
) -> None:
    from numpy.random import default_rng
    from statistics_files import write_statistics

    file = tmp_path / "stats.safetensors"
    name = "model.layers.0.self_attn.q_proj.weight"
    write_statistics(file, {(name,): default_rng(0).standard_normal((9, 64))}).close()
    done = tool("run", model, PASS, "--stats", file, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "statistics of another model" in done.stderr


def test_data_that_no_pass_wants_is_said_to_be_idle(
    model: Path, text: Path, tmp_path: Path
) -> None:
    body = tool_json(
        "run", model, "quantize:bits=4,group=32,on_indivisible=short",
        "--text", text, "-o", tmp_path / "out",
    )  # fmt: skip
    assert any("no pass of the recipe makes use" in warning for warning in body["warnings"])


def test_a_plan_needs_no_data(model: Path) -> None:
    body = tool_json("plan", model, PASS)
    assert body["exact"]
    assert any("a run needs a calibration (second_moment)" in note for note in body["notes"])
    surveyed = tool("plan", model, f"{PASS},bpw=3.5", "--survey")
    assert surveyed.returncode == 2
    assert "needs statistics" in surveyed.stderr
