"""`low-rank`: what the factors repair, what they cost, and what alternating may do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compress.errors import InputError, UsageError
from compress.passes.base import Context, Terms, option_fields
from compress.passes.low_rank import (
    ALTERNATE_ROUNDS,
    ALTERNATE_WEIGHTS,
    BASE_SQUARED_ERROR,
    BASE_STANDS,
    NOTHING_TO_REPAIR,
    LowRank,
)
from compress.passes.quantize import SQUARED_ERROR, SQUARED_NORM, Quantize
from compress.tensor import Array, Outliers, Role, Tensor, TensorInfo


def tensor(values: Array, role: Role = Role.LINEAR, name: str = "layer.weight") -> Tensor:
    tag = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[values.dtype.name]
    info = TensorInfo(name, "f", tag, values.shape, values.nbytes, role=role)
    return Tensor(info, info.to_matrix(values))


def weights(rows: int = 96, columns: int = 128, seed: int = 0) -> Array:
    """Noise with a few strong directions, as trained matrices have."""
    random = np.random.default_rng(seed)
    noise = random.standard_normal((rows, columns))
    strong = random.standard_normal((rows, 4)) @ random.standard_normal((4, columns))
    return (0.02 * noise + 0.03 * strong).astype(np.float32)


def error(t: Tensor) -> float:
    return float(np.sum((t.source.astype(np.float64) - t.decode()) ** 2))


THREE = Quantize(bits=3, group=32)


@pytest.mark.parametrize("factor_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("pruned", [True, False])
def test_the_factors_take_the_leading_part_of_the_error(factor_dtype: str, pruned: bool) -> None:
    t = tensor(weights())
    if pruned:
        t = t.with_(mask=np.abs(t.source) > np.median(np.abs(t.source)))
    coded = THREE.apply(t)
    done = LowRank(rank=8, factor_dtype=factor_dtype).apply(coded)
    assert done.factors is not None
    assert done.factors.rank == 8
    residual = t.source.astype(np.float64) - coded.decode()
    values = np.linalg.svd(residual, compute_uv=False)
    assert error(done) == pytest.approx(float(np.sum(values[8:] ** 2)), rel=0.01)
    assert done.notes[SQUARED_ERROR] == pytest.approx(error(done), rel=1e-5)
    assert done.notes[BASE_SQUARED_ERROR] == pytest.approx(error(coded), rel=1e-5)
    assert done.notes[SQUARED_NORM] == coded.notes[SQUARED_NORM]
    assert done.codes is coded.codes


def test_int8_factors_are_codes_with_a_scale_for_each_rank() -> None:
    done = LowRank(rank=3, factor_dtype="int8").apply(THREE.apply(tensor(weights())))
    factors = done.factors
    assert factors is not None
    assert factors.b_scale is not None
    assert factors.a_scale is not None
    assert factors.b.dtype == factors.a.dtype == np.int8
    assert factors.b_scale.shape == factors.a_scale.shape == (3,)
    assert factors.b_scale.dtype == np.float32
    assert np.all(np.abs(factors.b).max(axis=0) == 127)
    assert np.all(np.abs(factors.a).max(axis=1) == 127)


def test_factors_repair_pruning_alone() -> None:
    t = tensor(weights())
    t = t.with_(mask=np.abs(t.source) > 0.05)
    done = LowRank(rank=6).apply(t)
    assert done.codes is None
    assert error(done) < 0.9 * error(t)
    assert done.notes[SQUARED_ERROR] == pytest.approx(error(done), rel=1e-5)
    assert done.notes[BASE_SQUARED_ERROR] == pytest.approx(error(t), rel=1e-5)


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize("in_scale", [True, False])
def test_protected_entries_stay_exact_and_spend_no_rank(codes: bool, in_scale: bool) -> None:
    values = weights()
    values[5, 6] = 50.0
    place = np.array([5]), np.array([6])
    t = tensor(values).with_(
        outliers=Outliers(*place, values[place], in_scale), mask=np.abs(values) > 0.05
    )
    if codes:
        t = THREE.apply(t)
    done = LowRank(rank=2).apply(t)
    assert done.decode()[5, 6] == 50
    assert done.factors is not None
    b, a = done.factors.as_float32()
    assert np.abs(b @ a).max() < 1  # the spike is not in the factors
    assert done.notes[SQUARED_ERROR] == pytest.approx(error(done), rel=1e-4)
    assert error(done) < error(t)


def test_an_untouched_tensor_has_nothing_to_repair() -> None:
    t = tensor(weights())
    done = LowRank(rank=4).apply(t)
    assert done.factors is None
    assert done.notes[NOTHING_TO_REPAIR] == 1
    terms = Terms(passes=("super-weights",))
    assert LowRank(rank=4).predict(t.info, terms) == terms


@pytest.mark.parametrize("bits", [3, 4])
def test_alternating_lowers_the_error_and_keeps_the_mask(bits: int) -> None:
    t = tensor(weights())
    mask = np.abs(t.source) > np.median(np.abs(t.source))
    quantizer = Quantize(bits=bits, group=32)
    coded = quantizer.apply(t.with_(mask=mask))
    plain = LowRank(rank=8).apply(coded)
    best = LowRank(rank=8, alternate=3, quantizer=quantizer).apply(coded)
    assert error(best) < 0.97 * error(plain)
    assert best.notes[SQUARED_ERROR] == pytest.approx(error(best), rel=1e-5)
    assert best.notes[ALTERNATE_ROUNDS] >= 1
    assert best.codes is not None
    assert np.all(best.codes.dequantize()[~mask] == 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(16, 32), (40, 32)])
def test_alternating_never_loses_to_its_start(seed: int, shape: tuple[int, int]) -> None:
    quantizer = Quantize(bits=2, group=32)
    coded = quantizer.apply(tensor(weights(*shape, seed=seed)))
    plain = LowRank(rank=1, factor_dtype="int8")
    best = replace(plain, alternate=2, quantizer=quantizer).apply(coded)
    assert error(best) <= error(plain.apply(coded)) * (1 + 1e-9)


def test_a_base_that_must_stand_does_and_one_that_need_not_is_better() -> None:
    t = tensor(weights())  # most of it in 4 directions: the start from W leaves a bare base
    coded = Quantize(bits=3, group=32).apply(t)
    options = LowRank(rank=4, alternate=3, quantizer=THREE)
    free = options.apply(coded)
    assert free.notes[ALTERNATE_WEIGHTS] == 1
    assert free.notes[BASE_SQUARED_ERROR] > 10 * error(coded)
    stands = replace(options, base_must_stand=True).apply(coded)
    assert error(free) < error(stands) <= error(LowRank(rank=4).apply(coded))
    base = error(stands.with_(factors=None))
    assert base <= BASE_STANDS**2 * error(coded)
    assert stands.notes[BASE_SQUARED_ERROR] == pytest.approx(base, rel=1e-5)
    wanted = replace(options, base_must_stand=True, needs_adapter=True).apply(coded)
    assert error(wanted) == error(free)


@pytest.mark.parametrize("in_scale", [True, False])
def test_alternating_keeps_a_protected_weight_in_the_base(in_scale: bool) -> None:
    values = weights()
    values[5, 6] = 2.0
    place = np.array([5]), np.array([6])
    coded = THREE.apply(tensor(values).with_(outliers=Outliers(*place, values[place], in_scale)))
    done = LowRank(rank=4, alternate=2, quantizer=THREE).apply(coded)
    assert done.codes is not None
    assert done.decode()[5, 6] == 2
    in_base = done.codes.dequantize()[5, 6]
    assert in_base == pytest.approx(2.0 if in_scale else 0.0, abs=0.4 if in_scale else 0)
    assert done.notes[SQUARED_ERROR] == pytest.approx(error(done), rel=1e-4)


def test_alternating_without_a_quantizer_is_refused() -> None:
    with pytest.raises(UsageError, match=r"layer\.weight.*alternate=2"):
        LowRank(rank=4, alternate=2).apply(THREE.apply(tensor(weights())))


def test_binding_hands_over_the_quantizer_that_wrote_the_codes() -> None:
    t = tensor(weights())
    mixed = Quantize(bits=4, group=32, overrides=({"targets": ["layer"], "bits": 2},))
    options = LowRank(rank=4, alternate=1)
    bound = options.bind(t.info, [mixed], Context(base_stands_alone=True))
    assert isinstance(bound, LowRank)
    assert bound.base_must_stand
    done = bound.apply(mixed.apply(t))
    assert done.codes is not None
    assert done.codes.bits == 2
    assert done.notes[ALTERNATE_ROUNDS] == 1
    assert options.bind(t.info, [], Context()) == options


def test_fused_experts_are_decomposed_one_by_one() -> None:
    values = np.stack([weights(24, 64, seed=s) for s in range(3)])
    t = THREE.apply(tensor(values, Role.EXPERTS))
    done = LowRank(rank=2).apply(t)
    assert done.factors is not None
    assert done.factors.b.shape == (3, 24, 2)
    assert done.factors.a.shape == (3, 2, 64)
    for e in range(3):
        alone = LowRank(rank=2).apply(THREE.apply(tensor(values[e])))
        np.testing.assert_allclose(done.decode()[24 * e : 24 * (e + 1)], alone.decode(), atol=1e-6)
    assert done.notes[SQUARED_ERROR] == pytest.approx(error(done), rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_apply_is_repeatable_and_pure(dtype: Any) -> None:
    coded = THREE.apply(tensor(weights().astype(dtype)))
    before = coded.source.copy()
    one, two = (LowRank(rank=4).apply(coded) for _ in range(2))
    assert one.factors is not None
    assert two.factors is not None
    np.testing.assert_array_equal(one.factors.b, two.factors.b)
    np.testing.assert_array_equal(one.factors.a, two.factors.a)
    np.testing.assert_array_equal(coded.source, before)


def test_rank_and_budget_exclude_each_other_and_survive_the_resolved_recipe() -> None:
    with pytest.raises(UsageError, match=r"rank=4.*bpw=0\.5"):
        LowRank(rank=4, bpw=0.5).validate()
    with pytest.raises(UsageError, match="bpw=0"):
        LowRank(bpw=0.0).validate()
    for options in (LowRank(), LowRank(bpw=0.5), LowRank(rank=3)):
        written = {f.name: getattr(options, f.name) for f in option_fields(LowRank)}
        LowRank(**written).validate()
        assert LowRank(**written) == options


def test_the_default_rank_is_16() -> None:
    assert LowRank().rank_of(tensor(weights()).info) == 16


@pytest.mark.parametrize("factor_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("shape", [(96, 128), (4096, 14336), (3, 24, 64), (64, 16, 3, 3)])
@pytest.mark.parametrize("bpw", [0.25, 0.5, 1.0, 2.0])
def test_a_budget_buys_the_largest_rank_that_fits(
    factor_dtype: str, shape: tuple[int, ...], bpw: float
) -> None:
    role = {2: Role.LINEAR, 3: Role.EXPERTS, 4: Role.CONV}[len(shape)]
    info = TensorInfo("w", "f", "F32", shape, 0, role=role)
    rank = LowRank(bpw=bpw, factor_dtype=factor_dtype).rank_of(info)
    rows, columns = shape[-2:] if role is Role.EXPERTS else info.matrix_shape
    each = (rows + columns) * (16 if factor_dtype == "fp16" else 8)
    each += 0 if factor_dtype == "fp16" else 64
    assert rank * each <= bpw * rows * columns < (rank + 1) * each


def test_a_budget_too_small_for_rank_1_leaves_the_tensor_alone() -> None:
    coded = THREE.apply(tensor(weights()))
    options = LowRank(bpw=0.1)
    options.check(coded.info)
    done = options.apply(coded)
    assert done.factors is None
    assert done.notes[NOTHING_TO_REPAIR] == 1
    terms = THREE.predict(coded.info, Terms())
    assert options.predict(coded.info, terms) == terms


def test_predict_says_what_apply_writes() -> None:
    coded = THREE.apply(tensor(weights()))
    options = LowRank(rank=5, factor_dtype="int8")
    terms = options.predict(coded.info, THREE.predict(coded.info, Terms()))
    assert (terms.rank, terms.factor_dtype) == (5, "I8")
    assert terms.passes == ("quantize", "low-rank")
    assert not options.row_wise(coded.info)


def test_a_rank_beyond_the_matrix_is_refused_with_the_largest() -> None:
    info = tensor(np.zeros((3, 24, 64), np.float32), Role.EXPERTS).info
    LowRank(rank=24).check(info)
    with pytest.raises(UsageError) as caught:
        LowRank(rank=25).check(info)
    assert "25" in caught.value.message
    assert "layer.weight" in caught.value.message
    assert "rank=24" in (caught.value.hint or "")


def test_factors_too_large_for_fp16_are_refused_and_int8_holds_them() -> None:
    values = weights() * np.float32(1e11)
    coded = Quantize(bits=2, group=32, scale_dtype="fp32").apply(tensor(values))
    with pytest.raises(InputError, match=r"layer\.weight.*fp16") as caught:
        LowRank(rank=2).apply(coded)
    assert "int8" in (caught.value.hint or "")
    done = LowRank(rank=2, factor_dtype="int8").apply(coded)
    assert error(done) < error(coded)


def test_a_weight_that_is_not_finite_is_named_where_no_quantizer_saw_it() -> None:
    values = weights()
    values[7, 9] = np.nan
    t = tensor(values).with_(mask=np.ones(values.shape, np.bool_))
    with pytest.raises(InputError, match=r"\[7, 9\] is nan"):
        LowRank(rank=2).apply(t)
