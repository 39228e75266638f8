"""Calibration of transformers models: against hooks on the whole model, resumed, refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from models_with_words import reading_bert, talking_llama, words
from toolbox import write_safetensors
from torch import nn
from typer.testing import CliRunner

from compress import cli
from compress.calibrate import collect, fisher
from compress.calibrate.calibrate import Settings, calibrate
from compress.calibrate.collect import SiteSums, conv_patches
from compress.calibrate.data import sentence_ids, text_ids
from compress.calibrate.inputs import Inputs, split
from compress.calibrate.sites import SiteCollector
from compress.calibrate.statistics import (
    DIAGONAL,
    HELD_OUT,
    INPUTS,
    MEAN,
    OUTPUT_FISHER,
    SECOND_MOMENT,
    open_statistics,
)
from compress.calibrate.writer import StatisticsWriter
from compress.calibrate_command import read_inputs
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.errors import Interrupted, UsageError
from compress.passes.prune import Prune
from compress.plan import Options, Plan, make_plan
from compress.recipe import Recipe
from compress.runtime.loading import load

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = (SECOND_MOMENT, HELD_OUT, MEAN, OUTPUT_FISHER, INPUTS)


@dataclass(frozen=True)
class Asking(Prune):
    """A pass that asks for given statistics."""

    asked: tuple[str, ...] = EVERYTHING
    offered: tuple[str, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.asked)

    @property
    def welcomes(self) -> frozenset[str]:
        return frozenset(self.offered)


def planned(model: Checkpoint, *asked: str, **options: Any) -> Plan:
    one = Asking(asked=asked or EVERYTHING, **options)
    return make_plan(model, Recipe(passes=(one,)), Options(), calibrated=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "text.txt").write_text(words(300, 96))
    return talking_llama(folder / "model").parent


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(folder / "model") as opened:
        yield opened


@pytest.fixture(scope="module")
def text(folder: Path, decoder: Checkpoint) -> Inputs:
    return text_ids(folder / "text.txt", decoder, length=21, samples=7, seed=0)


@pytest.fixture(scope="module")
def whole_run(decoder: Checkpoint, text: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything of the decoder, uninterrupted."""
    out = tmp_path_factory.mktemp("stats") / "s.safetensors"
    calibrate(planned(decoder), text, out, Settings(fsync=False))
    return out


# ---------------------------------------------------------------- against the whole model


def inputs_of(model: Any, samples: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """What every Linear of a whole model is given, sample by sample, float64 [n, columns]."""
    seen: dict[str, list[np.ndarray]] = {}

    def hook(name: str) -> Any:
        def note(_: Any, arguments: Any) -> None:
            flat = arguments[0].reshape(-1, arguments[0].shape[-1])
            seen.setdefault(name, []).append(flat.double().numpy())

        return note

    linears = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    }
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    with torch.no_grad():
        for ids in samples:
            model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    return {f"{name}.weight": np.concatenate(parts) for name, parts in seen.items()}


def samples_of(inputs: Inputs, numbers: list[int]) -> list[torch.Tensor]:
    return [torch.from_numpy(inputs.ids(n).astype(np.int64)) for n in numbers]


def check_against(path: Path, plan: Plan, inputs: Inputs, model: Path) -> None:
    """The file's statistics of every target beside those of the whole model."""
    whole = load(model, dtype="float32", dense_kernels=False)
    learn, held = split(inputs.samples)
    learned, kept = (inputs_of(whole, samples_of(inputs, part)) for part in (learn, held))
    with open_statistics(path) as statistics:
        for info in plan.members[0]:
            known, x, apart = statistics.of(info), learned[info.name], kept[info.name]
            assert known.site is not None
            assert (known.count, known.site.held_out_count) == (len(x), len(apart))
            for got, direct in ((known.second_moment(), x), (known.held_out(), apart)):
                wanted = direct.T @ direct / len(direct)
                assert np.abs(got[0] - wanted).max() <= 2e-5 * np.abs(wanted).max()
                assert np.array_equal(got[0], got[0].T)
            assert np.abs(known.mean()[0] - x.mean(0)).max() <= 1e-5 * np.abs(x).max()
            assert np.allclose(known.diagonal()[0], (x * x).mean(0), rtol=1e-4)


