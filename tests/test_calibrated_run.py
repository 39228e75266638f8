"""`compress run` with data: on the way or from a file, and what is refused before any work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from statistics_files import correlated, moment
from toolbox import tool, tool_json

from compress.calibrate.calibrate import Settings, calibrate
from compress.calibrate.collect import SiteSums
from compress.calibrate.data import text_ids
from compress.calibrate.statistics import KEY, Record, Site, open_statistics
from compress.calibrate.writer import StatisticsWriter
from compress.checkpoint import open_checkpoint
from compress.errors import InputError, show
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass
from compress.run import RunOptions, run
from compress.testing import make_tensor

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


# ---------------------------------------------------------------- statistics that cannot be


def _with(change: Callable[[NDArray[np.float32]], None]) -> NDArray[np.float32]:
    values = moment(correlated(np.random.default_rng(3), 40, 8))
    change(values)
    return values


def _put(*places: Any, value: float) -> Callable[[NDArray[np.float32]], None]:
    def change(values: NDArray[np.float32]) -> None:
        for place in places:
            values[place] = value

    return change


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        ("second_moment", _with(_put((0, 3, 3), value=-1)), "-1 on its diagonal"),
        ("held_out", _with(_put((0, 3, 3), value=-1)), "-1 on its diagonal"),
        ("second_moment", _with(_put((0, 2, 5), value=0.1)), "is not symmetric"),
        ("held_out", _with(_put((0, 2, 5), value=0.1)), "is not symmetric"),
        ("second_moment", _with(_put((0, 2, 5), (0, 5, 2), value=1e4)), "beside its diagonal"),
        ("second_moment", _with(_put((0, 2, 2), value=3e38)), r"reaches 3e\+38"),
        ("diagonal", np.full((1, 8), -0.5, np.float32), "holds -0.5"),
        ("diagonal", np.full((1, 8), 3e38, np.float32), r"reaches 3e\+38"),
        ("mean", np.full((1, 8), -3e38, np.float32), r"reaches 3e\+38"),
        ("mean", np.full((1, 8), -np.inf, np.float32), "not finite"),
        ("output_fisher", np.full(4, -1e-9, np.float32), "holds -1e-09"),
        ("output_fisher", np.full(4, np.nan, np.float32), "not finite"),
    ],
)
def test_statistics_that_no_inputs_have(
    tmp_path: Path, kind: str, values: NDArray[np.float32], says: str
) -> None:
    site = Site(0, ("w",), 10, 10)
    record = Record("f", "hf", (site,), frozenset({kind}))
    name = "tensor/w/output_fisher" if kind == "output_fisher" else site.key(kind)
    path = tmp_path / "bad.safetensors"
    save_file({name: values}, path, {KEY: record.to_json()})
    info = make_tensor("w", np.ones((4, 8), np.float32)).info
    with open_statistics(path) as opened, pytest.raises(InputError) as caught:
        getattr(opened.of(info), kind)()
    assert caught.value.message.startswith(f"{show(str(path))}: {name} ")
    assert re.search(says, caught.value.message)
    assert "damaged" in (caught.value.hint or "")


@pytest.mark.parametrize("scale", [1e-24, 1e-19, 1.0, 1e9])
def test_what_is_measured_passes(tmp_path: Path, scale: float) -> None:
    """Means of inputs that float32 holds badly: squares underflow where products do not."""
    values = correlated(np.random.default_rng(1), 60, 300).astype(np.float32)
    values[:, ::2] *= np.float32(scale)
    values[:, 7] = 0
    kinds = frozenset({"second_moment", "held_out"})
    sums = SiteSums(kinds, 300)
    sums.add(torch.from_numpy(values))
    sums.add(torch.from_numpy(values[:1]), held_out=True)
    with StatisticsWriter(tmp_path / "s.safetensors", room=4096, fsync=False) as writer:
        writer.add_site(["w"], sums)
        writer.finish(Record("f", "hf", writer.sites(), kinds))
    info = make_tensor("w", np.ones((4, 300), np.float32)).info
    with open_statistics(tmp_path / "s.safetensors") as opened:
        assert opened.of(info).second_moment().shape == (1, 300, 300)
        assert opened.of(info).held_out().min() < 0 or scale < 1e-20


def test_a_model_that_overflows_is_named_when_it_is_measured(tmp_path: Path) -> None:
    sums = SiteSums(frozenset({"second_moment"}), 3)
    sums.add(torch.tensor([[1.0, 2e12, 3.0]]))
    with (
        pytest.raises(InputError, match=r"tensor a\\nb: .* of its inputs reaches 4e\+24"),
        StatisticsWriter(tmp_path / "s.safetensors", room=4096, fsync=False) as writer,
    ):
        writer.add_site(["a\nb"], sums)
    assert list(tmp_path.iterdir()) == []


GOOD_SITE = [0, ["w"], 10, 0, 1]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *[(place, value) for place in (0, 2, 3) for value in (-5, 1e308, 1.0, True, "1", 1 << 64)],
        *[(4, value) for value in (0, -1, 1.0, True, None)],
        *[(1, value) for value in ("abc", [1], None)],
    ],
)
def test_records_that_nobody_wrote(tmp_path: Path, place: int, value: object) -> None:
    path = tmp_path / "s.safetensors"
    for changed in (False, True):
        site: list[Any] = list(GOOD_SITE)
        if changed:
            site[place] = value
        body = json.loads(Record("f", "hf", (), frozenset()).to_json()) | {"sites": [site]}
        save_file({"x": np.ones(2, np.float32)}, path, {KEY: json.dumps(body)})
        if not changed:
            open_statistics(path).close()
            continue
        with pytest.raises(InputError, match="record of statistics is damaged") as caught:
            open_statistics(path)
        assert show(str(path)) in caught.value.message


def test_blocks_that_do_not_divide_the_rows(tmp_path: Path) -> None:
    record = Record("f", "hf", (Site(0, ("w",), 10, 0, 3),), frozenset({"diagonal"}))
    save_file(
        {"site/0/diagonal": np.ones((3, 8), np.float32)},
        tmp_path / "s.safetensors",
        {KEY: record.to_json()},
    )
    info = make_tensor("w", np.ones((4, 8), np.float32)).info
    with (
        open_statistics(tmp_path / "s.safetensors") as opened,
        pytest.raises(InputError, match="4 rows are not 3 blocks"),
    ):
        opened.of(info).diagonal()


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"input_ids": np.array([[1, 2, 600]], np.int32)}, "600 is out of .* vocabulary of 512"),
        ({"input_ids": np.array([[1, 2, -7]], np.int32)}, "-1 fills up"),
        ({"input_ids": np.array([[1, -1, 3]], np.int32)}, "-1 fills up"),
        ({"input_ids": np.array([[-1, -1]], np.int32)}, "-1 fills up"),
        ({"input_ids": np.ones((2, 3), np.float32)}, "ids are float32"),
        ({"input_ids": np.ones(3, np.int32)}, r"ids are int32 \[3\]"),
        ({"input_ids": np.ones((0, 3), np.int32)}, r"ids are int32 \[0, 3\]"),
        ({"input_ids": np.ones((1, 5000), np.int32)}, "of 5,000 tokens, the model has 512"),
        ({"images": np.ones((2, 4, 4, 3), np.float32)}, "images are float32"),
        ({"images": np.ones((2, 4, 4), np.uint8)}, r"images are uint8 \[2, 4, 4\]"),
        (
            {"images": np.ones((2, 4, 4, 3), np.uint8), "labels": np.ones(3, np.int64)},
            r"labels are int64 \[3\], not 2",
        ),
        ({"other": np.ones(3, np.int32)}, "neither token ids nor images"),
        ({"x": np.ones(3, np.int32)}, "neither token ids nor images"),
    ],
)
def test_inputs_that_the_model_cannot_take(
    model: Path, tmp_path: Path, arrays: dict[str, Any], says: str
) -> None:
    path = tmp_path / "given.safetensors"
    with open_checkpoint(model) as checkpoint:
        record = Record(checkpoint.sample_hash(), "hf", (), frozenset({"inputs"}))
        spelled = {n if n == "x" else f"inputs/{n}": a for n, a in arrays.items()}
        save_file(spelled, path, {KEY: record.to_json()})
        with open_statistics(path) as opened, pytest.raises(InputError, match=says) as caught:
            opened.check_model(checkpoint)
            opened.inputs()
    assert caught.value.message.startswith(f"{show(str(path))}: ")


def test_a_pass_does_not_take_every_weight_for_useless(model: Path, tmp_path: Path) -> None:
    """Negative means of squares made the scores of all weights zero, and the output empty."""
    name = "model.layers.0.self_attn.q_proj.weight"
    with open_checkpoint(model) as checkpoint:
        fingerprint = checkpoint.sample_hash()
    record = Record(fingerprint, "hf", (Site(0, (name,), 10),), frozenset({"diagonal"}))
    path = tmp_path / "s.safetensors"
    save_file({"site/0/diagonal": -np.ones((1, 64), np.float32)}, path, {KEY: record.to_json()})
    word = f"prune:sparsity=0.5,score=wanda,targets={name}"
    done = tool("run", model, word, "--stats", path, "-o", tmp_path / "out")
    assert done.returncode == 3
    assert "holds -1" in done.stderr
    assert "s.safetensors" in done.stderr
    assert not (tmp_path / "out").exists()
