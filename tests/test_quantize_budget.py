"""Budgets: widths and ranks by tensor, never above what was asked for, best for what they cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from statistics_files import correlated, write_statistics
from toolbox import tiny_llama, tool, tool_json, tree

from compress.calibrate.statistics import Statistics
from compress.checkpoint import Checkpoint, open_checkpoint
from compress.errors import UsageError
from compress.passes import width_losses
from compress.passes.low_rank import LowRank
from compress.passes.quantize import Quantize
from compress.plan import Options, Plan, make_plan
from compress.recipe import Output, Recipe, parse_pass
from compress.solvers.output_error import output_errors
from compress.survey import decide_all
from compress.testing import check_pass, decide, make_tensor
from compress.trial import TrialCheckpoint

pytestmark = pytest.mark.usefixtures("one_thread")
Q = "quantize:group=32,"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers whose matrices differ in scale and in tails."""
    folder = tiny_llama(tmp_path_factory.mktemp("budget") / "model")
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, values in tensors.items():
        if values.ndim == 2:
            tails = 3 * np.exp(rng.standard_normal() / 2 + rng.standard_normal(values.shape) / 2)
            tensors[name] = (values * tails).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(folder) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def statistics(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    rng = np.random.default_rng(1)
    targets = [i for i in model.infos() if "proj" in i.name]
    inputs: dict[tuple[str, ...], NDArray[np.float64]] = {}
    for info in targets:
        inputs[info.name,] = correlated(rng, 300, info.shape[1]) * np.exp(rng.standard_normal())
    fisher = {
        i.name: np.exp(rng.standard_normal(i.shape[0]) + 2 * rng.standard_normal()).astype(
            np.float32
        )
        for i in targets
    }
    ids = rng.integers(3, 96, (2, 24)).astype(np.int32)
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    return write_statistics(path, inputs, fisher=fisher, given={"input_ids": ids})


def decided(
    model: Checkpoint, *words: str, statistics: Statistics | None = None, fmt: str = "native"
) -> Plan:
    recipe = Recipe(tuple(parse_pass(word) for word in words), output=Output(fmt))
    return decide_all(make_plan(model, recipe, Options(jobs=1), statistics), lambda *_: None)


def bpw_of(plan: Plan, index: int = 0) -> float:
    sizes = plan.outlook(index).tensor_bytes(plan.passes[index])
    assert all(low == high for low, high in sizes.values())
    weights = sum(i.size for i in plan.members[index])
    return 8 * sum(high for _, high in sizes.values()) / weights


def widths(plan: Plan, index: int = 0) -> dict[str, int]:
    return {
        t.info.name: t.terms.codes.bits for t in plan.tensors if t.terms.codes and index in t.steps
    }


def loss(plan: Plan, statistics: Statistics, kind: str) -> float:
    """What the survey weighs, measured anew on the decoded weights."""
    found = 0.0
    with TrialCheckpoint(plan) as trial:
        for info in plan.members[0]:
            error = trial.read(info) - plan.checkpoint.read(info)
            known = statistics.of(info)
            if kind == "weights":
                found += float(np.square(error, dtype=np.float64).sum())
                continue
            outputs = output_errors(error, known.second_moment())
            if kind == "fisher":
                found += float(outputs @ known.output_fisher().astype(np.float64))
            else:
                clean = output_errors(plan.checkpoint.read(info), known.second_moment())
                found += outputs.sum() / clean.sum()
    return found


# ---------------------------------------------------------------- bits per weight


@pytest.mark.parametrize("kind", ["weights", "outputs", "fisher"])
def test_mixed_widths_lose_less_than_one_width_of_the_same_bytes(
    kind: str, model: Checkpoint, statistics: Statistics
) -> None:
    uniform = {b: decided(model, f"{Q}bits={b}", statistics=statistics) for b in (3, 4)}
    losses = {b: loss(plan, statistics, kind) for b, plan in uniform.items()}
    found = {}
    for bits in (3.5, 4.0):
        budget = (bits - 3) * bpw_of(uniform[4]) + (4 - bits) * bpw_of(uniform[3])
        plan = decided(model, f"{Q}bpw={budget},sensitivity={kind}", statistics=statistics)
        assert budget - 0.1 < bpw_of(plan) <= budget
        assert plan.exact
        found[bits] = loss(plan, statistics, kind)
        facts = plan.passes[0].facts()
        assert facts["expected_loss"] == pytest.approx(found[bits], rel=1e-3)
        assert facts["sensitivity"] == kind
        assert facts["bits_per_weight"] == pytest.approx(bpw_of(plan))
    # Where every output counts alike, one width for all may be the best.
    assert found[4.0] <= (1.0 if kind == "outputs" else 0.9) * losses[4]
    assert found[4.0] < found[3.5] < losses[3]


def test_auto_takes_the_best_measure_at_hand(
    model: Checkpoint, statistics: Statistics, tmp_path: Path
) -> None:
    for given, expected in ((statistics, "fisher"), (None, "weights")):
        plan = decided(model, f"{Q}bpw=4", statistics=given)
        assert plan.passes[0].facts()["sensitivity"] == expected
        assert any("weights' own errors" in w for w in plan.warnings) == (given is None)
    rng = np.random.default_rng(2)
    inputs = {(i.name,): correlated(rng, 100, i.shape[1]) for i in plan.members[0]}
    moments = write_statistics(tmp_path / "s.safetensors", inputs)
    plan = decided(model, f"{Q}bpw=4,solver=obs", statistics=moments)
    assert plan.passes[0].facts()["sensitivity"] == "outputs"


def test_fused_sets_share_a_width_unless_told_otherwise(
    model: Checkpoint, statistics: Statistics
) -> None:
    together = decided(model, f"{Q}bpw=4", statistics=statistics)
    apart = decided(model, f"{Q}bpw=4,fuse=false", statistics=statistics)
    for layer in range(2):
        for names in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            found = {widths(together)[f"model.layers.{layer}.{n}_proj.weight"] for n in names}
            assert len(found) == 1
    assert together.passes[0].facts()["units"] == 8
    assert apart.passes[0].facts()["units"] == 14
    assert loss(apart, statistics, "fisher") < loss(together, statistics, "fisher")


def test_groups_are_a_choice_too(model: Checkpoint, statistics: Statistics) -> None:
    one = decided(model, f"{Q}bpw=4.5,widths=[3,4,5]", statistics=statistics)
    several = decided(model, f"{Q}bpw=4.5,groups=[32,64],widths=[3,4,5]", statistics=statistics)
    assert bpw_of(several) <= 4.5
    assert loss(several, statistics, "fisher") < loss(one, statistics, "fisher")
    assert len({w["group"] for w in several.passes[0].facts()["widths"]}) > 1


def test_overrides_pin_widths(model: Checkpoint, statistics: Statistics) -> None:
    pinned = '{targets: "*down*", bits: 8}, {targets: "*o_proj*", group: 64}'
    plan = decided(model, f"{Q}bpw=5,overrides=[{pinned}]", statistics=statistics)
    found = widths(plan)
    assert all(bits == 8 for name, bits in found.items() if "down" in name)
    assert any(bits != 8 for name, bits in found.items() if "down" not in name)
    assert bpw_of(plan) <= 5
    groups = {t.info.name: t.terms.codes.group_size for t in plan.tensors if t.terms.codes}
    assert {groups[n] for n in groups if "o_proj" in n} == {64}


def test_after_pruning_kept_codes_are_what_costs(model: Checkpoint, statistics: Statistics) -> None:
    plan = decided(
        model, "prune:sparsity=0.7,score=wanda", f"{Q}bpw=3,solver=obs", statistics=statistics
    )
    assert 2.8 < bpw_of(plan, 1) <= 3
    assert max(widths(plan, 1).values()) > 4  # a mask leaves room for wide codes
    with pytest.raises(UsageError, match="below the minimum"):
        decided(model, "prune:sparsity=0.5", f"{Q}bpw=1.6")


# ---------------------------------------------------------------- size of the whole output


@pytest.mark.parametrize(
    ("fmt", "choices", "low", "high"),
    [
        ("native", "[2,3,4,5,6,8]", 70_000, 120_000),
        ("compressed-tensors", "[2,4,8]", 95_000, 120_000),
    ],
)
def test_size_holds_for_the_whole_output(
    fmt: str, choices: str, low: int, high: int, model: Checkpoint, tmp_path: Path
) -> None:
    previous = 0
    for number, size in enumerate(np.linspace(low, high, 4).astype(int).tolist()):
        plan = decided(model, f"{Q}size={size},widths={choices}", fmt=fmt)
        assert plan.exact
        assert plan.bytes_range[1] <= size
        assert plan.bytes_range[1] >= previous  # more room is never used for less
        previous = plan.bytes_range[1]
        if number == 1:
            out = tmp_path / "out"
            words = [f"{Q}size={size},widths={choices}", "--format", fmt]
            tool_json("run", plan.checkpoint.path, "-o", out, *words)
            files = {p for p in out.rglob("*") if p.is_file()}
            own = {p for p in files if p.name not in ("manifest.json", "report.json")}
            assert sum(p.stat().st_size for p in own) == plan.bytes_range[1]
    assert previous > 0.9 * high


def test_a_plan_bounds_what_a_run_writes_and_replays(folder: Path, tmp_path: Path) -> None:
    word = f"{Q}size=90kB"
    plan = tool_json("plan", folder, word, "--format", "native")
    exact = tool_json("plan", folder, word, "--format", "native", "--survey")
    assert not plan["exact"]
    assert exact["exact"]
    assert plan["bytes"][0] < exact["bytes"][0] == exact["bytes"][1] <= plan["bytes"][1] == 90_000
    tool_json("run", folder, "-o", tmp_path / "a", word, "--format", "native")
    recipe = tmp_path / "a" / "recipe.yaml"
    tool_json("run", folder, "-o", tmp_path / "b", "--recipe", recipe, "--jobs", "2")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["passes"][0]["facts"]["budget"] == "size=90kB"
    assert sum(w["tensors"] for w in report["passes"][0]["facts"]["widths"]) == 14


def test_bounds_of_bits_per_weight(model: Checkpoint) -> None:
    for fmt, choices in (("native", "[2,3,4,5,6,8]"), ("compressed-tensors", "[2,4,8]")):
        for budget in (3.1, 4.5, 6.3):
            recipe = Recipe((parse_pass(f"{Q}bpw={budget},widths={choices}"),), output=Output(fmt))
            plan = make_plan(model, recipe, Options(jobs=1))
            done = decide_all(plan, lambda *_: None)
            low, high = plan.bytes_range
            assert low < done.bytes_range[0] <= plan.most_bytes < high
            assert bpw_of(done) <= budget


# ---------------------------------------------------------------- formats


def test_a_format_must_hold_every_width(model: Checkpoint) -> None:
    def format_of(word: str) -> str:
        return make_plan(model, Recipe((parse_pass(word),)), Options()).format.name

    assert format_of(f"{Q}bpw=5,widths=[4,8]") == "compressed-tensors"
    assert format_of(f"{Q}bpw=4.5,widths=[3,8]") == "native"
    assert format_of(f"{Q}bpw=4.5,widths=[4,8],fuse=false") == "native"
    with pytest.raises(UsageError, match="engines fuse these"):
        decided(model, f"{Q}bpw=4.5,widths=[4,8],fuse=false", fmt="compressed-tensors")
    with pytest.raises(UsageError, match="3-bit codes"):
        decided(model, f"{Q}bpw=4.5,widths=[3,8]", fmt="compressed-tensors")


# ---------------------------------------------------------------- refusals


def test_what_is_refused(folder: Path, model: Checkpoint, statistics: Statistics) -> None:
    done = tool("plan", folder, f"{Q}bpw=2.2")
    assert done.returncode == 2
    assert "bpw=2.2 is below the minimum" in done.stderr
    minimum = float(done.stderr.split(" takes ")[1].split()[0])
    assert minimum == 2.5  # 2 bits, and 16 bits of scale for 32 weights
    assert bpw_of(decided(model, f"{Q}bpw={minimum}")) == 2.5
    with pytest.raises(UsageError, match=r"size=50kB is below the minimum.* takes [0-9,]+ bytes"):
        make_plan(model, Recipe((parse_pass(f"{Q}size=50kB"),)), Options())
    for word, says in (
        ("bpw=4,size=1MB", "exclude each other"),
        ("size=many", "not a size"),
        ("bpw=0", "leaves nothing"),
        ("max_kl=0", "leaves nothing"),
        ("bpw=4,widths=[1,4]", "from 2 to 8"),
        ("bpw=4,widths=[4,4]", "each once"),
        ("bpw=4,widths=[]", "leaves no choice"),
        ("groups=[32]", "no meaning without a budget"),
        ("fuse=false", "no meaning without a budget"),
        ("max_kl=0.1,solver=obs,follow=true", "follow=true makes other weights"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_pass(Q + word)
    with pytest.raises(UsageError, match="multiple of group=48"):
        decided(model, f"{Q}bpw=4,groups=[32,48]")
    with pytest.raises(UsageError, match="needs statistics"):
        decided(model, f"{Q}max_kl=0.1")
    with pytest.raises(UsageError, match="needs statistics"):
        decided(model, f"{Q}bpw=4,sensitivity=fisher")


def test_tokens_are_needed_to_measure(model: Checkpoint, tmp_path: Path) -> None:
    names = [(i.name,) for i in model.infos() if "proj" in i.name]
    inputs = {n: np.ones((2, model.info(n[0]).shape[1])) for n in names}
    images = {"images": np.zeros((1, 2, 2, 3), np.uint8)}
    for number, (given, says) in enumerate(
        ((None, "holds no inputs to run"), (images, "there are none in its statistics"))
    ):
        moments = write_statistics(tmp_path / str(number), inputs, given=given)
        for word in ("max_kl=0.1", "bpw=4,sensitivity=kl"):
            with pytest.raises(UsageError, match=says):
                decided(model, Q + word, statistics=moments)


# ---------------------------------------------------------------- measured on the whole model


def test_the_measured_divergence_is_within_the_limit(
    model: Checkpoint, statistics: Statistics
) -> None:
    from compress.evaluate.divergence import kl_of

    ids = statistics.inputs()["input_ids"]

    def kl(plan: Plan) -> float:
        return kl_of(plan.checkpoint, TrialCheckpoint(plan), ids)

    limit = 1.5 * kl(decided(model, f"{Q}bits=4", statistics=statistics))
    plan = decided(model, f"{Q}max_kl={limit},widths=[3,4,6]", statistics=statistics)
    measured = plan.passes[0].facts()["measured_kl"]
    assert measured == pytest.approx(kl(plan), rel=1e-6)
    assert measured <= limit
    assert bpw_of(plan) < 6
    with pytest.raises(UsageError, match=r"cannot be met: with the largest widths .* nats"):
        decided(model, f"{Q}max_kl=1e-9,widths=[3,4,6]", statistics=statistics)


def test_widths_by_measurement(model: Checkpoint, statistics: Statistics) -> None:
    from compress.evaluate.divergence import kl_of

    ids = statistics.inputs()["input_ids"]
    plan = decided(model, f"{Q}bpw=4.5,widths=[3,4,5],sensitivity=kl", statistics=statistics)
    assert plan.passes[0].facts()["sensitivity"] == "kl"
    assert bpw_of(plan) <= 4.5
    uniform = decided(model, f"{Q}bits=4", statistics=statistics)
    assert kl_of(model, TrialCheckpoint(plan), ids) < kl_of(model, TrialCheckpoint(uniform), ids)


def test_three_and_a_half_bits_lie_between_three_and_four(shared_dir: Path) -> None:
    from compress.evaluate.divergence import Source

    word = "quantize:group=32,on_indivisible=short,"
    with open_checkpoint(shared_dir / "models" / "stories260k") as stories:
        ids = np.random.default_rng(0).integers(3, 512, (1, 128)).astype(np.int32)
        source = Source(stories, ids)
        uniform = {b: decided(stories, f"{word}bits={b}") for b in (3, 4)}
        half = (bpw_of(uniform[3]) + bpw_of(uniform[4])) / 2
        mixed = decided(stories, f"{word}bpw={half}")
        assert bpw_of(uniform[3]) < bpw_of(mixed) <= half
        kl = [source.kl_to(TrialCheckpoint(p)) for p in (uniform[4], mixed, uniform[3])]
    assert kl[0] < kl[1] < kl[2]


# ---------------------------------------------------------------- the pass by itself


def test_the_passs_promises() -> None:
    check_pass(Quantize, group=16, on_indivisible="short", bpw=4.5)
    check_pass(Quantize, group=-1, symmetric=False, bpw=5.0, widths=(3, 4, 8))


def test_huge_matrices_are_weighed_by_some_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_t(5, (512, 64)).astype(np.float32)
    tensor = make_tensor("w", values)
    pass_ = Quantize(group=32, bpw=4.0)
    whole = pass_.survey(tensor)["w"]["weights"]
    monkeypatch.setattr(width_losses, "_SAMPLED", 4096)
    some = pass_.survey(tensor)["w"]["weights"]
    assert some == pytest.approx(whole, rel=0.15)
    assert some != whole


# ---------------------------------------------------------------- ranks


def planted(name: str, spectrum: list[float], rng: np.random.Generator) -> Any:
    """A weight of plain noise at the masked places' level, plus errors of a known spectrum."""
    rows, columns = 40, 56
    left = np.linalg.qr(rng.standard_normal((rows, len(spectrum))))[0]
    right = np.linalg.qr(rng.standard_normal((columns, len(spectrum))))[0]
    values = ((left * spectrum) @ right.T).astype(np.float32)
    tensor = make_tensor(name, values)
    return tensor.with_(mask=np.zeros(values.shape, np.bool_))  # all of it is error


def test_ranks_go_to_the_largest_singular_values() -> None:
    rng = np.random.default_rng(5)
    spectra = {"a": [9.0, 8.0, 7.0, 0.1], "b": [6.0, 0.2], "c": [5.0, 4.0, 0.3]}
    tensors = [planted(n, s, rng) for n, s in spectra.items()]
    price = 16 * (40 + 56)
    for many, expected in ((3, (3, 0, 0)), (4, (3, 1, 0)), (6, (3, 1, 2)), (8, (3, 2, 3))):
        bpw = (many + 0.5) * price / (3 * 40 * 56)
        made = decide(LowRank(bpw=bpw, allocate="global"), tensors)
        assert isinstance(made, LowRank)
        assert tuple((made.ranks or {}).values()) == expected
        for tensor, rank in zip(tensors, expected, strict=True):
            factors = made.apply(tensor).factors
            assert (0 if factors is None else factors.rank) == rank
        left = sum(x**2 for s, r in zip(spectra.values(), expected, strict=True) for x in s[r:])
        assert made.facts()["expected_loss"] == pytest.approx(left, abs=1e-3)


def test_one_budget_for_all_beats_one_for_each(model: Checkpoint, statistics: Statistics) -> None:
    """On the loss that it lowers, with no more bytes; and as predicted."""
    found = {}
    for allocate in ("tensor", "global"):
        words = f"{Q}bits=3", f"low-rank:bpw=2,metric=full,allocate={allocate}"
        plan = decided(model, *words, statistics=statistics)
        found[allocate] = loss(plan, statistics, "fisher"), bpw_of(plan, 1)
        ranks = {t.info.name: t.terms.rank for t in plan.tensors if 1 in t.steps}
        with TrialCheckpoint(plan) as trial:
            assert all(np.isfinite(trial.read(i)).all() for i in plan.members[1])
    assert found["global"][0] < 0.9 * found["tensor"][0]
    assert found["global"][1] <= 3.5 + 2
    assert len(set(ranks.values())) > 2


def test_both_budgets_in_one_chain(model: Checkpoint, statistics: Statistics) -> None:
    chain = f"{Q}bpw=3.5", "low-rank:bpw=1,allocate=global,metric=diag"
    plan = decided(model, *chain, statistics=statistics)
    assert plan.exact
    factors = sum(t.terms.rank * sum(t.info.shape) * 16 for t in plan.tensors if t.terms.rank)
    weights = sum(i.size for i in plan.members[0])
    assert 0.9 < factors / weights <= 1
    assert 3.3 < bpw_of(plan) - factors / weights <= 3.5
    recipe = Recipe(tuple(map(parse_pass, chain)), output=Output("native"))
    bounds = make_plan(model, recipe, Options(jobs=1), statistics).bytes_range
    assert bounds[0] < plan.bytes_range[0] < bounds[1]
    with pytest.raises(UsageError, match="low-rank decides after it"):
        decided(model, f"{Q}size=100kB", chain[1], statistics=statistics)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_ranks_within_a_size(dtype: str, folder: Path, model: Checkpoint, tmp_path: Path) -> None:
    word = f"low-rank:allocate=global,factor_dtype={dtype},size="
    none = f"low-rank:allocate=global,factor_dtype={dtype},bpw=1e-6"
    base = decided(model, f"{Q}bits=4", none).bytes_range[1]
    sizes = [base + 100, base + 2_000, base + 9_000, base + 30_000]
    ranks = []
    for size in sizes:
        plan = decided(model, f"{Q}bits=4", f"{word}{size}")
        assert base <= plan.bytes_range[0] == plan.bytes_range[1] <= size
        ranks.append(sum(t.terms.rank for t in plan.tensors))
    assert ranks[0] == 0
    assert ranks[0] < ranks[1] < ranks[2] < ranks[3]
    with pytest.raises(UsageError, match="without any factors the output takes"):
        decided(model, f"{Q}bits=4", f"{word}{base - 5000}")
    out = tmp_path / "out"
    words = (f"{Q}bits=4", f"{word}{sizes[2]}", "--format", "native")
    plan = tool_json("plan", folder, *words)
    tool_json("run", folder, "-o", out, *words)
    own = [p for p in out.rglob("*") if p.name not in ("manifest.json", "report.json")]
    written = sum(p.stat().st_size for p in own if p.is_file())
    assert plan["bytes"][0] <= written <= plan["bytes"][1] == sizes[2]


def test_options_of_ranks_that_do_not_fit() -> None:
    for word, says in (
        ("rank=4,bpw=1", "exclude each other"),
        ("size=1MB", "is a budget of all tensors"),
        ("allocate=global", "has no budget"),
        ("rank=4,allocate=global", "has no budget"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_pass(f"low-rank:{word}")
