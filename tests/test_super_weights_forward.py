"""Super weights by running the model: planted ones are found, clean models have none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest

from compress.calibrate.statistics import Statistics, open_statistics
from compress.checkpoint import open_checkpoint
from compress.checkpoint.source import Checkpoint
from compress.errors import UsageError
from compress.passes.super_weights import SuperWeights
from compress.plan import Options, make_plan
from compress.recipe import recipe_from_mapping
from compress.related import down_projections
from compress.roles import assign_roles
from compress.run import RunOptions, run
from compress.solvers.massive_activations import (
    MADE_BY_MANY,
    MADE_ELSEWHERE,
    PASSING,
    BlockPeaks,
    ChannelPeak,
    causes,
    leading_parts,
)
from compress.survey import decide_all
from compress.tensor import TensorInfo

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

GEOMETRIES = {"column": planted.shared_column, "row": planted.shared_row}
DOWN = "down"


# ---------------------------------------------------------------- the decision alone


def block(peak: float, *channels: ChannelPeak) -> BlockPeaks:
    return BlockPeaks(peak, channels)


def channel(number: int, size: float = 100.0, ratio: float = 200.0, **known: Any) -> ChannelPeak:
    return ChannelPeak(number, size, ratio, **known)


def made(number: int, *parts: tuple[int, float], **known: Any) -> ChannelPeak:
    return channel(number, tensor=DOWN, parts=parts, **known)


def places_of(*blocks: BlockPeaks, peak: float = 100.0) -> set[tuple[int, int, int]]:
    return {(c.block, c.row, c.column) for c in causes(blocks, peak)[0]}


def reasons(*blocks: BlockPeaks) -> list[str]:
    return [one.why for one in causes(blocks, 100.0)[1]]


def test_the_parts_of_an_output_stop_where_it_is_explained() -> None:
    products = np.array([5.0, 40.0, -10.0, 30.0, 15.0, 20.0])
    assert leading_parts(products) == ((1, 0.4), (3, 0.3), (5, 0.2))
    assert leading_parts(-products) == leading_parts(products)
    assert leading_parts(np.full(64, 1.0)) == ()  # each makes 1/64 of it
    assert leading_parts(np.array([1.0, -1.0])) == ()


def test_a_channel_counts_from_its_onset_on() -> None:
    onset, later = made(3, (7, 0.9)), channel(3)
    assert places_of(block(1), block(100, onset), block(90, later), block(90, later)) == {(1, 3, 7)}
    assert places_of(block(1), block(100, onset), block(90, later), block(90)) == {(1, 3, 7)}
    assert reasons(block(100, onset), block(9), block(9), block(90, later)) == [PASSING]
    assert reasons(block(1), block(100, onset)) == [PASSING]  # nothing comes later


def test_a_channel_must_be_massive_by_both_measures() -> None:
    for weak in ({"ratio": 49.0}, {"size": 9.0}):
        blocks = [block(100, made(3, (7, 0.9), **weak)), block(100, channel(3, **weak))]
        assert causes(blocks, 100.0) == ([], [])


def test_what_no_few_weights_make_is_told_apart() -> None:
    later = block(100, channel(1), channel(2))
    assert reasons(block(100, channel(1), made(2)), later) == [MADE_ELSEWHERE, MADE_BY_MANY]


def test_an_accepted_column_brings_rows_that_stand_out_half_as_far() -> None:
    half = made(4, (7, 0.4), ratio=30.0)
    other = made(5, (8, 0.9), ratio=30.0)  # of a column that is not accepted
    near = made(6, (7, 0.9), ratio=20.0)
    blocks = [block(100, made(3, (7, 0.9)), half, other, near)]
    blocks += [block(100, channel(3), replace(half, parts=()), other, near)] * 2
    assert places_of(*blocks) == {(0, 3, 7), (0, 4, 7)}


# ---------------------------------------------------------------- planted ones


@contextmanager
def opened(folder: Path) -> Iterator[tuple[Checkpoint, list[TensorInfo], dict[str, int]]]:
    """A checkpoint with its down projections and their layers."""
    with open_checkpoint(folder) as checkpoint:
        infos = list(assign_roles(checkpoint.infos(), checkpoint.config))
        layers = down_projections(infos)
        yield checkpoint, [i for i in infos if i.name in layers], layers


def found_in(folder: Path, ids: Any, most: int = 8) -> tuple[set[planted.Place], Any]:
    """Places found, and all that was found."""
    from compress.calibrate.peaks import find_by_forward

    with opened(folder) as (checkpoint, downs, layers):
        found = find_by_forward(checkpoint, {"input_ids": ids}, downs, most)
    return {(layers[c.tensor], c.row, c.column) for c, _ in found.causes}, found


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", planted.NAMES)
def test_planted_ones_are_found_and_nothing_else(tmp_path: Path, kind: str, geometry: str) -> None:
    for seed in (0, 1):
        neurons = GEOMETRIES[geometry](seed)
        folder = planted.save(tmp_path / str(seed), kind, seed, neurons)
        places, found = found_in(folder, planted.token_ids(7))
        assert places == planted.places(neurons)
        assert all(c.persistence == 1 and c.ratio >= 25 for c, _ in found.causes)
        assert found.rounds == 2  # the second finds nothing


@pytest.mark.parametrize("kind", planted.NAMES)
def test_a_clean_model_has_none(tmp_path: Path, kind: str) -> None:
    folder = planted.save(tmp_path, kind, 3)
    assert found_in(folder, planted.token_ids(7))[0] == set()


def test_what_a_stronger_one_hides_is_found_once_that_is_zeroed(tmp_path: Path) -> None:
    first = planted.Neuron(1, 9, {20: 5.0})
    hidden = planted.Neuron(2, 77, {20: 5.0}, token=planted.DELIMITER)
    folder = planted.save(tmp_path, "llama", 0, [first, hidden])
    places, found = found_in(folder, planted.token_ids(7))
    assert places == {(1, 20, 9), (2, 20, 77)}
    assert {(c.column, number) for c, number in found.causes} == {(9, 1), (77, 2)}
    assert found.rounds == 3


def test_a_tensor_gives_at_most_as_many_as_asked(tmp_path: Path) -> None:
    neurons = planted.shared_column(0)
    folder = planted.save(tmp_path, "llama", 0, neurons)
    places, _ = found_in(folder, planted.token_ids(7), most=2)
    assert len(places) == 2
    assert places < planted.places(neurons)


def test_zeroing_them_hurts_more_than_as_many_large_weights(tmp_path: Path) -> None:
    from compress.calibrate.peaks import causal_check

    for kind in ("llama", "gpt2"):
        neurons = planted.shared_row(2)
        folder = planted.save(tmp_path / kind, kind, 2, neurons)
        name = planted.NAMES[kind].format(neurons[0].layer) + ".weight"
        marked = {name: [(r, n.column) for n in neurons for r in n.rows]}
        with opened(folder) as (checkpoint, downs, _):
            effect = causal_check(checkpoint, {"input_ids": planted.token_ids(9)}, downs, marked)
        assert effect.measure == "kl"
        assert effect.weights == 3
        assert effect.found > 0.1
        assert effect.found > 10 * effect.drawn


def test_samples_may_be_shorter_than_the_longest(tmp_path: Path) -> None:
    neurons = planted.shared_column(1)
    folder = planted.save(tmp_path, "llama", 1, neurons)
    ids = planted.token_ids(7)
    ids[1, 9:], ids[2, :] = -1, -1
    places, found = found_in(folder, ids)
    assert places == planted.places(neurons)
    assert found.tokens == (ids >= 0).sum() == 2 * 24 + 9
    with pytest.raises(UsageError, match="no token ids"):
        found_in(folder, np.full((2, 4), -1, np.int32))


def test_a_head_that_was_renamed_is_found(tmp_path: Path) -> None:
    """GPT-NeoX checkpoints call it embed_out; transformers' model does not."""
    import torch

    from compress.engines.blocks import BlockModel

    model = planted.make_model("neox", 0)
    model.save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    with open_checkpoint(tmp_path) as checkpoint, torch.no_grad():
        assert "embed_out.weight" in {info.name for info in checkpoint.infos()}
        blocks = BlockModel(checkpoint)
        batch = blocks.start({"input_ids": ids})
        for index in range(blocks.depth):
            with blocks.loaded(index):
                blocks.advance(index, batch)
        torch.testing.assert_close(blocks.finish(batch).logits, model(input_ids=ids).logits)