def test_statistics_are_those_of_the_whole_model(
    whole_run: Path, decoder: Checkpoint, text: Inputs
) -> None:
    check_against(whole_run, planned(decoder), text, decoder.path)


@pytest.mark.model
def test_a_trained_model_by_documents(shared_dir: Path, tmp_path: Path) -> None:
    model = shared_dir / "models" / "stories260k"
    with open_checkpoint(model) as opened:
        made = text_ids(
            shared_dir / "data" / "stories_calib.txt", opened, length=60, samples=5, documents=True
        )
        plan = planned(opened, SECOND_MOMENT, HELD_OUT, MEAN)
        calibrate(plan, made, tmp_path / "s", Settings(fsync=False))
        check_against(tmp_path / "s", plan, made, model)


def test_layers_with_one_input_share_a_site(whole_run: Path) -> None:
    with open_statistics(whole_run) as statistics:
        sites = statistics.record.sites
        shared = [{t.split(".")[-2] for t in site.tensors} for site in sites[:4]]
        assert shared == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"},
                          {"down_proj"}]  # fmt: skip
        assert len(sites) == 3 * 4
        assert [site.number for site in sites] == list(range(12))


def test_an_encoder_sees_no_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "_DRAWS", 30)
    lines = [words(count, 60, seed) for seed, count in enumerate((3, 9, 3, 5, 17, 9, 4))]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    model = reading_bert(tmp_path / "model")
    with open_checkpoint(model) as opened:
        made = sentence_ids(tmp_path / "lines.txt", opened)
        assert made.tokens == sum(len(line.split()) + 2 for line in lines)
        plan = planned(opened)
        result = calibrate(plan, made, tmp_path / "s", Settings(fsync=False))
        assert "pooler.dense.weight" in result.record.sites[-1].tensors  # in no block
        check_against(tmp_path / "s", plan, made, model)
        with open_statistics(tmp_path / "s") as statistics:
            check_encoder_fisher(statistics, plan, made, model)
            assert np.array_equal(statistics.inputs()["input_ids"], made.arrays["input_ids"])


@pytest.mark.model
def test_the_transposed_layers_of_gpt2(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=30, initializer_range=0.2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "m")
    ids = np.random.default_rng(0).integers(0, 60, (3, 30)).astype(np.int32)
    with open_checkpoint(tmp_path / "m") as opened:
        plan = planned(opened, SECOND_MOMENT)
        assert {info.role.value for info in plan.members[0]} == {"conv1d"}
        inputs = Inputs("ids", {"input_ids": ids}, "", "")
        calibrate(plan, inputs, tmp_path / "s", Settings(fsync=False))
    direct = inputs_of(model, samples_of(inputs, [0, 1, 2]))
    with open_statistics(tmp_path / "s") as statistics:
        for info in plan.members[0]:
            x = direct[info.name]
            wanted = x.T @ x / len(x)
            got = statistics.of(info).second_moment()[0]
            assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max(), info.name
        assert len(statistics.record.sites) == len(plan.members[0]) == 8


