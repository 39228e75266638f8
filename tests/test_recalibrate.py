"""`recalibrate`: its closed forms, its gates, and the whole way from a recipe to the output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toolbox import write_safetensors
from torch import nn
from typer.testing import CliRunner

from compress import cli
from compress.calibrate.inputs import read_images
from compress.calibrate.statistics import INPUTS, KEY, Record, Statistics, open_statistics
from compress.checkpoint import open_checkpoint
from compress.engines.corrections import Corrector, Settings, Share, find_units, watch
from compress.engines.module import load_module, run_images
from compress.errors import Interrupted, UsageError
from compress.output import open_any
from compress.plan import Options, Plan, make_plan
from compress.recipe import Recipe, parse_pass
from compress.report import Report
from compress.run import RunOptions, run
from compress.solvers.channel_corrections import Moments, least_squares_gain, match_batch_norm
from compress.tensor import Role, TensorInfo

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE = f"{Path(__file__).parent / 'resnet_cifar.py'}"
SMALL, REAL = f"{MODULE}:resnet8", f"{MODULE}:resnet20"


# ---------------------------------------------------------------- closed forms


def drawn(seed: int, rows: int = 4000, channels: int = 5) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    scale, shift = np.exp(rng.standard_normal(channels)), rng.standard_normal(channels)
    return torch.from_numpy((rng.standard_normal((rows, channels)) * scale + shift).astype("f4"))


def test_moments_of_parts_are_those_of_the_whole() -> None:
    rows = drawn(0)
    parts = Moments.of(rows[:0]).with_(Moments.of(rows[:700])).with_(Moments.of(rows[700:]))
    assert parts.count == 4000
    np.testing.assert_allclose(parts.mean, rows.double().mean(0), rtol=1e-6)
    np.testing.assert_allclose(parts.variance, rows.double().var(0, unbiased=False), rtol=1e-6)


def matched(dense: torch.Tensor, now: torch.Tensor) -> tuple[nn.BatchNorm1d, torch.Tensor]:
    """A BatchNorm for `dense`, and its outputs for `now` once it is matched."""
    norm = nn.BatchNorm1d(5).eval()
    with torch.no_grad():
        for own, values in zip(norm.state_dict().values(), drawn(9, 4).abs() + 0.1, strict=False):
            own.copy_(values)
        deviation = (norm.running_var.double() + norm.eps).sqrt()
        gain, bias = match_batch_norm(
            norm.weight.double(), norm.bias.double(), norm.running_mean.double(), deviation,
            Moments.of(dense), Moments.of(now),
        )  # fmt: skip
        made = (now - norm.running_mean) / deviation * gain + bias
    return norm, made


def test_a_matched_batch_norm_gives_the_dense_means_and_deviations() -> None:
    dense, now = drawn(1), drawn(2)
    norm, made = matched(dense, now)
    wanted = Moments.of(norm(dense).detach())
    np.testing.assert_allclose(Moments.of(made).mean, wanted.mean, atol=1e-5)
    np.testing.assert_allclose(Moments.of(made).variance, wanted.variance, rtol=1e-4)


def test_a_channel_that_died_is_shifted_and_not_blown_up() -> None:
    dense, now = drawn(1), drawn(2)
    now[:, 3] = 0.25
    norm, made = matched(dense, now)
    np.testing.assert_allclose(made[:, 3], float(norm(dense).detach()[:, 3].mean()), atol=1e-5)


def test_the_gain_is_that_of_least_squares() -> None:
    now, noise = drawn(1), drawn(2)
    dense = 1.3 * now + 0.1 * noise
    factor = least_squares_gain([dense[:100], dense[100:]], [now[:100], now[100:]])
    for channel in range(5):
        a, b = now[:, channel : channel + 1].numpy(), dense[:, channel].numpy()
        np.testing.assert_allclose(float(factor[channel]), np.linalg.lstsq(a, b)[0][0], rtol=1e-5)
    assert least_squares_gain([dense], [torch.zeros_like(now)]).tolist() == [1] * 5


# ---------------------------------------------------------------- single layers


class GemmaNorm(nn.Module):
    """Multiplies by 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def corrected(dense: nn.Module, now: nn.Module, batches: int, **more: Any) -> Corrector:
    """The corrector after it has gone over two models on the same inputs."""

    def stored(name: str) -> TensorInfo | None:
        return TensorInfo(name, "f", "F32", tuple(now.state_dict()[name].shape), 0, role=Role.BIAS)

    corrector = Corrector(Settings(**more.get("settings", {})))
    x = drawn(3, 40).reshape(8, 5, 5)
    if batches == 1:
        given, shares = [x], [Share(8, 6)]
    else:
        given, shares = [x[:3], x[3:6], x[6:]], [Share(3, 3), Share(3, 3), Share(2, 0)]
    units = find_units(dense.eval(), now.eval(), stored, corrector.settings)
    order = watch(units, lambda n: dense(given[n]), shares)
    corrector.correct(order, lambda n: now(given[n]), shares, more.get("judge"))
    return corrector


