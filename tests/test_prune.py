"""Pruning keeps exactly as many weights as asked, and the right ones."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress.errors import InputError, UsageError
from compress.passes.base import Terms
from compress.passes.prune import Prune, kept_of
from compress.solvers.radix_select import FLOAT32, Spill, TileCounts
from compress.tensor import Array, Outliers, Role, Tensor, TensorInfo
from compress.testing import check_pass, decide, make_tensor, run_pass, sample_tensors, tiles_of

DTYPES = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "f8": np.dtype(ml_dtypes.float8_e4m3fn),
}
# Few distinct values, so that ties, zeros of both signs and shared bins are common. The last
# ones differ only in the low 16 bits of a float32, and one is a float32 subnormal.
POOL = [0.0, -0.0, 1.0, -1.0, 0.5, 0.25, -2.0, 3.0, 1.0 + 2**-20, -1.0 - 2**-12, 1.0 + 2**-9, 1e-42]


def magnitudes(tensor: Tensor) -> Array:
    """What the pass ranks by: |w| rounded to float32, with protected entries first of all."""
    scores = np.abs(tensor.source.astype(np.float32))
    if tensor.outliers is not None:
        rows, columns = tensor.outliers.rows, tensor.outliers.columns
        live = scores[rows, columns] != 0
        scores[rows[live], columns[live]] = np.inf
    return scores


def half_up(value: Decimal) -> int:
    return int(value.quantize(Decimal(1), rounding=ROUND_HALF_UP))


def oracle_counts(tensors: list[Tensor], sparsity: float, min_keep: float, scope: str) -> list[int]:
    """Kept weights of each tensor by taking weights one at a time from one sorted list."""
    share = Decimal(repr(sparsity))
    scores = [magnitudes(t).ravel() for t in tensors]
    nonzeros = [int(np.count_nonzero(s)) for s in scores]
    if scope == "tensor":
        return [
            min(s.size - half_up(share * s.size), n) for s, n in zip(scores, nonzeros, strict=True)
        ]
    total = sum(s.size for s in scores)
    budget = min(total - half_up(share * total), sum(nonzeros))
    kept = []
    for s, n in zip(scores, nonzeros, strict=True):
        floor = (
            min_keep if isinstance(min_keep, int) else math.ceil(Decimal(repr(min_keep)) * s.size)
        )
        kept.append(max(min(floor, n), int(np.isinf(s).sum())))
    ranked = sorted(
        (-float(score), which, rank)
        for which, s in enumerate(scores)
        for rank, score in enumerate(sorted(s[s != 0], reverse=True))
    )
    for _, which, rank in ranked:
        if sum(kept) >= budget:
            break
        if rank >= kept[which]:
            kept[which] += 1
    return kept


def oracle_masks(tensors: list[Tensor], counts: list[int]) -> list[Array]:
    """The first `count` of each tensor by magnitude, earlier entries first among equals."""
    masks = []
    for tensor, count in zip(tensors, counts, strict=True):
        scores = magnitudes(tensor)
        order = np.argsort(-scores.ravel(), kind="stable")[:count]
        mask = np.zeros(scores.size, np.bool_)
        mask[order] = True
        masks.append(mask.reshape(scores.shape))
    return masks


@st.composite
def models(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(DTYPES)) -> list[Tensor]:
    """One to four small tensors, of one dtype or mixed, some with protected entries."""
    tensors = []
    one = draw(st.sampled_from([None, *dtypes]))
    for index in range(draw(st.integers(1, 4))):
        dtype = DTYPES[one or draw(st.sampled_from(dtypes))]
        shape = (draw(st.integers(1, 6)), draw(st.integers(1, 9)))
        numbers = st.sampled_from(POOL) | st.floats(-4, 4, width=32)
        values = draw(hnp.arrays(np.float64, shape, elements=numbers)).astype(dtype)
        tensor = make_tensor(f"layer.{index}.weight", values)
        places = draw(st.sets(st.integers(0, values.size - 1), max_size=2))
        if places:
            rows, columns = np.divmod(np.array(sorted(places), np.int64), shape[1])
            tensor = tensor.with_(outliers=Outliers(rows, columns, values[rows, columns]))
        tensors.append(tensor)
    return tensors


def masks_of(results: list[Tensor]) -> list[Array]:
    return [r.mask for r in results if r.mask is not None]


SHARES = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.99]) | st.floats(0, 0.99)


@settings(max_examples=250, deadline=None)
@given(models(), SHARES, st.sampled_from(["global", "tensor"]), st.sampled_from([None, 1, 2, 5]))
def test_keeps_what_a_sort_keeps(
    tensors: list[Tensor], sparsity: float, scope: str, tile_rows: int | None
) -> None:
    decided, results = run_pass(Prune(sparsity=sparsity, scope=scope), tensors, tile_rows)
    counts = oracle_counts(tensors, sparsity, 0, scope)
    if scope == "tensor":
        counts = [
            max(c, int(np.isinf(magnitudes(t)).sum())) for c, t in zip(counts, tensors, strict=True)
        ]
    for mask, expected in zip(masks_of(results), oracle_masks(tensors, counts), strict=True):
        np.testing.assert_array_equal(mask, expected)
    assert decided.facts()["kept"] == sum(counts)


@settings(max_examples=150, deadline=None)
@given(
    models(), SHARES, st.sampled_from([1, 2, 5, 9, 0.1, 0.25, 0.5]), st.sampled_from([None, 1, 2])
)
def test_floors_are_met_and_the_total_stays_exact(
    tensors: list[Tensor], sparsity: float, min_keep: float, tile_rows: int | None
) -> None:
    pass_ = Prune(sparsity=sparsity, min_keep=min_keep)
    infos = [t.info for t in tensors]
    try:
        pass_.check_all(infos)
    except UsageError:
        return
    _, results = run_pass(pass_, tensors, tile_rows)
    counts = oracle_counts(tensors, sparsity, min_keep, "global")
    for mask, expected in zip(masks_of(results), oracle_masks(tensors, counts), strict=True):
        np.testing.assert_array_equal(mask, expected)


@settings(max_examples=80, deadline=None)
@given(models(), SHARES, st.sampled_from([0, 3, 0.1]))
def test_pruning_its_own_output_changes_nothing(
    tensors: list[Tensor], sparsity: float, min_keep: float
) -> None:
    tensors = [t.with_(outliers=None) for t in tensors]
    pass_ = Prune(sparsity=sparsity, min_keep=min_keep)
    try:
        pass_.check_all([t.info for t in tensors])
    except UsageError:
        return
    _, once = run_pass(pass_, tensors)
    pruned = [
        t.with_(source=np.where(r.mask, t.source, np.zeros((), t.source.dtype)))
        for t, r in zip(tensors, once, strict=True)
        if r.mask is not None
    ]
    decided, twice = run_pass(pass_, pruned)
    for a, b in zip(masks_of(once), masks_of(twice), strict=True):
        np.testing.assert_array_equal(a, b)
    facts = decided.facts()
    assert facts["kept"] + facts["zeros_before"] == facts["weights"]


def test_a_pruned_model_does_not_grow_back_at_a_lower_sparsity() -> None:
    values = np.zeros((4, 8), np.float32)
    values[0] = 1 + np.arange(8)
    decided, [result] = run_pass(Prune(sparsity=0.25), [make_tensor("a", values)])
    np.testing.assert_array_equal(result.mask, values != 0)
    assert decided.facts()["notes"] == ["already sparse enough: nothing changed"]
    assert decided.facts()["sparsity"] == 0.75


def test_ties_go_to_the_earlier_tensor_and_the_earlier_entry() -> None:
    tensors = [make_tensor(n, np.ones((3, 4), np.float32)) for n in ("z", "a")]
    _, results = run_pass(Prune(sparsity=10 / 24), tensors, 2)
    flat = np.concatenate([m.ravel() for m in masks_of(results)])
    np.testing.assert_array_equal(flat, np.arange(24) < 14)


def test_float32_weights_that_agree_in_15_bits_are_told_apart_in_a_second_sweep() -> None:
    values = (1 + np.arange(100, dtype=np.float32) * 2**-20).reshape(10, 10)
    pass_ = Prune(sparsity=0.37)
    tensor = make_tensor("w", values)
    first = pass_.decide(pass_.survey(tensor), [tensor.info])
    assert first.wants_survey
    _, [result] = run_pass(pass_, [tensor], 3)
    np.testing.assert_array_equal(result.mask, values >= np.sort(values.ravel())[37])


def test_bfloat16_needs_one_sweep() -> None:
    tensor = sample_tensors()[0]
    pass_ = Prune(sparsity=0.37)
    assert not pass_.decide(pass_.survey(tensor), [tensor.info]).wants_survey


def test_tiles_that_are_joined_for_the_write_keep_the_same_ties() -> None:
    tensor = make_tensor("w", np.ones((9, 5), ml_dtypes.bfloat16))
    pass_ = Prune(sparsity=0.5)
    decided = decide(pass_, [tensor], 2)
    whole = decided.apply(tensor).mask
    joined = [decided.apply(tile).mask for tile in tiles_of(tensor, 4)]
    assert whole is not None
    np.testing.assert_array_equal(whole.ravel(), np.arange(45) < 22)
    np.testing.assert_array_equal(np.concatenate([m for m in joined if m is not None]), whole)
    with pytest.raises(ValueError, match="cut the surveyed rows"):
        decided.apply(tiles_of(tensor, 3)[0])


def test_merging_is_associative() -> None:
    tensors = sample_tensors()
    pass_ = Prune(sparsity=0.6)
    tiles = [tile for t in tensors for tile in tiles_of(t, 4)]
    left = [pass_.survey(tile) for tile in tiles[:9]]
    right = [pass_.survey(tile) for tile in tiles[9:]]

    def fold(parts: list[Any]) -> Any:
        merged = parts[0]
        for part in parts[1:]:
            merged = pass_.merge(merged, part)
        return merged

    infos = [t.info for t in tensors]
    apart = pass_.decide(pass_.merge(fold(list(left)), fold(list(right))), infos)
    together = pass_.decide(fold([*left, *right]), infos)
    assert isinstance(apart, Prune)
    assert isinstance(together, Prune)
    assert apart.sweep is not None
    assert together.sweep is not None
    assert apart.sweep.plan == together.sweep.plan


# ---------------------------------------------------------------- refusals


def test_infeasible_floors_are_refused_with_the_largest_feasible_value() -> None:
    infos = [t.info for t in sample_tensors()]  # 1536, 896, 1536 and 512 weights: 4480
    with pytest.raises(
        UsageError, match=r"min_keep=200 keeps 800 weights of 4 .* leaves 448 of 4480"
    ):
        Prune(sparsity=0.9, min_keep=200).check_all(infos)
    with pytest.raises(UsageError) as caught:
        Prune(sparsity=0.9, min_keep=200).check_all(infos)
    assert "at most 112" in str(caught.value.hint)
    Prune(sparsity=0.9, min_keep=112).check_all(infos)
    with pytest.raises(UsageError):
        Prune(sparsity=0.9, min_keep=113).check_all(infos)
    with pytest.raises(UsageError) as caught:
        Prune(sparsity=0.75, min_keep=0.5).check_all(infos)
    assert "at most 0.25" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"stem\.weight"):
        Prune(sparsity=0.9, min_keep=60, scope="tensor").check_all(infos[::-1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, "leaves nothing"),
        ({"min_keep": 1.5}, "lies below 1"),
        ({"pattern": "2x4"}, "unknown pattern"),
        ({"pattern": "4:4"}, "0 < N < M"),
        ({"pattern": "0:4"}, "0 < N < M"),
        ({"pattern": "2:4", "sparsity": 0.6}, "contradicts"),
        ({"pattern": "2:4", "scope": "tensor"}, "no meaning"),
        ({"pattern": "2:4", "score": "lamp"}, "no meaning"),
        ({"pattern": "2:4", "min_keep": 10}, "no meaning"),
        ({"score": "lamp", "scope": "tensor"}, "scope=tensor"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Prune(**options).validate()


def test_the_default_sparsity_is_written_out() -> None:
    assert Prune().sparsity == 0.5
    assert Prune(pattern="1:4").sparsity == 0.75
    Prune(pattern="1:4", sparsity=0.75).validate()


def test_integers_and_indivisible_columns_are_refused() -> None:
    tensor = make_tensor("odd", np.ones((2, 6), np.float32))
    with pytest.raises(UsageError, match=r"multiple of 4 columns, this has 6"):
        Prune(pattern="2:4").check(tensor.info)
    with pytest.raises(UsageError, match="I32"):
        Prune().check(TensorInfo("n", "f", "I32", (2, 2), 16, role=Role.LINEAR))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_nan_is_named(dtype: str, pattern: str) -> None:
    values = np.ones((6, 8)).astype(DTYPES[dtype])
    values[4, 3] = np.nan
    tensor = make_tensor("bad.weight", values)
    with pytest.raises(InputError, match=r"bad\.weight.* 35 \(row 4, column 3\) is nan"):
        Prune(pattern=pattern).survey(tiles_of(tensor, 3)[1])


def test_an_infinity_is_named() -> None:
    values = np.ones((2, 4), np.float16)
    values[0, 1] = -np.inf
    with pytest.raises(InputError, match=r"is -inf"):
        Prune().survey(make_tensor("w", values))


# ---------------------------------------------------------------- N:M


@settings(max_examples=100, deadline=None)
@given(models(), st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8), (5, 12)]), st.data())
def test_n_of_m(tensors: list[Tensor], n_of_m: tuple[int, int], data: st.DataObject) -> None:
    n, m = n_of_m
    wide = []
    for tensor in tensors:
        values = np.tile(tensor.source, (1, m))
        wide.append(make_tensor(tensor.info.name, values).with_(outliers=tensor.outliers))
    decided, results = run_pass(
        Prune(pattern=f"{n}:{m}"), wide, data.draw(st.sampled_from([None, 1, 2]))
    )
    for tensor, result in zip(wide, results, strict=True):
        scores = magnitudes(tensor)
        expected = np.zeros(scores.shape, np.bool_)
        for row, start in np.ndindex(scores.shape[0], scores.shape[1] // m):
            group = scores[row, start * m : start * m + m]
            order = np.argsort(-group, kind="stable").tolist()
            for place, i in enumerate(order):
                keep = group[i] != 0 and (place < n or np.isinf(group[i]))
                expected[row, start * m + i] = keep
        np.testing.assert_array_equal(result.mask, expected)
        terms = decided.predict(tensor.info, Terms())
        assert terms.nonzeros == (expected.sum(), expected.sum())


# ---------------------------------------------------------------- LAMP


def lamp_counts(tensors: list[Tensor], sparsity: float) -> list[int]:
    """LAMP by its definition: score each weight, rank all of them, count by tensor."""
    total = sum(t.source.size for t in tensors)
    ranked = []
    for which, tensor in enumerate(tensors):
        values = np.sort(np.abs(tensor.source.astype(np.float64)).ravel())[::-1]
        values = values[values != 0]
        above = 0.0
        for position, value in enumerate(values):
            same = int(np.sum(values[:position] == value))
            if not same:
                above = float(np.sum(values[:position] ** 2))
            ranked.append((above / value**2 + same + 1, which))
    ranked.sort()
    budget = min(kept_of(total, sparsity), len(ranked))
    counts = [0] * len(tensors)
    for _, which in ranked[:budget]:
        counts[which] += 1
    return counts


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), SHARES, st.sampled_from([None, 2]))
def test_lamp_counts_on_16_bit_weights(seed: int, sparsity: float, tile_rows: int | None) -> None:
    rng = np.random.default_rng(seed)
    tensors = []
    for index in range(int(rng.integers(1, 5))):
        shape = tuple(rng.integers(1, 12, 2))
        dtype = DTYPES["bf16" if rng.random() < 0.5 else "f16"]
        scale = 2.0 ** rng.integers(-6, 3)
        values = np.round(rng.standard_normal(shape) * 8) / 8 * scale
        tensors.append(make_tensor(f"t{index}", values.astype(dtype)))
    decided, results = run_pass(Prune(sparsity=sparsity, score="lamp"), tensors, tile_rows)
    counts = lamp_counts(tensors, sparsity)
    assert [int(m.sum()) for m in masks_of(results)] == counts
    for mask, expected in zip(masks_of(results), oracle_masks(tensors, counts), strict=True):
        np.testing.assert_array_equal(mask, expected)
    assert decided.facts()["threshold"] is None


def test_lamp_on_float32_keeps_the_exact_total_and_nearly_the_right_split() -> None:
    rng = np.random.default_rng(3)
    tensors = [
        make_tensor(f"t{i}", (rng.standard_normal((40, 50)) * 4.0**-i).astype(np.float32))
        for i in range(4)
    ]
    _, results = run_pass(Prune(sparsity=0.8, score="lamp"), tensors, 7)
    counts = [int(m.sum()) for m in masks_of(results)]
    assert sum(counts) == 1600
    assert np.abs(np.array(counts) - lamp_counts(tensors, 0.8)).max() <= 8
    _, plain = run_pass(Prune(sparsity=0.8), tensors)
    assert masks_of(plain)[3].sum() == 0  # magnitude starves the small layer, LAMP does not


def test_lamp_honours_floors() -> None:
    rng = np.random.default_rng(4)
    tensors = [
        make_tensor(f"t{i}", rng.standard_normal((8, 40)).astype(np.float16)) for i in (0, 1)
    ]
    tensors.append(make_tensor("flat", np.ones((1, 30), np.float16)))
    _, results = run_pass(Prune(sparsity=0.9, score="lamp", min_keep=20), tensors)
    counts = [int(m.sum()) for m in masks_of(results)]
    assert sum(counts) == 67
    assert counts[2] >= 20


# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": 0.7, "min_keep": 100},
        {"sparsity": 0.7, "scope": "tensor"},
        {"sparsity": 0.8, "score": "lamp"},
        {"pattern": "2:4"},
        {"sparsity": 0.0},
    ],
)
def test_the_kit(options: dict[str, Any]) -> None:
    check_pass(Prune, **options)


def test_every_weight_of_a_dense_model_is_kept_at_sparsity_zero() -> None:
    tensor = make_tensor("w", np.full((3, 3), 7, np.float32))
    decided, [result] = run_pass(Prune(sparsity=0.0), [tensor])
    assert result.mask is not None
    assert result.mask.all()
    assert decided.facts()["notes"] == ["nothing pruned"]


def test_bounds_before_the_survey_hold_the_count() -> None:
    tensors = sample_tensors()
    for pass_ in (Prune(sparsity=0.6), Prune(sparsity=0.6, scope="tensor"), Prune(pattern="1:2")):
        _, results = run_pass(pass_, tensors)
        for tensor, mask in zip(tensors, masks_of(results), strict=True):
            bounds = pass_.predict(tensor.info, Terms()).nonzeros
            assert bounds is not None
            assert bounds[0] <= mask.sum() <= bounds[1] <= tensor.source.size


def test_the_state_of_the_selection_stays_small_however_many_tensors() -> None:
    rng = np.random.default_rng(0)
    counts = np.arange(1, 3001, dtype=np.int64)
    bins = np.sort(rng.choice(32768 - 128, 3000, replace=False) + 1).astype(np.uint16)
    tracemalloc.start()
    spill = Spill()
    for index in range(1000):
        spill.add(TileCounts(f"layer.{index}", 0, 64, FLOAT32, 4_501_500, 0, 0, bins, counts))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1 << 20
    assert sum(t.size for t in spill.tensors()) == 4_501_500_000


def test_a_pass_with_its_decision_is_still_the_same_recipe() -> None:
    pass_ = Prune(sparsity=0.6)
    decided, _ = run_pass(pass_, sample_tensors())
    assert decided == pass_
    assert dataclasses.replace(decided, sparsity=0.7) != pass_