class Routed(nn.Module):
    """Two layers read x; two more read another tensor, and only where they are told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcd"})

    def forward(self, x: torch.Tensor, routed: bool) -> None:
        y = 2 * x
        self.layers["b"](x)
        self.layers["a"](x)
        if routed:
            self.layers["c"](x)  # the tensor of a and b, but not always
            self.layers["d"](y)


def test_layers_that_are_called_at_times_have_sites_of_their_own(tmp_path: Path) -> None:
    model = Routed()
    kinds = {"a": {DIAGONAL}, "b": {MEAN}, "c": {DIAGONAL}, "d": {DIAGONAL, OUTPUT_FISHER}}
    collector = SiteCollector(dict(model.layers), {n: frozenset(k) for n, k in kinds.items()})
    x = torch.ones(2, 3, 4)
    with collector.attached():
        for routed in (False, True, False):
            with collector.batch(held_out=False):
                model(x, routed)
    with StatisticsWriter(tmp_path / "s", room=8192, fsync=False) as writer:
        collector.write(writer)
        found = {site.tensors: site.count for site in writer.sites()}
        assert writer.reached()["b"] == {DIAGONAL, MEAN}
    assert found == {("a", "b"): 18, ("c",): 6, ("d",): 6}
    assert os.listdir(tmp_path) == []  # nothing was finished


# ---------------------------------------------------------------- Fisher


def gradients_of(model: Any, scalar: Any, outputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    made = torch.autograd.grad(scalar, list(outputs.values()), retain_graph=True, allow_unused=True)
    return {
        name: None if g is None else g.reshape(-1, g.shape[-1]).double().numpy()
        for name, g in zip(outputs, made, strict=True)
    }


def run_with_outputs(model: Any, ids: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
    """The whole model's output, with every Linear's output in one graph."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda _, __, output, name=name: seen.update({f"{name}.weight": output})
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    output = model(inputs_embeds=embeddings)
    for handle in handles:
        handle.remove()
    return output, seen


def test_fisher_is_that_of_the_whole_model(
    whole_run: Path, decoder: Checkpoint, text: Inputs
) -> None:
    model = load(decoder.path, dtype="float32", dense_kernels=False)
    generator = torch.Generator().manual_seed(0)
    squares: dict[str, list[np.ndarray]] = {}
    for ids in samples_of(text, list(range(text.samples))):
        output, seen = run_with_outputs(model, ids[None])
        log_p = output.logits[0].log_softmax(-1)
        labels = torch.multinomial(log_p.exp(), 1, generator=generator)
        for name, g in gradients_of(model, log_p.gather(1, labels).sum(), seen).items():
            squares.setdefault(name, []).append(g**2)
    check_fisher(whole_run, decoder, squares)


def check_fisher(path: Path, model: Checkpoint, squares: dict[str, list[np.ndarray]]) -> None:
    with open_statistics(path) as statistics:
        for info in planned(model).members[0]:
            wanted = np.concatenate(squares[info.name]).mean(0)
            got = statistics.of(info).output_fisher()
            assert np.abs(got - wanted).max() <= 1e-3 * wanted.max(), info.name
            assert wanted.max() > 0


def check_encoder_fisher(statistics: Any, plan: Plan, inputs: Inputs, model: Path) -> None:
    """The exact Gauss-Newton diagonal of 1 - cosine, which draws approach."""
    whole = load(model, dtype="float32", dense_kernels=False)
    squares: dict[str, list[np.ndarray]] = {}
    for ids in samples_of(inputs, list(range(inputs.samples))):
        output, seen = run_with_outputs(whole, ids[None])
        pooled = nn.functional.normalize(output.last_hidden_state.mean(1), dim=-1)[0]
        total: dict[str, np.ndarray] = {}
        for entry in pooled:
            for name, g in gradients_of(whole, entry, seen).items():
                if g is not None:
                    total[name] = total.get(name, 0) + g**2
        for name, values in total.items():
            squares.setdefault(name, []).append(values)
    assert "pooler.dense.weight" not in squares
    for info in plan.members[0]:
        got = statistics.of(info).output_fisher().astype(np.float64)
        assert (got > 0).all(), info.name  # the pooler's is of its own output
        if info.name in squares:
            wanted = np.concatenate(squares[info.name]).mean(0)
            assert 0.85 < got.sum() / wanted.sum() < 1.15, info.name
            assert np.abs(got - wanted).mean() < 0.15 * wanted.mean(), info.name