@pytest.mark.parametrize("batches", [1, 3])
def test_layers_are_corrected_one_behind_the_other(batches: int) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), GemmaNorm())
    now = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), GemmaNorm())
    now.load_state_dict(dense.state_dict())
    with torch.no_grad():
        now[0].bias += 0.3
        now[2].weight *= 0.9
        now[3].weight += 0.2
    done = corrected(dense, now, batches)
    assert [j.unit for j in done.judged if j.kept] == ["0", "2", "3"]
    np.testing.assert_allclose(done.values["0.bias"], dense[0].bias.detach(), atol=1e-6)
    assert all(j.after < j.before for j in done.judged)
    assert done.values["3.weight"].mean() < 0.15


@pytest.mark.parametrize("batches", [1, 3])
def test_equal_layers_stay_bit_identical(batches: int) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), GemmaNorm())
    now = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), GemmaNorm())
    now.load_state_dict(dense.state_dict())
    for settings in ({}, {"gate": False}, {"estimate": True}, {"estimate": True, "gate": False}):
        done = corrected(dense, now, batches, settings=settings)
        assert (done.values, done.judged) == ({}, [])
        assert done.units == 3


def test_a_correction_that_does_not_help_what_follows_is_taken_back() -> None:
    torch.manual_seed(0)
    dense, now = nn.Sequential(nn.Linear(5, 5)), nn.Sequential(nn.Linear(5, 5))
    before = now[0].bias.detach().clone()
    errors = iter([1.0, 1.0])
    done = corrected(dense, now, 3, judge=lambda: next(errors))
    assert done.values == {} and torch.equal(now[0].bias, before)
    assert [(j.before, j.after, j.kept) for j in done.judged] == [(1.0, 1.0, False)]
    errors = iter([1.0, 1.0])
    ungated = corrected(dense, now, 3, judge=lambda: next(errors), settings={"gate": False})
    assert list(ungated.values) == ["0.bias"] and not torch.equal(now[0].bias, before)


def test_a_layer_that_is_called_twice_is_left_alone() -> None:
    shared, other = nn.Linear(5, 5), nn.Linear(5, 5)
    dense, now = nn.Sequential(shared, shared), nn.Sequential(other, other)
    assert corrected(dense, now, 1).units == 0


# ---------------------------------------------------------------- the whole way


