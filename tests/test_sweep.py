"""Grids, the frontier and the winner by hand; a small sweep, interrupted and resumed."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toolbox import tiny_llama
from typer.testing import CliRunner

from compress import cli
from compress.checkpoint.destination import lock_file
from compress.errors import (
    BusyError,
    CompressError,
    GateError,
    InputError,
    Interrupted,
    UsageError,
)
from compress.evaluate.data import request_of
from compress.recipe import Gate, Recipe, parse_pass, read_recipe
from compress.report import human
from compress.sweep import choice, picture
from compress.sweep.command import Calibration, sweep_model
from compress.sweep.grid import parse_axis, points

pytestmark = pytest.mark.usefixtures("one_thread")


def _recipe(*words: str) -> Recipe:
    return Recipe(passes=tuple(parse_pass(word) for word in words))


def _points(recipe: Recipe, *axes: str) -> list[Any]:
    return points(recipe, [parse_axis(text, recipe) for text in axes])


# ------------------------------------------------------------ grids


def test_the_product_of_grids_with_passes_left_out() -> None:
    recipe = _recipe("quantize:bits=4", "low-rank:rank=8")
    made = _points(
        recipe, "quantize.bits=3,4", "low-rank.rank=off,16", "low-rank.factor-dtype=fp16"
    )
    found = [(p.recipe.passes[0].bits, len(p.recipe.passes)) for p in made]
    assert found == [(3, 1), (3, 2), (4, 1), (4, 2)]
    assert made[1].recipe.passes[1].rank == 16
    assert [p.label for p in made][:2] == [
        "bits=3 low-rank=off",
        "bits=3 rank=16 factor-dtype=fp16",
    ]
    # A pass that is left out has no options: its other axis makes no further points.
    assert len(_points(recipe, "low-rank.rank=off", "low-rank.seed=1,2,3")) == 1


def test_a_pass_that_stands_twice_is_named_by_its_number() -> None:
    recipe = _recipe('quantize:bits=4,targets=["*mlp*"]', 'quantize:bits=8,targets=["*attn*"]')
    made = _points(recipe, "quantize[1].bits=2,3")
    assert [[q.bits for q in p.recipe.passes] for p in made] == [[4, 2], [4, 3]]
    with pytest.raises(UsageError, match="2 passes called quantize"):
        _points(recipe, "quantize.bits=2")
    with pytest.raises(UsageError, match=r"no quantize\[2\]"):
        _points(recipe, "quantize[2].bits=2")


def test_values_are_yaml_and_a_bad_one_spoils_its_point_alone() -> None:
    recipe = _recipe("quantize:bits=4")
    made = _points(recipe, 'quantize.targets=["*mlp*","*attn*"],"*q_proj"', "quantize.bits=4,9")
    assert [p.recipe is None for p in made] == [False, True, False, True]
    assert "bits=9 is out of range" in made[1].error
    assert _points(recipe, "quantize.group_size=32")[0].recipe.passes[0].group == 32


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        ("quantize.bits", "expected pass.option=value"),
        ("bits=3", "expected pass.option=value"),
        ("quantize.bits=", "expected pass.option=value"),
        ("quantise.bits=3", "no pass quantise"),
        ("quantize.bit=3", "no option bit"),
        ("quantize.bits=&a 3", "anchors"),
    ],
)
def test_a_bad_grid_is_refused(axis: str, words: str) -> None:
    with pytest.raises(CompressError) as error:
        _points(_recipe("quantize:bits=4"), axis)
    assert words in error.value.message
    with pytest.raises(UsageError, match="given twice"):
        _points(_recipe("quantize:bits=4"), "quantize.group=32", "quantize.group_size=64")


# ------------------------------------------------------------ choice and picture


def _rows(*figures: tuple[float, float], metric: str = "kl") -> list[dict[str, Any]]:
    return [{"metrics": {"bytes": size, metric: value}} for size, value in figures]


def test_the_frontier_and_the_winner() -> None:
    rows = _rows((10, 0.5), (20, 0.1), (15, 0.6), (20, 0.2), (30, 0.1), (40, float("nan")))
    assert choice.frontier(rows, "kl") == [0, 1]
    assert choice.winner(rows, "kl", []) == 1  # the smaller of equals
    assert choice.winner(rows, "kl", [Gate.parse("kl>0.3")]) == 1
    assert choice.winner(rows, "kl", [Gate.parse("kl>0.55")]) == 0
    assert choice.winner(rows, "kl", [Gate.parse("kl>0.05")]) is None
    higher = _rows((10, 70), (20, 80), (15, 60), metric="accuracy")
    assert choice.frontier(higher, "accuracy") == [0, 1]
    assert choice.winner(higher, "accuracy", []) == 1


def test_the_picture_is_well_formed_and_its_labels_cover_nothing() -> None:
    rng = np.random.default_rng(0)
    dots = [
        picture.Dot(i, f'<b>&"bits"={i}', float(s), float(v), i < 4, i == 2)
        for i, (s, v) in enumerate(rng.uniform(0.001, 1, (40, 2)) * [1e6, 1])
    ]
    text = picture.draw([*dots, picture.Dot(40, "x", 5, float("nan"), False, False)], "<t>", "kl",
                        human)  # fmt: skip
    tree = ET.fromstring(text)
    names = [e.tag.partition("}")[2] for e in tree.iter()]
    assert names.count("circle") == 41  # and the ring around the best
    assert "1 without a finite value" in text
    assert "prefers-color-scheme: dark" in text
    width = {"start": 0.0, "middle": 0.5, "end": 1.0}
    boxes = []
    for e in tree.iter():
        if e.get("class") == "label":
            length = 6.6 * len(e.text or "")
            left = float(e.get("x", "")) - width[e.get("text-anchor", "")] * length
            boxes.append((left, float(e.get("y", "")), left + length))
    assert len(boxes) > 20
    for i, (left, y, right) in enumerate(boxes):
        for other_left, other_y, other_right in boxes[:i]:
            assert right <= other_left or other_right <= left or abs(y - other_y) >= 13


# ------------------------------------------------------------ a sweep


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("sweep") / "model", hidden=32, ffn=32, layers=1)


@pytest.fixture(scope="module")
def ids(model: Path) -> Path:
    path = model.parent / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 96, (6, 16)))
    return path


@pytest.fixture(scope="module")
def recipe(model: Path) -> Path:
    path = model.parent / "recipe.yaml"
    path.write_text(
        "passes:\n  - quantize: {bits: 4, group: 32, solver: obs}\n  - low-rank: {rank: 4}\n"
    )
    return path


GRID = ["quantize.bits=2,9,8", "low-rank.rank=off,2"]


def _sweep(recipe: Path, model: Path, ids: Path, out: Path, **options: Any) -> dict[str, Any]:
    calibration = model.parent / "calibration.npy"
    np.save(calibration, np.random.default_rng(1).integers(3, 96, (8, 16)))
    data = Calibration(ids=calibration)
    return sweep_model(recipe, model, GRID, out, request_of(ids, None, None), data, **options)


def test_a_sweep_stops_and_goes_on(
    model: Path, ids: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep"
    calibrations = []
    from compress.sweep import collect

    real = collect.calibrate
    monkeypatch.setattr(collect, "calibrate", lambda *a: calibrations.append(1) or real(*a))

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("point 5 of 6"):
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        _sweep(recipe, model, ids, out, progress=stop)
    assert sorted(p.name for p in out.iterdir()) == ["results.json", "stats.safetensors"]
    first = json.loads((out / "results.json").read_bytes())["points"]
    assert [row["metrics"] is not None for row in first] == [True, True, False, False]
    with pytest.raises(UsageError, match="exists"):
        _sweep(recipe, model, ids, out)

    ran = []

    def watch(what: str, done: int, total: int) -> None:
        ran.append(what.partition(":")[0])

    bound = first[0]["metrics"]["kl"] / 2  # of 2 bits
    gate = f"kl>{bound!r}"
    (out / ".point-killed" / "out.partial").mkdir(parents=True)
    body = _sweep(recipe, model, ids, out, resume=True, fail_if=[gate], progress=watch)
    assert {title for title in ran if title.startswith("point")} == {
        "point 5 of 6", "point 6 of 6",
    }  # fmt: skip
    assert calibrations == [1]
    assert body["points"][0]["metrics"] == first[0]["metrics"]
    assert "bits=9 is out of range" in body["points"][2]["error"]
    sizes = {row["label"]: row["metrics"]["bytes"] for row in body["points"] if row["metrics"]}
    quality = {row["label"]: row["metrics"]["kl"] for row in body["points"] if row["metrics"]}
    assert sizes["bits=2 low-rank=off"] < sizes["bits=8 low-rank=off"] < sizes["bits=8 rank=2"]
    assert quality["bits=2 low-rank=off"] > quality["bits=8 low-rank=off"]
    best = read_recipe(out / "best.yaml")
    assert [p.name for p in best.passes] == ["quantize"]
    assert best.passes[0].bits == 8  # type: ignore[attr-defined]
    assert best.gates == (Gate("kl", ">", bound),)
    assert ET.parse(out / "sweep.svg").getroot().tag.endswith("svg")
    assert not [p for p in out.iterdir() if p.name.startswith(".point")]

    other = tmp_path / "other.npy"
    np.save(other, np.full((2, 16), 7))
    with pytest.raises(UsageError, match="another model, data or version"):
        _sweep(recipe, model, other, out, resume=True)


def test_a_second_sweep_of_one_folder_is_turned_away(
    model: Path, ids: Path, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    seen = []

    def again(what: str, done: int, total: int) -> None:
        if what.startswith("point 5 of 6") and not seen:
            seen.append(sorted(out.rglob("*")))
            for resume in (True, False):
                with pytest.raises(BusyError, match="another run is writing"):
                    _sweep(recipe, model, ids, out, resume=resume)
            assert sorted(out.rglob("*")) == seen[0]

    body = _sweep(recipe, model, ids, out, progress=again)
    assert seen
    assert body["points"][4]["metrics"] is not None
    assert not lock_file(out).exists()


@pytest.fixture(scope="module")
def finished(
    model: Path, ids: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What `results.json` of a whole sweep holds."""
    return _sweep(recipe, model, ids, tmp_path_factory.mktemp("finished") / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": [1]}, {"metrics": {}}, {"metrics": {"bytes": "x"}}, {"metrics": 7},
        {"label": None}, {"label": [1]}, {"settings": 3}, {"key": None}, {"error": "no"},
    ],
    ids=str,
)  # fmt: skip
def test_results_that_were_changed_are_refused(
    model: Path, ids: Path, recipe: Path, tmp_path: Path, finished: dict[str, Any],
    change: dict[str, Any],
) -> None:  # fmt: skip
    out = tmp_path / "sweep"
    out.mkdir()
    body = json.loads(json.dumps(finished))
    body["points"][0] |= change
    (out / "results.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match="not the results of a sweep"):
        _sweep(recipe, model, ids, out, resume=True)
    assert [path.name for path in out.iterdir()] == ["results.json"]


def test_a_folder_that_holds_no_sweep_is_left_alone(
    model: Path, ids: Path, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    (out / ".point-dead").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"holds no sweep \(no results.json\)"):
        _sweep(recipe, model, ids, out, resume=True)
    assert (out / ".point-dead").exists()


def test_files_of_a_sweep_are_not_written_through_links(
    model: Path, ids: Path, recipe: Path, tmp_path: Path, finished: dict[str, Any]
) -> None:
    out, precious = tmp_path / "sweep", tmp_path / "precious"
    out.mkdir()
    precious.write_text("precious")
    (out / "results.json").write_text(json.dumps(finished))
    for name in ("sweep.svg", "best.yaml"):
        (out / name).symlink_to(precious)
    _sweep(recipe, model, ids, out, resume=True)
    assert precious.read_text() == "precious"
    assert not (out / "sweep.svg").is_symlink() and not (out / "best.yaml").is_symlink()


def test_a_sweep_that_is_killed_in_its_first_point_can_go_on(
    model: Path, ids: Path, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("point 1 of 6"):
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        _sweep(recipe, model, ids, out, progress=stop)
    (out / ".point-dead").mkdir()
    body = _sweep(recipe, model, ids, out, resume=True)
    assert body["points"][0]["metrics"] is not None
    assert not (out / ".point-dead").exists()


def test_no_point_passes(model: Path, ids: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe_alone = tmp_path / "r.yaml"
    recipe_alone.write_text("passes: [quantize: {bits: 4, group: 32}]")
    arguments = ["sweep", recipe_alone, model, "--grid", "quantize.bits=2,8", "--eval-text", ids,
                 "--fail-if", "kl>0", "-o", out]  # fmt: skip
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert isinstance(done.exception, GateError)
    assert "no point passes the gates: kl>0" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert not (out / "best.yaml").exists()
    assert len(json.loads((out / "results.json").read_bytes())["frontier"]) == 2


def test_bad_options_are_refused(model: Path, ids: Path, recipe: Path, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "out"]
    grid = ["--grid", "quantize.bits=2,3"]
    for arguments, words in (
        ([*grid], "no output directory"),
        ([*out, "--eval-text", ids], "no grid"),
        ([*out, *grid], "nothing to judge"),
        ([*out, *grid, "--eval-text", ids, "--metric", "cosine"], "--metric cosine"),
        ([*out, *grid, "--eval-text", ids, "--fail-if", "spearman<1"], "is not computed"),
        ([*out, *grid, "--eval-text", ids, "--format", "zip"], "--format zip"),
        ([*out, *grid, "--eval-text", ids], "every point is refused"),  # it needs statistics
        (["-o", model / "x", *grid, "--eval-text", ids], "overlap"),
    ):
        typed = ["sweep", str(recipe), str(model), *map(str, arguments)]
        result = CliRunner().invoke(cli.app, typed)
        assert isinstance(result.exception, CompressError), result.exception
        assert (result.exception.exit_code, words in result.exception.message) == (2, True)
    assert not (tmp_path / "out").exists()