def test_fisher_of_some_samples(decoder: Checkpoint, text: Inputs, tmp_path: Path) -> None:
    plan = planned(decoder, OUTPUT_FISHER)
    few, one = tmp_path / "few", tmp_path / "one"
    result = calibrate(plan, text, few, Settings(fsync=False, fisher_tokens=43))
    assert result.body["tensors"] == len(plan.members[0])
    calibrate(plan, text, one, Settings(fsync=False, fisher_tokens=1))
    info = plan.members[0][0]
    with open_statistics(few) as a, open_statistics(one) as b:
        assert a.record.sites == () and not a.of(info).has(SECOND_MOMENT)
        assert not np.array_equal(a.of(info).output_fisher(), b.of(info).output_fisher())


def test_the_model_runs_no_further_than_it_must(
    decoder: Checkpoint, text: Inputs, tmp_path: Path
) -> None:
    watch = Stop(-1)
    early = planned(decoder, DIAGONAL, targets=("*.0.*", "*.1.*q_proj*"))
    calibrate(early, text, tmp_path / "a", Settings(fsync=False), watch)
    assert watch.steps == [0, 1, 2]
    watch = Stop(-1)
    result = calibrate(planned(decoder, INPUTS), text, tmp_path / "b", Settings(fsync=False), watch)
    assert watch.steps == [] and result.record.kinds == {INPUTS}
    with open_statistics(tmp_path / "b") as statistics:
        assert np.array_equal(statistics.inputs()["input_ids"], text.arrays["input_ids"])