# ---------------------------------------------------------------- a trained model


def test_the_trained_llama_has_channel_69(shared_dir: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = shared_dir / "models" / "tiny-llama-en"
    tokens = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    text = (shared_dir / "data" / "wikitext2_valid.txt").read_text()[:4000]
    ids = np.array(tokens.encode(text).ids[: 4 * 95 + 1], np.int32)
    ids = np.concatenate([np.repeat(ids[:1], 4)[:, None], ids[1:].reshape(4, 95)], 1)
    assert ids[0, 0] == 0  # its own first token

    decided = decided_with(tmp_path, model, ids, method="auto", causal=True)
    entries = {(e.layer, e.row, e.column): e for e in decided.entries or ()}
    assert {layer for layer, _, _ in entries} == {1}
    assert {row for _, row, _ in entries} == {69, 206}
    for row in (69, 206):
        assert entries[1, row, 339].confidence == "both"
    strongest = max(entries.values(), key=lambda e: e.share or 0)
    assert (strongest.row, strongest.column) == (69, 339)
    effect = decided.facts()["causal"]
    assert effect["found"] > 10 * effect["drawn"]


# ---------------------------------------------------------------- the pass


@contextmanager
def statistics_of(folder: Path, model: Path, ids: Any) -> Iterator[Statistics]:
    path = planted.write_statistics(folder / "stats.safetensors", model, ids)
    with open_statistics(path) as statistics:
        yield statistics


def decided_with(folder: Path, model: Path, ids: Any, **options: Any) -> SuperWeights:
    """The pass after a run's surveys."""
    recipe = recipe_from_mapping({"passes": [{"super-weights": options}]})
    with open_checkpoint(model) as checkpoint, statistics_of(folder, model, ids) as statistics:
        plan = decide_all(make_plan(checkpoint, recipe, Options(jobs=1), statistics), _silent)
    decided = plan.passes[0]
    assert isinstance(decided, SuperWeights)
    return decided


def _silent(what: str, done: int, total: int) -> None:
    del what, done, total


def test_a_run_keeps_what_it_found_in_transposed_weights(tmp_path: Path) -> None:
    """GPT-2 stores [in, out]: rows and columns must not be mixed up on the way out."""
    neurons = planted.shared_column(5)
    model = planted.save(tmp_path / "model", "gpt2", 5, neurons)
    ids, out = planted.token_ids(7), tmp_path / "out"
    recipe = recipe_from_mapping(
        {
            "passes": [
                {"super-weights": {"method": "forward"}},
                {"quantize": {"bits": 2, "group": 64, "targets": ["*.mlp.c_proj.weight"]}},
            ]
        }
    )
    with open_checkpoint(model) as checkpoint, statistics_of(tmp_path, model, ids) as statistics:
        plan = make_plan(checkpoint, recipe, Options(jobs=1), statistics)
        run(plan, out, RunOptions())
    from compress.output import open_any

    name = planted.NAMES["gpt2"].format(neurons[0].layer) + ".weight"
    with open_any(out) as packed, open_checkpoint(model) as dense:
        decoded, own = packed.read(packed.info(name)), dense.read(dense.info(name))
    exact = {(int(o), int(i)) for i, o in np.argwhere(decoded == own)}
    assert decoded.shape == (planted.WIDTH, planted.HIDDEN)
    assert {(row, column) for _, row, column in planted.places(neurons)} <= exact
    assert np.abs(decoded.astype(np.float64) - own).max() > 0.1  # the rest is rounded


def test_named_places_and_the_options_of_a_search_by_running(tmp_path: Path) -> None:
    neurons = planted.shared_row(4)
    model = planted.save(tmp_path / "model", "llama", 4, neurons)
    name = planted.NAMES["llama"].format(3) + ".weight"
    options = {"method": "forward", "coordinates": [f"{name}:1:2"]}
    decided = decided_with(tmp_path, model, planted.token_ids(7), **options)
    confidences = {(e.layer, e.row, e.column): e.confidence for e in decided.entries or ()}
    assert confidences == dict.fromkeys(planted.places(neurons), "forward") | {(3, 1, 2): "named"}
    layer, row, column = min(planted.places(neurons))
    entry = next(e for e in decided.facts()["entries"] if e["confidence"] == "forward")
    assert (entry["layer"], entry["row"], entry["column"]) == (layer, row, column)
    assert entry["value"] == pytest.approx(
        next(v for n in neurons if n.column == column for v in n.rows.values())
    )
    assert entry["round"] == 1
    by_score = decided_with(tmp_path, model, planted.token_ids(7), method="score")
    assert "forward" not in by_score.facts()  # was not run, though it could have been


def test_a_calibration_keeps_the_text_for_it_and_runs_no_model(tmp_path: Path) -> None:
    from compress.calibrate.calibrate import Settings, calibrate
    from compress.calibrate.inputs import Inputs

    neurons = planted.shared_row(0)
    model = planted.save(tmp_path / "model", "llama", 0, neurons)
    ids = planted.token_ids(7)
    recipe = recipe_from_mapping({"passes": [{"super-weights": {"method": "forward"}}]})
    out = tmp_path / "stats.safetensors"
    with open_checkpoint(model) as checkpoint:
        plan = make_plan(checkpoint, recipe, Options(jobs=1), calibrated=True)
        inputs = Inputs("ids", {"input_ids": ids}, "ids", "0" * 64)
        made = calibrate(plan, inputs, out, Settings(fsync=False), _never)
        assert made.record.kinds == {"inputs"}
        assert made.warnings == ()
        with open_statistics(out) as statistics:
            assert np.array_equal(statistics.inputs()["input_ids"], ids)
            decided = decide_all(make_plan(checkpoint, recipe, Options(), statistics), _silent)
    assert decided.passes[0].facts()["found"] == 3


def _never(what: str, done: int, total: int) -> None:
    raise AssertionError(f"{what}: {done} of {total}")


def test_what_it_needs_depends_on_how_it_searches() -> None:
    assert SuperWeights().needs == frozenset()
    assert SuperWeights().welcomes == {"inputs"}
    assert SuperWeights(method="score").welcomes == frozenset()
    assert SuperWeights(method="forward").needs == {"inputs"}
    assert SuperWeights(method="score", causal=True).needs == {"inputs"}


def test_without_text_it_says_so_before_any_work(tmp_path: Path) -> None:
    model = planted.save(tmp_path / "model", "llama", 0)
    recipe = recipe_from_mapping({"passes": [{"super-weights": {"method": "forward"}}]})
    with open_checkpoint(model) as checkpoint, pytest.raises(UsageError, match="needs statistics"):
        make_plan(checkpoint, recipe, Options(jobs=1))


def test_a_model_that_cannot_be_run_falls_back_only_where_it_may(tmp_path: Path) -> None:
    """Encoder and decoder: two stacks of blocks."""
    import transformers

    config = transformers.T5Config(
        d_model=32, d_ff=64, d_kv=8, num_layers=1, num_decoder_layers=1, num_heads=4, vocab_size=96
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    arguments = (tmp_path, tmp_path / "model", planted.token_ids(7))
    decided = decided_with(*arguments, method="auto")
    assert decided.entries == ()
    assert "stack of blocks" in decided.facts()["forward"]["not_run"]
    with pytest.raises(UsageError, match="stack of blocks"):
        decided_with(*arguments, method="forward")
