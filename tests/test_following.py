"""Quantizing for the inputs that compressed layers give: the model is walked through once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.calibrate.calibrate import Settings, calibrate
from compress.calibrate.data import text_ids
from compress.calibrate.inputs import batches_of
from compress.calibrate.statistics import Statistics, open_statistics
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.engines.blocks import BlockModel
from compress.errors import UsageError
from compress.evaluate.divergence import kl_of
from compress.following import follow
from compress.plan import Options, Plan, make_plan
from compress.recipe import Recipe, parse_pass
from compress.run import RunOptions, run, silent
from compress.trial import TrialCheckpoint

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("one_thread")]
WORD = "quantize:bits=2,group=32,on_indivisible=short,solver=obs"


@pytest.fixture(scope="module")
def model(shared_dir: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(shared_dir / "models" / "stories260k") as checkpoint:
        yield checkpoint


def planned(model: Checkpoint, word: str, statistics: Statistics | None = None) -> Plan:
    recipe = Recipe((parse_pass(word),))
    return make_plan(model, recipe, Options(), statistics, calibrated=statistics is None)


@pytest.fixture(scope="module")
def statistics(
    model: Checkpoint, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Statistics]:
    file = tmp_path_factory.mktemp("statistics") / "stats.safetensors"
    inputs = text_ids(shared_dir / "data" / "stories_calib.txt", model, length=128, samples=24)
    calibrate(planned(model, f"{WORD},follow=true"), inputs, file, Settings(fsync=False))
    with open_statistics(file) as opened:
        yield opened


def test_the_walk_measures_what_the_finished_model_meets(
    model: Checkpoint, statistics: Statistics, tmp_path: Path
) -> None:
    plan = follow(planned(model, f"{WORD},follow=true", statistics), tmp_path / "f", silent)
    assert plan.following is not None
    first = model.info("model.layers.0.self_attn.q_proj.weight")
    known = plan.following.of(first)
    assert np.allclose(known.cross_moment(), known.second_moment(), rtol=1e-4, atol=1e-6)
    last = model.info("model.layers.4.mlp.down_proj.weight")
    seen: list[torch.Tensor] = []
    runner = BlockModel(TrialCheckpoint(plan))
    batches = [
        runner.start({n: torch.from_numpy(v) for n, v in arrays.items()})
        for _, arrays in batches_of(statistics.inputs(), 2048)
    ]
    for index in range(runner.depth):
        with runner.loaded(index):
            if index == 4:
                module = runner.linears(index)[last.name]
                module.register_forward_pre_hook(lambda _, a: seen.append(a[0].reshape(-1, 172)))
            for batch in batches:
                runner.advance(index, batch)
    inputs = torch.cat(seen).double()
    moment = (inputs.T @ inputs / len(inputs)).numpy()
    assert np.allclose(plan.following.of(last).second_moment()[0], moment, rtol=1e-3, atol=1e-4)
    plan.following.close()


def test_following_lowers_the_divergence(
    model: Checkpoint, statistics: Statistics, shared_dir: Path, tmp_path: Path
) -> None:
    held = text_ids(shared_dir / "data" / "stories_eval.txt", model, length=128, samples=12)
    ids = held.arrays["input_ids"]
    alone = TrialCheckpoint(planned(model, WORD, statistics))
    plan = follow(planned(model, f"{WORD},follow=true", statistics), tmp_path / "f", silent)
    assert plan.following is not None
    assert kl_of(model, TrialCheckpoint(plan), ids) < 0.9 * kl_of(model, alone, ids)
    plan.following.close()


def test_a_run_follows_and_repeats_itself(
    model: Checkpoint, statistics: Statistics, tmp_path: Path
) -> None:
    written = []
    for name in ("a", "b"):
        plan = planned(model, f"{WORD},follow=true", statistics)
        run(plan, tmp_path / name, RunOptions(fsync=False))
        written.append((tmp_path / name / "model.compress.safetensors").read_bytes())
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"][: len(written)]
    assert written[0] == written[1]


def test_follow_needs_obs_and_inputs(model: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="follow=true needs solver=obs"):
        parse_pass("quantize:follow=true")
    plan = planned(model, f"{WORD},follow=true")
    with pytest.raises(UsageError, match="the statistics hold no inputs"):
        follow(plan, tmp_path / "f", silent)