@dataclass(frozen=True)
class Case:
    model: Path
    images: Path
    folder: Path

    def command(self, *words: str, out: str = "out") -> tuple[Path, dict[str, Any]]:
        """`compress run` with images, in this process; the output and its report."""
        path = self.folder / out
        images = ("--images", str(self.images), "--module", SMALL)
        arguments = ["run", str(self.model), "-o", str(path), *images, *words, "--json"]
        done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return path, json.loads((path / "report.json").read_text())


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A small ResNet whose BatchNorms know their inputs, as after training."""
    import resnet_cifar

    torch.manual_seed(0)
    model = resnet_cifar.resnet8()
    images = np.random.default_rng(0).integers(0, 255, (30, 12, 12, 3), dtype=np.uint8)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
            norm.momentum = None
        model(resnet_cifar.preprocess(torch.from_numpy(images)))
    folder = tmp_path_factory.mktemp("recalibrate")
    tensors = {f"module.{n}": v.numpy() for n, v in model.state_dict().items()}
    write_safetensors(folder / "m.safetensors", tensors)
    np.savez(folder / "images.npz", images=images)
    return Case(folder / "m.safetensors", folder / "images.npz", folder)


CHAIN = ("prune:sparsity=0.6", "recalibrate")


def test_a_recipe_of_pruning_and_recalibration_goes_the_whole_way(case: Case) -> None:
    out, report = case.command(*CHAIN)
    facts = next(p["facts"] for p in report["passes"] if p["name"] == "recalibrate")
    assert facts["layers"] == 8 and facts["samples"] == 24 and facts["held_out"] == 6
    assert facts["output_error_after"] < facts["output_error_before"]
    rows = {r["name"]: r for r in report["tensors"]}
    with open_any(out) as made, open_checkpoint(case.model) as source:
        differ = {
            i.name
            for i in source.infos()
            if not np.array_equal(made.read(i), source.read(i)) and len(i.shape) == 1
        }
        norms = {n for n in differ if ".bn" in n}
        assert norms and not any("running" in n for n in differ)
        assert {n for n, r in rows.items() if r["estimated"]} == differ
        assert facts["tensors_changed"] == len(differ)
    for words in (["verify", str(out)], ["verify", str(out), "--source", str(case.model)]):
        done = CliRunner().invoke(cli.app, words)
        assert done.exit_code == 0, done.output
    plain = case.folder / "plain"
    assert CliRunner().invoke(cli.app, ["unpack", str(out), "-o", str(plain)]).exit_code == 0
    with open_any(out) as made, open_checkpoint(plain) as unpacked:
        for info in unpacked.infos():
            assert np.array_equal(unpacked.read(info), made.read(made.info(info.name)))


def test_a_healthy_model_stays_bit_identical_and_the_report_says_so(case: Case) -> None:
    out, report = case.command("recalibrate", out="healthy")
    (facts,) = (p["facts"] for p in report["passes"])
    assert facts["tensors_changed"] == 0
    assert facts["notes"] == ["nothing to correct: the weights are the dense model's own"]
    with open_any(out) as made, open_checkpoint(case.model) as source:
        for info in source.infos():
            assert bytes(made.read_bytes(info, 0, info.nbytes)) == bytes(
                source.read_bytes(info, 0, info.nbytes)
            )


def test_vectors_that_were_corrected_are_rounded_with_the_untouched(case: Case) -> None:
    out, _ = case.command(*CHAIN, "--untouched", "bf16", out="narrow")
    whole, _ = case.command(*CHAIN, out="whole")
    name = "module.bn1.weight"
    with open_any(out) as narrow, open_any(whole) as wide:
        values = narrow.read(narrow.info(name))
        exact = torch.from_numpy(wide.read(wide.info(name)))
    assert np.array_equal(values, exact.to(torch.bfloat16).float().numpy())


def test_only_targets_are_rewritten_and_only_what_was_asked(case: Case) -> None:
    _, report = case.command(CHAIN[0], "recalibrate:targets=*layer3*", out="few")
    changed = [r["name"] for r in report["tensors"] if r["estimated"]]
    assert changed and all("layer3" in name for name in changed)
    _, report = case.command(CHAIN[0], "recalibrate:what=bias", out="bias")
    assert [r["name"] for r in report["tensors"] if r["estimated"]] == ["module.linear.bias"]
    _, report = case.command(CHAIN[0], "recalibrate:what=scale", out="none")
    assert report["passes"][1]["facts"]["notes"] == [
        "nothing to correct: the model has no norm with a gain and no bias"
    ]


def test_statistics_may_be_estimated_anew_instead(case: Case) -> None:
    _, report = case.command(CHAIN[0], "recalibrate:bn=estimate,what=bn,gate=false", out="estimate")
    changed = [r["name"] for r in report["tensors"] if r["estimated"]]
    assert len(changed) >= 12 and all("running_" in name for name in changed)


def statistics(case: Case, kinds: frozenset[str] = frozenset({INPUTS})) -> Statistics:
    from safetensors.numpy import save_file

    path = case.folder / f"stats{len(kinds)}.safetensors"
    with open_checkpoint(case.model) as checkpoint:
        record = Record(checkpoint.sample_hash(), "module", (), kinds)
    arrays = {"inputs/images": read_images(case.images).arrays["images"]}
    save_file(arrays if kinds else {"nothing": np.zeros(1)}, path, {KEY: record.to_json()})
    return open_statistics(path)


def planned(case: Case, checkpoint: Any, words: tuple[str, ...], known: Statistics | None) -> Plan:
    options = Options(jobs=1, module=SMALL, max_shard_bytes=4096)
    return make_plan(checkpoint, Recipe(tuple(map(parse_pass, words))), options, known)


def test_an_interrupted_run_goes_on_to_the_same_output(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import run as module

    def go(out: str, **options: Any) -> Report:
        with open_checkpoint(case.model) as checkpoint, statistics(case) as known:
            plan = planned(case, checkpoint, CHAIN, known)
            return run(plan, case.folder / out, RunOptions(**options))

    go("at-once")
    written = module._write_shard

    def stop(plan: Plan, shard: Any, number: int, *rest: Any) -> Any:
        if number == 2:
            raise Interrupted(2)
        return written(plan, shard, number, *rest)

    monkeypatch.setattr(module, "_write_shard", stop)
    with pytest.raises(Interrupted):
        go("resumed")
    numbers: list[int] = []

    def count(plan: Plan, shard: Any, number: int, *rest: Any) -> Any:
        numbers.append(number)
        return written(plan, shard, number, *rest)

    monkeypatch.setattr(module, "_write_shard", count)
    go("resumed", resume=True)
    assert numbers[0] == 2, "the first two shards were kept"
    names = sorted(p.name for p in (case.folder / "at-once").glob("*.safetensors"))
    assert len(names) > 3
    for name in names:
        whole, resumed = (case.folder / out / name for out in ("at-once", "resumed"))
        assert whole.read_bytes() == resumed.read_bytes()


@pytest.mark.parametrize(
    ("words", "kinds", "message"),
    [
        (("recalibrate", "prune:sparsity=0.5"), {INPUTS}, "recalibrate before prune"),
        (("recalibrate",), None, "needs statistics of the model's inputs"),
        (("recalibrate",), set(), "holds no inputs to run"),
        (("recalibrate:what=batch",), {INPUTS}, "what: unknown value batch"),
        (("recalibrate:targets=*conv1.weight",), {INPUTS}, "not norms or biases"),
        (("recalibrate:bn=guess",), {INPUTS}, "bn: unknown value guess"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    case: Case, words: tuple[str, ...], kinds: set[str] | None, message: str
) -> None:
    known = None if kinds is None else statistics(case, frozenset(kinds))
    with open_checkpoint(case.model) as checkpoint, pytest.raises(UsageError, match=message):
        planned(case, checkpoint, words, known)


def test_the_plan_names_the_pass_and_leaves_the_bytes_as_they_are(case: Case) -> None:
    with open_checkpoint(case.model) as checkpoint, statistics(case) as known:
        alone = planned(case, checkpoint, CHAIN[:1], None)
        plan = planned(case, checkpoint, CHAIN, known)
        by_name = {t.info.name: t.terms for t in plan.tensors}
    assert by_name["module.bn1.weight"].passes == ("recalibrate",)
    assert by_name["module.conv1.weight"].passes == ("prune",)
    assert plan.layout(1).weight_bytes == alone.layout(1).weight_bytes


# ---------------------------------------------------------------- transformers


@pytest.mark.model
def test_a_decoders_gains_are_corrected_block_by_block(shared_dir: Path, tmp_path: Path) -> None:
    model = shared_dir / "models" / "stories260k"
    text = shared_dir / "data" / "stories_calib.txt"
    words = ["--text", str(text), "--samples", "12", "--length", "64"]
    words += ["quantize:bits=3,group_size=-1", "recalibrate", "--json"]
    done = CliRunner().invoke(cli.app, ["run", str(model), "-o", str(tmp_path / "out"), *words])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    facts = report["passes"][1]["facts"]
    assert facts["layers"] == 10, "two gains in each of five blocks"
    assert facts["output_error_after"] < facts["output_error_before"]
    estimated = {r["name"] for r in report["tensors"] if r["estimated"]}
    assert len(estimated) == facts["tensors_changed"] > 0
    assert all(name.endswith("layernorm.weight") for name in estimated)


# ---------------------------------------------------------------- ResNet-20


@pytest.mark.model
def test_a_resnet_pruned_by_70_percent_comes_back_to_within_11_points(
    shared_dir: Path, tmp_path: Path
) -> None:
    model = shared_dir / "models" / "resnet20-12fca82f.th"
    data = shared_dir / "data"
    calibration = ["--images", str(data / "cifar10_calib_600.npz")]
    words = ["run", str(model), "--allow-pickle", "--module", REAL, *calibration]
    test = np.load(data / "cifar10_test_2000.npz")
    images, labels = test["images"][::5], test["labels"][::5]  # they are sorted by class
    accuracy = {}
    prune = "prune:sparsity=0.7"
    for name, chain in {"pruned": [prune], "both": [prune, "recalibrate:samples=60"]}.items():
        done = CliRunner().invoke(cli.app, [*words, "-o", str(tmp_path / name), *chain])
        assert done.exit_code == 0, done.output
        with open_any(tmp_path / name) as made:
            classes = run_images(load_module(REAL, made), images).argmax(1).numpy()
        accuracy[name] = 100 * (classes == labels).mean()
    with open_any(model, allow_pickle=True) as source:
        dense = run_images(load_module(REAL, source), images).argmax(1).numpy()
    accuracy["dense"] = 100 * (dense == labels).mean()
    assert accuracy["both"] >= accuracy["dense"] - 11, accuracy
    assert accuracy["pruned"] < accuracy["dense"] - 20, accuracy
