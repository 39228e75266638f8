"""Passes that use statistics of the inputs: masks, OBS codes, factors in the outputs' metric."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from statistics_files import correlated, moment, write_statistics

from compress.calibrate.statistics import Statistics, open_statistics
from compress.checkpoint import open_checkpoint
from compress.errors import InputError, UsageError
from compress.passes.base import Context, Pass
from compress.passes.low_rank import LowRank
from compress.passes.prune import Prune
from compress.passes.quantize import Quantize
from compress.plan import Options, make_plan
from compress.recipe import Recipe, parse_pass
from compress.solvers.input_masks import kept_of, obs_mask, row_quotas, wanda_mask
from compress.solvers.metric import Metric, balanced
from compress.solvers.output_error import output_error, output_errors
from compress.tensor import Outliers, Role, Tensor
from compress.testing import decide, make_tensor

NAME = "model.layers.0.mlp.down_proj.weight"
Values = NDArray[np.float32]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def weights(rng: np.random.Generator) -> Values:
    values = (rng.standard_t(5, (48, 160)) / 16).astype(np.float32)
    values[rng.random(values.shape) < 0.05] = 0
    return values


@pytest.fixture
def statistics(tmp_path: Path, rng: np.random.Generator) -> Statistics:
    inputs = correlated(rng, 1200, 160)
    return write_statistics(
        tmp_path / "stats.safetensors", {(NAME,): inputs[:900]}, {(NAME,): inputs[900:]}
    )


def apply(pass_: Pass, tensor: Tensor, statistics: Statistics) -> Tensor:
    context = Context(statistics=statistics.of(tensor.info))
    bound = pass_.bind(tensor.info, (), context)
    decided = decide(bound, [tensor])
    return decided.bind(tensor.info, (), context).apply(tensor)


def loss(made: Tensor, statistics: Statistics) -> float:
    error = made.decode() - made.source.astype(np.float32)
    return output_error(error, statistics.of(made.info).held_out())


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("score", ["wanda", "obs"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_counts_are_exact_and_zeros_stay(
    score: str, sparsity: float, weights: Values, statistics: Statistics
) -> None:
    tensor = make_tensor(NAME, weights)
    mask = apply(Prune(score=score, sparsity=sparsity), tensor, statistics).mask
    assert mask is not None
    assert np.count_nonzero(mask) == kept_of(weights.size, sparsity)
    assert not mask[weights == 0].any()


def test_wanda_ranks_within_rows_by_weight_times_input(
    weights: Values, statistics: Statistics
) -> None:
    tensor = make_tensor(NAME, weights)
    mask = apply(Prune(score="wanda", sparsity=0.5), tensor, statistics).mask
    assert mask is not None
    score = np.abs(weights) * np.sqrt(statistics.of(tensor.info).diagonal()[0])
    assert all(score[r][mask[r]].min() >= score[r][~mask[r]].max() for r in range(len(score)))
    assert set(mask.sum(axis=1)) == {80}


def test_wanda_of_row_tiles_is_wanda_of_the_whole(weights: Values, statistics: Statistics) -> None:
    tensor = make_tensor(NAME, weights[:, :157])
    diagonal = statistics.of(make_tensor(NAME, weights).info).diagonal()[:, :157]
    whole = wanda_mask(tensor.source, diagonal, row_quotas(0, 48, (48, 157), 0.5), None)
    parts = [
        wanda_mask(tensor.source[r : r + 7], diagonal, row_quotas(r, len(tensor.source[r : r + 7]),
                                                                  (48, 157), 0.5), None)
        for r in range(0, 48, 7)
    ]  # fmt: skip
    assert np.array_equal(whole, np.concatenate(parts))


def test_obs_mask_is_sparsegpts(weights: Values, statistics: Statistics) -> None:
    """Against the update written with dense inverses: remove, correct, invert what is left."""
    hessian = statistics.of(make_tensor(NAME, weights).info).second_moment()[0][:24, :24]
    values = weights[:3, :24].astype(np.float64)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(24)
    expected = np.ones(values.shape, bool)
    # One block: scores come from U of the whole inverse, before any correction.
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    order = np.argsort((values**2 / np.diag(upper) ** 2).ravel(), kind="stable")
    expected.ravel()[order[:36]] = False
    expected &= values != 0
    assert np.array_equal(obs_mask(weights[:3, :24], hessian, 0.5), expected)


@pytest.mark.parametrize("score", ["wanda", "obs"])
def test_patterns_and_protected_entries(
    score: str, weights: Values, statistics: Statistics
) -> None:
    rows, columns = np.array([3, 3, 9]), np.array([0, 1, 77])
    weights[rows, columns] = 1e-6
    outliers = Outliers(rows, columns, weights[rows, columns])
    tensor = make_tensor(NAME, weights).with_(outliers=outliers)
    mask = apply(Prune(score=score, pattern="2:4"), tensor, statistics).mask
    assert mask is not None
    assert mask[rows, columns].all()
    counts = mask.reshape(-1, 4).sum(axis=1)
    protected = np.zeros(mask.shape, int)
    protected[rows, columns] = 1
    assert (counts <= np.maximum(2, protected.reshape(-1, 4).sum(axis=1))).all()
    assert counts.max() == 2


def test_masks_by_inputs_lose_less_than_magnitude(weights: Values, statistics: Statistics) -> None:
    tensor = make_tensor(NAME, weights)
    codes = Quantize(bits=8, group=32, solver="obs")
    losses = {}
    for score in ("magnitude", "wanda", "obs"):
        pruned = apply(Prune(score=score, sparsity=0.6), tensor, statistics)
        losses[score] = loss(pruned, statistics), loss(apply(codes, pruned, statistics), statistics)
    assert losses["wanda"][0] < 0.7 * losses["magnitude"][0]
    assert losses["obs"][1] < losses["wanda"][1] < losses["magnitude"][1]


# ---------------------------------------------------------------- OBS codes


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"symmetric": False}, {"group": -1}])
def test_obs_lowers_the_error_of_outputs(
    options: dict[str, object], weights: Values, statistics: Statistics
) -> None:
    tensor = make_tensor(NAME, weights)
    common = {"bits": 3, "group": 32} | options
    rounded = apply(Quantize(**common), tensor, statistics)
    solved = apply(Quantize(**common, solver="obs"), tensor, statistics)
    assert loss(solved, statistics) < 0.6 * loss(rounded, statistics)
    assert solved.codes is not None and solved.codes.bits == 3
    assert solved.notes["squared_error"] > rounded.notes["squared_error"]  # what it pays with


def test_obs_keeps_the_mask_and_absorbs_pruning(weights: Values, statistics: Statistics) -> None:
    pruned = apply(Prune(score="obs", sparsity=0.5), make_tensor(NAME, weights), statistics)
    solved = apply(Quantize(bits=8, group=32, solver="obs"), pruned, statistics)
    assert pruned.mask is not None
    assert not solved.decode()[~pruned.mask].any()
    assert loss(solved, statistics) < 0.5 * loss(pruned, statistics)


def test_protected_entries_are_exempt(weights: Values, statistics: Statistics) -> None:
    weights[5, 17] = 40
    places = np.array([5]), np.array([17])
    tensor = make_tensor(NAME, weights)
    with_exact = tensor.with_(outliers=Outliers(*places, weights[places]))
    pass_ = Quantize(bits=4, group=32, solver="obs")
    exact, plain = apply(pass_, with_exact, statistics), apply(pass_, tensor, statistics)
    assert exact.decode()[5, 17] == 40
    assert exact.codes is not None and plain.codes is not None
    others = np.arange(48) != 5  # rows are swept on their own
    assert np.array_equal(exact.codes.values[others], plain.codes.values[others])
    assert abs(exact.codes.scale[5]).max() < 1 < abs(plain.codes.scale[5]).max()


def test_blocks_of_rows_have_inputs_of_their_own(tmp_path: Path, rng: np.random.Generator) -> None:
    """A grouped convolution: two groups with opposite inputs, each swept with its own."""
    inputs = np.stack([correlated(rng, 400, 36), correlated(rng, 400, 36)])
    statistics = write_statistics(tmp_path / "s.safetensors", {("c.weight",): inputs})
    values = rng.standard_normal((8, 36)).astype(np.float32)
    whole = make_tensor("c.weight", values, role=Role.CONV, shape=(8, 4, 3, 3))
    solved = apply(Quantize(bits=3, group=-1, solver="obs"), whole, statistics)
    assert solved.codes is not None
    for group in range(2):
        own = write_statistics(tmp_path / f"{group}.safetensors", {("g",): inputs[group]})
        part = make_tensor("g", values[4 * group : 4 * group + 4])
        alone = apply(Quantize(bits=3, group=-1, solver="obs"), part, own)
        assert alone.codes is not None
        assert np.array_equal(solved.codes.values[4 * group : 4 * group + 4], alone.codes.values)


# ---------------------------------------------------------------- factors


@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_metric_and_its_inverse(rng: np.random.Generator, damping: float) -> None:
    second = moment(correlated(rng, 200, 40))[0]
    error = rng.standard_normal((6, 40)).astype(np.float32)
    added = damping * np.trace(second) / 40 * np.eye(40)
    full, diagonal = Metric.full(second, damping), Metric.diagonal(np.diag(second), damping)
    assert full.loss(error) == pytest.approx(np.trace(error @ (second + added) @ error.T), rel=1e-3)
    diag = np.diag(np.diag(second)) + added
    assert diagonal.loss(error) == pytest.approx(np.trace(error @ diag @ error.T), rel=1e-3)
    for metric in (full, diagonal):
        assert np.allclose(metric.unwhiten(metric.whiten(error)), error, atol=2e-3)


def test_balanced_factors_have_the_same_product(rng: np.random.Generator) -> None:
    b, a = rng.standard_normal((5, 3)) * 100, rng.standard_normal((3, 7)) / 100
    b[:, 2] = 0
    left, right = balanced(b.astype(np.float32), a.astype(np.float32))
    assert np.allclose(left @ right, b @ a, atol=1e-5)
    assert np.allclose(np.linalg.norm(left, axis=0)[:2], np.linalg.norm(right, axis=1)[:2])


def test_full_metric_beats_diagonal_beats_plain(weights: Values, statistics: Statistics) -> None:
    coded = apply(Quantize(bits=3, group=32), make_tensor(NAME, weights), statistics)
    losses = [
        loss(apply(LowRank(rank=8, metric=metric), coded, statistics), statistics)
        for metric in ("full", "diag", "plain")
    ]
    assert losses[0] < 0.8 * losses[1] < 0.8 * losses[2]


def test_full_metric_is_the_best_of_its_rank(weights: Values, statistics: Statistics) -> None:
    """No other factors of the rank do better: the leading part of E S is optimal (QERA)."""
    tensor = make_tensor(NAME, weights)
    coded = apply(Quantize(bits=2, group=32), tensor, statistics)
    made = apply(LowRank(rank=4, metric="full"), coded, statistics)
    metric = Metric.full(statistics.of(tensor.info).second_moment()[0])
    singular = np.linalg.svd(metric.whiten(weights - coded.decode()), compute_uv=False)
    best = float((singular[4:].astype(np.float64) ** 2).sum())
    assert best <= metric.loss(weights - made.decode()) < 1.001 * best


def test_auto_takes_what_does_better_on_held_out_inputs(
    tmp_path: Path, rng: np.random.Generator, weights: Values
) -> None:
    """Of independent inputs the full metric fits noise, of correlated ones it knows more."""
    independent = rng.standard_normal((900, 160)) * np.exp(rng.standard_normal(160))
    for name, inputs, full in (
        ("independent", independent, 0.0),
        ("correlated", correlated(rng, 900, 160), 1.0),
    ):
        statistics = write_statistics(
            tmp_path / name, {(NAME,): inputs[:180]}, {(NAME,): inputs[180:]}
        )
        coded = apply(Quantize(bits=3, group=32), make_tensor(NAME, weights), statistics)
        made = apply(LowRank(rank=8, metric="auto"), coded, statistics)
        assert made.notes["full_metric"] == full


# ---------------------------------------------------------------- refusals


def test_what_is_refused(tmp_path: Path, weights: Values, statistics: Statistics) -> None:
    from safetensors.numpy import save_file

    model = tmp_path / "model.safetensors"
    save_file({NAME: weights, "model.layers.1.mlp.down_proj.weight": weights}, model)
    with open_checkpoint(model) as checkpoint:
        recipe = Recipe((parse_pass("quantize:bits=4,group=32,solver=obs"),))
        with pytest.raises(UsageError, match=r"quantize: needs statistics .*second_moment"):
            make_plan(checkpoint, recipe, Options())
        with pytest.raises(UsageError, match=r"layers\.1\.mlp\.down_proj.*no second_moment"):
            make_plan(checkpoint, recipe, Options(), statistics)
        make_plan(checkpoint, recipe, Options(), calibrated=True)
        with pytest.raises(UsageError, match="statistics of another model"):
            statistics.check_model(checkpoint)
    for word in ("prune:score=wanda,scope=tensor", "prune:score=obs,min_keep=10"):
        with pytest.raises(UsageError, match="has no meaning with score"):
            parse_pass(word)


def test_damaged_files_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    from safetensors.numpy import save_file

    from compress.calibrate.statistics import KEY, Record, Site

    info = make_tensor("w", rng.standard_normal((4, 8)).astype(np.float32)).info
    record = Record("f", "hf", (Site(0, ("w",), 10),), frozenset({"second_moment"}))
    for values, says in (
        (np.full((1, 8, 8), np.nan, np.float32), "not finite"),
        (np.ones((1, 8, 7), np.float32), r"is \[1, 8, 7\], not \[1, 8, 8\]"),
        (np.ones((1, 8, 8), np.float64), "not float32"),
    ):
        path = tmp_path / "s.safetensors"
        save_file({"site/0/second_moment": values}, path, {KEY: record.to_json()})
        with open_statistics(path) as opened, pytest.raises(InputError, match=says):
            opened.of(info).second_moment()
    save_file({"x": np.ones(2, np.float32)}, path, {KEY: '{"version": 1}'})
    with pytest.raises(InputError, match="record of statistics is damaged"):
        open_statistics(path)
    save_file({"x": np.ones(2, np.float32)}, path)
    with pytest.raises(UsageError, match="not a statistics file"):
        open_statistics(path)


def test_errors_of_outputs(rng: np.random.Generator) -> None:
    inputs = correlated(rng, 50, 12)
    error = rng.standard_normal((6, 12)).astype(np.float32)
    expected = np.square(error @ inputs.T).mean(axis=1)
    assert np.allclose(output_errors(error, moment(inputs)), expected, rtol=1e-4)
    stacked = np.stack([inputs, 2 * inputs])
    assert output_errors(error, moment(stacked))[3:] == pytest.approx(4 * expected[3:], rel=1e-4)
    diagonal = np.square(inputs).mean(axis=0)[None].astype(np.float32)
    assert np.allclose(output_errors(error, diagonal), np.square(error) @ diagonal[0], rtol=1e-4)


def test_fields_set_by_binding_are_no_options() -> None:
    for cls in (Prune, Quantize, LowRank):
        field = next(f for f in dataclasses.fields(cls) if f.name == "statistics")
        assert "help" not in field.metadata