def test_fisher_with_block_inputs_in_a_file(
    whole_run: Path, decoder: Checkpoint, text: Inputs, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(fisher, "_IN_MEMORY", 0)
    calibrate(planned(decoder), text, tmp_path / "s", Settings(fsync=False))
    assert (tmp_path / "s").read_bytes() == whole_run.read_bytes()
    assert os.listdir(tmp_path) == ["s"]


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(6, 9, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1), groups=3),
         (4, 6, 11, 13)),
        (nn.Conv1d(4, 8, 5, padding="same", padding_mode="reflect"), (2, 4, 17)),
        (nn.Conv2d(3, 5, 1, stride=2), (3, 9, 9)),
    ],
)  # fmt: skip
@torch.no_grad()
def test_patches_times_the_weight_are_the_convolution(module: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(shape)
    outputs = module(inputs) - module.bias.reshape(-1, *[1] * len(module.kernel_size))
    patches = conv_patches(module, inputs)
    weight = module.weight.reshape(module.groups, -1, patches.shape[2])
    got = torch.cat(list(patches @ weight.transpose(1, 2)), dim=1)
    wanted = outputs.reshape(-1, *outputs.shape[-1 - len(module.kernel_size) :])
    wanted = wanted.movedim(1, -1).reshape(got.shape)
    assert torch.allclose(got, wanted, atol=1e-5)


def test_sums_do_not_depend_on_how_inputs_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three panels of columns, the last one short, more inputs than a product takes, two blocks."""
    monkeypatch.setattr(collect, "_PANEL", 32)
    monkeypatch.setattr(collect, "_CHUNK", 64)
    inputs = torch.randn(2, 450, 73, generator=torch.Generator().manual_seed(0))
    sums = SiteSums(frozenset({SECOND_MOMENT, MEAN}), 73, 2)
    sums.add(inputs[:, :10])
    sums.add(inputs[:, 10:])
    got = np.concatenate(list(sums.pieces(SECOND_MOMENT))).reshape(2, 73, 73)
    wanted = (inputs[1].double().T @ inputs[1].double() / 450).numpy()
    assert np.abs(got[1] - wanted).max() < 1e-6
    assert np.array_equal(got[1], got[1].T) and sums.count == 450
    assert np.allclose(next(sums.pieces(MEAN)), inputs.double().mean(1), atol=1e-6)


def test_held_out_inputs_count_where_nobody_keeps_them_apart() -> None:
    sums = SiteSums(frozenset({DIAGONAL}), 3)
    sums.add(torch.ones(2, 3))
    sums.add(torch.full((2, 3), 3.0), held_out=True)
    assert (sums.count, sums.held_out_count) == (4, 0)
    assert next(sums.pieces(DIAGONAL)).tolist() == [[5.0, 5.0, 5.0]]


# ---------------------------------------------------------------- the file


class Stop:
    """Progress that interrupts at a step."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.steps: list[int] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        self.steps.append(done)
        if done == self.at:
            raise Interrupted(2)


@pytest.mark.parametrize("damage", ["none", "hidden", "data", "state"])
def test_a_resumed_calibration_gives_the_same_bytes(
    damage: str, whole_run: Path, decoder: Checkpoint, text: Inputs, tmp_path: Path
) -> None:
    out, plan = tmp_path / "s", planned(decoder)
    with pytest.raises(Interrupted):
        calibrate(plan, text, out, Settings(fsync=False), Stop(2))
    stage = tmp_path / "s.partial"
    assert sorted(p.name for p in stage.iterdir()) == [
        ".calibration.json", ".stage.json", "hidden.2", "out",
    ]  # fmt: skip
    victims = {"hidden": "hidden.2", "data": "out/s", "state": ".calibration.json"}
    if damage != "none":
        with open(stage / victims[damage], "r+b") as file:
            file.seek(-9, 2)
            file.write(b"x")
    watch = Stop(-1)
    calibrate(plan, text, out, Settings(fsync=False, resume=True), watch)
    assert watch.steps[0] == (2 if damage == "none" else 0)  # damaged: afresh
    assert out.read_bytes() == whole_run.read_bytes()
    assert os.listdir(tmp_path) == ["s"]


def test_interrupted_in_the_way_back(
    whole_run: Path, decoder: Checkpoint, text: Inputs, tmp_path: Path
) -> None:
    out, plan = tmp_path / "s", planned(decoder)
    with pytest.raises(Interrupted):
        calibrate(plan, text, out, Settings(fsync=False), Stop(3))
    watch = Stop(-1)
    calibrate(plan, text, out, Settings(fsync=False, resume=True), watch)
    assert watch.steps == [3, 4]
    assert out.read_bytes() == whole_run.read_bytes()


def test_another_calibration_is_not_resumed(
    decoder: Checkpoint, text: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    with pytest.raises(Interrupted):
        calibrate(planned(decoder), text, out, Settings(fsync=False), Stop(2))
    with pytest.raises(UsageError, match="another model, recipe or version"):
        calibrate(planned(decoder, DIAGONAL), text, out, Settings(fsync=False, resume=True))


def test_a_failure_leaves_nothing(decoder: Checkpoint, text: Inputs, tmp_path: Path) -> None:
    def fail(what: str, done: int, total: int) -> None:
        if done == 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(Exception, match="No space left"):
        calibrate(planned(decoder), text, tmp_path / "s", Settings(fsync=False), fail)
    assert os.listdir(tmp_path) == []


def test_the_file_is_plain_safetensors(whole_run: Path) -> None:
    from safetensors.numpy import load_file

    arrays = load_file(whole_run)
    assert arrays["site/3/second_moment"].shape == (1, 128, 128)
    assert arrays["inputs/input_ids"].dtype == np.int32


def test_an_existing_file_is_kept(
    whole_run: Path, decoder: Checkpoint, text: Inputs, tmp_path: Path
) -> None:
    plan, out = planned(decoder, DIAGONAL), tmp_path / "s"
    out.write_bytes(whole_run.read_bytes())
    with pytest.raises(UsageError, match="exists"):
        calibrate(plan, text, out, Settings(fsync=False))
    assert out.read_bytes() == whole_run.read_bytes()
    calibrate(plan, text, out, Settings(fsync=False, overwrite=True))
    with open_statistics(out) as statistics:
        assert statistics.record.kinds == {DIAGONAL}
    weights = tmp_path / "weights.safetensors"
    write_safetensors(weights, {"a": np.zeros(3, np.float32)})
    for other in (weights, tmp_path):
        with pytest.raises(UsageError, match=r"not this tool's to replace|not a file"):
            calibrate(plan, text, other, Settings(fsync=False, overwrite=True))


def test_statistics_of_another_model_are_refused(whole_run: Path, tmp_path: Path) -> None:
    with (
        open_statistics(whole_run) as statistics,
        open_checkpoint(talking_llama(tmp_path / "m", layers=2)) as other,
        pytest.raises(UsageError, match="another model"),
    ):
        statistics.check_model(other)


# ---------------------------------------------------------------- refusals and warnings


def test_a_recipe_that_wants_nothing(decoder: Checkpoint, text: Inputs, tmp_path: Path) -> None:
    plan = make_plan(decoder, Recipe(passes=(Prune(),)), Options(), calibrated=True)
    with pytest.raises(UsageError, match="no pass of the recipe"):
        calibrate(plan, text, tmp_path / "s", Settings())


def test_a_tensor_out_of_reach(decoder: Checkpoint, text: Inputs, tmp_path: Path) -> None:
    table = "model.embed_tokens.weight"
    with pytest.raises(UsageError, match=r"embed_tokens\.weight: calibration does not reach"):
        calibrate(planned(decoder, DIAGONAL, targets=(table,)), text, tmp_path / "s", Settings())
    assert os.listdir(tmp_path) == []
    plan = planned(decoder, INPUTS, offered=(DIAGONAL,), targets=(table, "*.0.*down_proj*"))
    result = calibrate(plan, text, tmp_path / "s", Settings(fsync=False))
    assert any(table in warning for warning in result.warnings)


def test_one_sample_cannot_be_kept_apart(folder: Path, decoder: Checkpoint, tmp_path: Path) -> None:
    one = text_ids(folder / "text.txt", decoder, length=128, samples=1)
    with pytest.raises(UsageError, match="there is one sample"):
        calibrate(planned(decoder), one, tmp_path / "s", Settings())
    plan = planned(decoder, SECOND_MOMENT, offered=(HELD_OUT,))
    result = calibrate(plan, one, tmp_path / "s", Settings(fsync=False))
    assert result.warnings == ("one sample: no inputs are kept apart",)


def test_fewer_tokens_than_the_rank(folder: Path, decoder: Checkpoint, tmp_path: Path) -> None:
    few = text_ids(folder / "text.txt", decoder, length=20, samples=4)
    result = calibrate(planned(decoder, SECOND_MOMENT), few, tmp_path / "s", Settings(fsync=False))
    (warning,) = result.warnings
    assert "80 inputs for 128 columns of model.layers.0.mlp.down_proj.weight" in warning
    few = calibrate(planned(decoder, DIAGONAL), few, tmp_path / "d", Settings(fsync=False))
    assert few.warnings == ()


def test_images_for_a_language_model(decoder: Checkpoint, tmp_path: Path) -> None:
    images = Inputs("images", {"images": np.zeros((2, 4, 4, 3), np.uint8)}, "", "")
    with pytest.raises(UsageError, match="how images get into this model"):
        calibrate(planned(decoder, DIAGONAL), images, tmp_path / "s", Settings())


def test_the_command(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\npasses:\n  - prune: {sparsity: 0.5, score: wanda}\n")
    words_of = [
        "calibrate", folder / "model", "--for", recipe, "--text", folder / "text.txt",
        "--length", "16", "-o", tmp_path / "s", "--no-fsync", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(cli.app, [str(word) for word in words_of])
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert (body["kinds"], body["tensors"], body["data"]["samples"]) == (["diagonal"], 21, 20)


def test_the_command_takes_one_kind_of_inputs(folder: Path, decoder: Checkpoint) -> None:
    text = folder / "text.txt"
    for given, options, said in (
        ({"text": None, "ids": None}, {}, "no inputs"),
        ({"text": text, "ids": text}, {}, "2 kinds of inputs"),
        ({"ids": text}, {"documents": True}, "only of a text"),
        ({"images": text}, {"length": 3}, "not with --images"),
    ):
        with pytest.raises(UsageError, match=said):
            read_inputs(decoder, given, **options)  # type: ignore[arg-type]
