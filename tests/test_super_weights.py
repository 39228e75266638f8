"""Super weights: what is found in trained and synthetic models, and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from compress.errors import InputError, UsageError
from compress.passes import published_super_weights
from compress.passes.base import Context, Terms
from compress.passes.prune import Prune
from compress.passes.published_super_weights import PUBLISHED, Published, candidates
from compress.passes.super_weight_entries import Entry
from compress.passes.super_weights import SuperWeights
from compress.solvers import massive_columns
from compress.tensor import Array, Role, Tensor
from compress.testing import check_pass, make_tensor, run_pass

HIDDEN, WIDTH, LAYERS = 96, 256, 5
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def llama(
    seed: int = 0, *, fused: bool = False, dtype: Any = BFLOAT16, layers: int = LAYERS
) -> list[Tensor]:
    """A Llama-shaped stack of gated MLPs: heavy tails, uneven rows, a few large columns."""
    rng = np.random.default_rng(seed)

    def draw(rows: int, columns: int) -> Array:
        values = rng.standard_normal((rows, columns))
        values *= 0.87 + 0.045 * values**2
        values *= np.exp(0.25 * rng.standard_normal((rows, 1))) * 0.6 / np.sqrt(columns)
        values[:, rng.choice(columns, 2)] *= rng.uniform(3, 8, 2)
        return values.astype(dtype)

    tensors = []
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp."
        gate, up = draw(WIDTH, HIDDEN), draw(WIDTH, HIDDEN)
        tensors.append(make_tensor(prefix + "down_proj.weight", draw(HIDDEN, WIDTH)))
        if fused:
            joined = np.concatenate([gate, up])
            tensors.append(make_tensor(prefix + "gate_up_proj.weight", joined))
        else:
            tensors.append(make_tensor(prefix + "gate_proj.weight", gate))
            tensors.append(make_tensor(prefix + "up_proj.weight", up))
    return tensors


def plant(tensors: list[Tensor], places: dict[tuple[int, int, int], float]) -> list[Tensor]:
    """Weights set by (layer, row, column) of the down projection."""
    planted = []
    for tensor in tensors:
        values = tensor.source.copy()
        for (layer, row, column), value in places.items():
            if tensor.info.name == f"model.layers.{layer}.mlp.down_proj.weight":
                values[row, column] = value
        planted.append(tensor.with_(source=values))
    return planted


def read(path: Path) -> list[Tensor]:
    """The MLP weights of a checkpoint in order of name."""
    import torch
    from safetensors import safe_open

    tensors = []
    with safe_open(path / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            if ".mlp." in name:
                value = file.get_tensor(name)
                is_bf16 = value.dtype == torch.bfloat16
                array = (
                    value.view(torch.uint16).numpy().view(BFLOAT16) if is_bf16 else value.numpy()
                )
                tensors.append(make_tensor(name, array))
    return tensors


def find(tensors: list[Tensor], tile_rows: int | None = None, **options: Any) -> SuperWeights:
    decided, _ = run_pass(SuperWeights(**options), tensors, tile_rows)
    assert isinstance(decided, SuperWeights)
    return decided


def places_of(decided: SuperWeights) -> set[tuple[int, int, int]]:
    return {(e.layer, e.row, e.column) for e in decided.entries or ()}


# ---------------------------------------------------------------- what is found


def test_the_trained_llama_has_two_in_one_column(shared_dir: Path) -> None:
    decided = find(read(shared_dir / "models" / "tiny-llama-en"), 50)
    assert places_of(decided) == {(1, 69, 339), (1, 206, 339)}
    first, second = decided.facts()["entries"]
    assert first["value"] == -1.328125
    assert (first["rank"], second["rank"]) == (1, 2)
    assert {first["confidence"], second["confidence"]} == {"score"}
    assert first["tensor"] == "model.layers.1.mlp.down_proj.weight"


def test_none_are_left_once_they_are_shrunk(shared_dir: Path) -> None:
    tensors = read(shared_dir / "models" / "tiny-llama-en")
    down = next(t for t in tensors if "layers.1.mlp.down" in t.info.name)
    median = float(np.median(np.abs(down.source.astype(np.float32))))
    shrunk = plant(tensors, {(1, 69, 339): median, (1, 206, 339): median})
    decided = find(shrunk)
    assert places_of(decided) == set()
    assert "no weight stands out" in decided.facts()["reason"]


def test_a_small_trained_model_without_massive_activations_has_none(shared_dir: Path) -> None:
    assert places_of(find(read(shared_dir / "models" / "stories260k"))) == set()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)])
def test_nothing_is_found_in_random_weights(seed: int, dtype: Any) -> None:
    assert places_of(find(llama(seed, dtype=dtype))) == set()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_planted_ones_are_found_and_nothing_else(seed: int, *, fused: bool) -> None:
    rng = np.random.default_rng(seed)
    places = {
        (layer, int(rng.integers(HIDDEN)), int(rng.integers(WIDTH))): float(rng.uniform(-2.2, -1.8))
        for layer in (1, 2, 3)
    }
    # A neuron that hardly fires carries nothing: its reach must be an ordinary one.
    tensors = _with_reach(llama(seed, fused=fused), places)
    assert places_of(find(plant(tensors, places), 17)) == set(places)


def _with_reach(tensors: list[Tensor], places: dict[tuple[int, int, int], float]) -> list[Tensor]:
    """Gate rows (and the upper half of fused ones) of planted columns made twice the usual."""
    changed = []
    for tensor in tensors:
        values = tensor.source.copy()
        for layer, _, column in places:
            name = tensor.info.name
            if f"layers.{layer}.mlp.gate" in name or f"layers.{layer}.mlp.up" in name:
                rows = values[:WIDTH].astype(np.float32)
                usual = np.median(np.linalg.norm(rows, axis=1))
                row = rows[column] * (2 * usual / np.linalg.norm(rows[column]))
                values[column] = row.astype(values.dtype)
        changed.append(tensor.with_(source=values))
    return changed


def test_rows_of_one_column_are_found_together_up_to_the_limit() -> None:
    places = {(1, 7, 40): -2.0, (1, 30, 40): 1.2, (1, 90, 40): -1.1, (1, 12, 41): 0.5}
    tensors = plant(_with_reach(llama(3), {(1, 7, 40): 0.0}), places)
    wanted = {(1, 7, 40), (1, 30, 40), (1, 90, 40)}
    assert places_of(find(tensors)) == wanted
    assert places_of(find(tensors, max_per_layer=2)) == {(1, 7, 40), (1, 30, 40)}


def test_tiles_do_not_matter() -> None:
    tensors = plant(llama(2), {(1, 7, 40): -2.5})
    assert find(tensors).entries == find(tensors, 1).entries == find(tensors, 13).entries


def test_a_large_column_alone_is_not_a_super_weight() -> None:
    tensors = llama(1)
    down = next(t for t in tensors if "layers.2.mlp.down" in t.info.name)
    values = down.source.copy()
    values[:, 5] = (values[:, 5].astype(np.float32) * 30).astype(values.dtype)
    changed = [t.with_(source=values) if t is down else t for t in tensors]
    assert places_of(find(_with_reach(changed, {(2, 0, 5): 0.0}))) == set()


# ---------------------------------------------------------------- what cannot be searched


def test_a_model_without_gated_mlps_has_none_and_says_why() -> None:
    tensors = [
        make_tensor("encoder.layer.0.output.dense.weight", np.ones((4, 8), np.float32)),
        make_tensor("conv.weight", np.ones((4, 8), np.float32), role=Role.CONV, shape=(4, 2, 2, 2)),
    ]
    decided = find(tensors)
    assert decided.entries == ()
    assert decided.facts()["reason"] == "no gated MLP"
    assert decided.predict(tensors[0].info, Terms()) == Terms()


def test_no_targets_at_all_is_a_result() -> None:
    decided = find([])
    assert decided.facts()["found"] == 0


def test_dead_neurons_and_sparse_matrices_prove_nothing() -> None:
    tensors = [t.with_(source=np.zeros_like(t.source)) for t in llama()]
    assert places_of(find(tensors)) == set()
    rng = np.random.default_rng(0)
    holed = []
    for tensor in llama():
        values = tensor.source.copy()
        values[rng.random(values.shape) < 0.7] = 0
        holed.append(tensor.with_(source=values))
    assert places_of(find(holed)) == set()


@pytest.mark.parametrize("which", ["gate", "down"])
def test_a_nan_is_named(which: str) -> None:
    tensors = []
    for tensor in llama(layers=1):
        values = tensor.source.copy()
        if which in tensor.info.name:
            values[50, 3] = np.nan
        tensors.append(tensor.with_(source=values))
    with pytest.raises(InputError, match=rf"{which}_proj\.weight: .* row 50, column 3 is nan"):
        find(tensors, 20)


def test_squares_beyond_float32_are_still_summed() -> None:
    tensors = _with_reach(llama(dtype=np.float32), {(1, 7, 40): 0.0})
    tensors = plant(tensors, {(1, 7, 40): -2.0})
    tensors = [t.with_(source=t.source * np.float32(1e25)) for t in tensors]
    assert places_of(find(tensors)) == {(1, 7, 40)}


# ---------------------------------------------------------------- by hand, published


def test_coordinates_by_hand() -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    texts = ("2:5:9", f"{name}:1:2", "model.layers.0.mlp.gate_proj:0:3")
    tensors = llama()
    decided, results = run_pass(SuperWeights(coordinates=texts), tensors)
    assert isinstance(decided, SuperWeights)
    found = {(e.tensor, e.row, e.column): e for e in decided.entries or ()}
    down = "model.layers.2.mlp.down_proj.weight"
    assert set(found) == {(down, 5, 9), (name, 1, 2), (name, 0, 3)}
    assert {e.confidence for e in found.values()} == {"named"}
    source = next(t for t in tensors if t.info.name == down).source
    assert found[down, 5, 9].value == float(source[5, 9])
    outliers = next(r for r in results if r.info.name == name).outliers
    assert outliers is not None
    assert outliers.rows.tolist() == [0, 1]
    assert outliers.columns.tolist() == [3, 2]


def test_named_alone_reads_nothing() -> None:
    pass_ = SuperWeights(method="named", coordinates=("2:5:9",))
    infos = [t.info for t in llama()]
    assert not any(pass_.surveys(info) for info in infos)
    decided = pass_.decide(None, infos)
    assert not decided.wants_survey
    assert decided.entries == (Entry("model.layers.2.mlp.down_proj.weight", 2, 5, 9, "named"),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("9:0:0", "layer 9 has no gated MLP"),
        ("2:96:0", "lies outside .*96 rows and 256 columns"),
        ("2:0:256", "lies outside"),
        ("model.layers.7.x:0:0", "not among the targets"),
    ],
)
def test_coordinates_that_do_not_exist_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SuperWeights(coordinates=(text,)).check_all([t.info for t in llama()])


@pytest.mark.parametrize("text", ["2:5", "2:x:5", "2:-1:5", ":1:2", ""])
def test_malformed_coordinates_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not layer:row:column"):
        SuperWeights(coordinates=(text,)).validate()


def test_named_needs_coordinates() -> None:
    with pytest.raises(UsageError, match="needs coordinates"):
        SuperWeights(method="named").validate()


def test_published_places_are_taken_only_where_the_weight_stands_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = llama(4)
    sizes = np.abs(tensors[3].source.astype(np.float32))
    large = np.unravel_index(np.argsort(sizes, axis=None)[-3], sizes.shape)
    listed = ((1, int(large[0]), int(large[1])), (2, 0, 0))
    table = (Published("ours", LAYERS, HIDDEN, WIDTH, listed),)
    monkeypatch.setattr(published_super_weights, "PUBLISHED", table)
    decided = find(tensors)
    assert places_of(decided) == {listed[0]}
    assert [e.confidence for e in decided.entries or ()] == ["published"]
    assert places_of(find(tensors, published=False)) == set()
    assert places_of(find(llama(5))) == set()  # the same shape, trained differently
    assert places_of(find(llama(4, layers=4))) == set()  # another shape


def test_the_published_index_is_consistent() -> None:
    for one in PUBLISHED:
        for layer, row, column in one.coordinates:
            assert layer < one.layers
            assert row < one.hidden
            assert column < one.intermediate
    assert candidates(32, 4096, 14336) == [
        (1, 788, 2427),
        (1, 1384, 2427),
        (1, 2070, 7310),
        (1, 4062, 2427),
    ]


# ---------------------------------------------------------------- as a pass


def test_outliers_carry_exact_values_and_survive_pruning() -> None:
    tensors = plant(_with_reach(llama(2), {(1, 7, 40): 0.0}), {(1, 7, 40): -2.5})
    decided, results = run_pass(SuperWeights(), tensors)
    protected = next(r for r in results if r.outliers is not None)
    assert protected.info.name == "model.layers.1.mlp.down_proj.weight"
    assert not decided.row_wise(protected.info)
    assert not protected.outliers.in_scale if protected.outliers else False
    bound = decided.bind(protected.info, (), Context(base_stands_alone=True))
    again = bound.apply(protected.with_(outliers=None)).outliers
    assert again is not None
    assert again.in_scale
    _, pruned = run_pass(Prune(sparsity=0.999), results)
    kept = next(p for p in pruned if p.info.name == protected.info.name)
    assert kept.decode()[7, 40] == np.float32(-2.5)


def test_the_kit() -> None:
    check_pass(SuperWeights, tensors=plant(llama(2, layers=3), {(1, 7, 40): -2.5}))
    check_pass(SuperWeights)
    check_pass(
        SuperWeights, tensors=llama(layers=2), coordinates=("1:3:4", "1:4:4"), method="named"
    )


def test_what_was_found_is_explained() -> None:
    facts = find(llama(0)).facts()
    assert facts["found"] == 0
    assert facts["layers_searched"] == LAYERS
    strongest = facts["strongest"]
    assert strongest["ratio"] < massive_columns.MIN_OWN_RATIO or (
        strongest["score"] < massive_columns.MIN_SCORE
    )
