"""`quantize`: codes, scales, masks, protected entries, options and refusals."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from compress.errors import InputError, UsageError
from compress.passes.base import Terms
from compress.passes.quantize import (
    FLOORED_SCALES,
    PLAIN_SQUARED_ERROR,
    SQUARED_ERROR,
    SQUARED_NORM,
    Quantize,
)
from compress.solvers.baseline import same_bytes
from compress.tensor import DTYPES, Array, Outliers, Role, Tensor, TensorInfo


def tensor(values: Array, name: str = "layer.weight", role: Role = Role.LINEAR) -> Tensor:
    tag = next(t for t, d in DTYPES.items() if d == values.dtype)
    info = TensorInfo(name, "f", tag, values.shape, values.nbytes, role=role)
    return Tensor(info, info.to_matrix(values))


def weights(rows: int = 24, columns: int = 128, dtype: str = "F32", seed: int = 0) -> Array:
    values = np.random.default_rng(seed).standard_normal((rows, columns)) * 0.05
    return values.astype(DTYPES[dtype])


def squared_error(t: Tensor) -> float:
    return float(np.sum((t.source.astype(np.float64) - t.decode().astype(np.float64)) ** 2))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, -1, 0])
def test_codes_are_in_range_and_the_notes_are_what_decoding_measures(
    bits: int, symmetric: bool, group: int
) -> None:
    t = tensor(weights())
    options = Quantize(bits=bits, symmetric=symmetric, group=group)
    done = options.apply(t)
    assert done.codes is not None
    assert done.codes.values.max() < 1 << bits
    assert done.codes.scale.shape == {32: (24, 4), -1: (24, 1), 0: (1, 1)}[group]
    assert done.notes[SQUARED_ERROR] == pytest.approx(squared_error(done), rel=1e-4)
    plain = replace(options, search="none").apply(t)
    assert done.notes[PLAIN_SQUARED_ERROR] == pytest.approx(squared_error(plain), rel=1e-4)
    assert done.notes[SQUARED_ERROR] <= done.notes[PLAIN_SQUARED_ERROR]
    norm = float(np.sum(t.source.astype(np.float64) ** 2))
    assert done.notes[SQUARED_NORM] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [64, -1, 0])
def test_pruned_weights_decode_to_exactly_zero_and_leave_the_scales_alone(
    symmetric: bool, group: int
) -> None:
    values = weights() + np.float32(0.2)  # one sign: a range without 0 would lose the zeros
    mask = np.random.default_rng(1).random(values.shape) < 0.5
    loud = np.where(mask, values, 100 * values)  # what is pruned must not matter
    options = Quantize(bits=4, group=group, symmetric=symmetric)
    one = options.apply(tensor(values).with_(mask=mask))
    other = options.apply(tensor(loud).with_(mask=mask))
    assert one.codes is not None
    assert other.codes is not None
    assert np.all(one.decode()[~mask] == 0)
    np.testing.assert_array_equal(one.codes.scale, other.codes.scale)
    np.testing.assert_array_equal(one.codes.values, other.codes.values)


@pytest.mark.parametrize("in_scale", [True, False])
@pytest.mark.parametrize("group", [32, 0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_protected_entries_are_exact_and_cost_no_error(
    in_scale: bool, group: int, symmetric: bool
) -> None:
    values = weights()
    values[3, 7], values[20, 127] = 9.0, -7.0
    rows, columns = np.array([3, 20]), np.array([7, 127])
    outliers = Outliers(rows, columns, values[rows, columns], in_scale)
    t = tensor(values).with_(outliers=outliers)
    options = Quantize(bits=4, group=group, symmetric=symmetric)
    done = options.apply(t)
    np.testing.assert_array_equal(done.decode()[rows, columns], values[rows, columns])
    assert done.notes[SQUARED_ERROR] == pytest.approx(squared_error(done), rel=1e-4)
    plain = replace(options, search="none").apply(t)
    assert done.notes[PLAIN_SQUARED_ERROR] == pytest.approx(squared_error(plain), rel=1e-4)
    norm = float(np.sum(values.astype(np.float64) ** 2))
    assert done.notes[SQUARED_NORM] == pytest.approx(norm, rel=1e-5)
    # In the scale the base alone holds the spike; outside of it the rest of the group is fine.
    base = done.with_(outliers=None).decode()
    if in_scale:
        assert abs(base[3, 7]) > 4
    else:
        assert np.abs(base).max() < 1
        assert squared_error(done) < 0.3 * squared_error(
            options.apply(t.with_(outliers=replace(outliers, in_scale=True)))
        )


def test_the_source_is_not_changed() -> None:
    values = weights()
    before = values.copy()
    rows = np.array([1])
    out = Outliers(rows, rows, values[rows, rows])
    Quantize(group=64).apply(tensor(values).with_(outliers=out))
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_every_float_type_is_quantized_as_its_float32_values(dtype: str) -> None:
    values = weights(dtype=dtype)
    done = Quantize(bits=4, group=32).apply(tensor(values))
    wide = Quantize(bits=4, group=32).apply(tensor(values.astype(np.float32)))
    assert done.codes is not None
    assert wide.codes is not None
    np.testing.assert_array_equal(done.codes.values, wide.codes.values)
    np.testing.assert_array_equal(done.codes.scale, wide.codes.scale)


@pytest.mark.parametrize("group", [32, -1])
def test_any_range_of_rows_gives_the_rows_of_the_whole(group: int) -> None:
    values = weights()
    options = Quantize(bits=3, group=group, symmetric=False)
    whole = options.apply(tensor(values)).codes
    assert whole is not None
    assert options.row_wise(tensor(values).info)
    for start, stop in ((0, 1), (1, 10), (10, 24)):
        tile = replace(tensor(values), source=values[start:stop], first_row=start)
        part = options.apply(tile).codes
        assert part is not None
        np.testing.assert_array_equal(part.values, whole.values[start:stop])
        np.testing.assert_array_equal(part.scale, whole.scale[start:stop])
    assert not Quantize(group=0).row_wise(tensor(values).info)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("pruned", [True, False])
def test_a_weight_that_is_not_finite_is_named(bad: float, pruned: bool) -> None:
    values = weights()
    values[5, 17] = bad
    t = replace(tensor(values), first_row=100)
    if pruned:
        mask = np.ones(values.shape, np.bool_)
        mask[5, 17] = False
        t = t.with_(mask=mask)
    with pytest.raises(InputError) as caught:
        Quantize(group=32).apply(t)
    assert "layer.weight" in caught.value.message
    assert "[105, 17]" in caught.value.message
    assert str(np.float32(bad)) in caught.value.message
    assert "ignore" in (caught.value.hint or "")


def test_a_double_beyond_float32_is_named_with_its_value() -> None:
    values = weights(dtype="F64")
    values[2, 3] = 1e300
    with pytest.raises(InputError, match=r"\[2, 3\] is 1e\+300, too large for float32"):
        Quantize(group=32).apply(tensor(values))


@pytest.mark.parametrize("search", ["mse", "none"])
def test_a_scale_that_overflows_its_type_is_refused_and_a_wider_one_works(search: str) -> None:
    values = weights()
    values[4, 40] = 1e6
    t = tensor(values)
    with pytest.raises(InputError, match=r"\[4, 32\].*fp16") as caught:
        Quantize(group=32, search=search).apply(t)
    assert "scale_dtype=bf16" in (caught.value.hint or "")
    done = Quantize(group=32, search=search, scale_dtype="bf16").apply(t)
    assert done.codes is not None
    assert done.codes.scale.dtype == ml_dtypes.bfloat16
    assert done.decode()[4, 40] == pytest.approx(1e6, rel=0.1)


def test_groups_too_small_for_their_scale_type_are_counted() -> None:
    values = weights()
    values[:3] *= 1e-6
    assert Quantize(group=64).apply(tensor(values)).notes[FLOORED_SCALES] == 6
    kept = Quantize(group=64, scale_dtype="fp32").apply(tensor(values))
    assert kept.notes[FLOORED_SCALES] == 0
    assert np.any(kept.decode()[0] != 0)


def test_an_indivisible_group_is_refused_with_ways_out_or_resolved() -> None:
    info = tensor(weights(columns=120)).info
    with pytest.raises(UsageError) as caught:
        Quantize(group=64).check(info)
    for part in ("layer.weight", "120", "64"):
        assert part in caught.value.message
    for way in ("group=60", "on_indivisible=channel", "on_indivisible=short"):
        assert way in (caught.value.hint or "")
    for action, shape in (("short", (24, 2)), ("channel", (24, 1))):
        options = Quantize(group=64, on_indivisible=action)
        options.check(info)
        done = options.apply(tensor(weights(columns=120)))
        assert done.codes is not None
        assert done.codes.scale.shape == shape
        spec = options.predict(info, Terms()).codes
        assert spec is not None
        assert spec.groups(120) == shape[1]
        assert done.notes[SQUARED_ERROR] == pytest.approx(squared_error(done), rel=1e-4)


@pytest.mark.parametrize("group", [-1, 0, 120, 60, 1])
def test_groups_that_divide_are_not_refused(group: int) -> None:
    Quantize(group=group).check(tensor(weights(columns=120)).info)


def test_integer_and_empty_tensors_are_refused() -> None:
    for values in (np.zeros((4, 0), np.float32), np.zeros((4, 4), np.int8)):
        with pytest.raises(UsageError, match=r"layer\.weight"):
            Quantize(group=-1).check(tensor(values).info)


def test_predict_is_what_apply_writes() -> None:
    t = tensor(weights())
    options = Quantize(
        bits=4, group=64, overrides=({"targets": "layer", "group_size": -1, "bits": 8},)
    )
    terms = options.predict(t.info, Terms(passes=("prune",)))
    codes = options.apply(t).codes
    assert terms.codes is not None
    assert codes is not None
    assert (terms.codes.bits, terms.codes.group_size) == (8, 128) == (codes.bits, codes.group_size)
    assert terms.codes.scale_dtype == "F16"
    assert terms.passes == ("prune", "quantize")


def test_the_first_matching_override_wins() -> None:
    options = Quantize(
        bits=4,
        overrides=({"targets": ["*.out"], "bits": 8}, {"targets": ["re:.*"], "bits": 2}),
    )
    out, other = (tensor(weights(), f"{n}.weight").info for n in ("a.out", "a.in"))
    assert options.for_tensor(out).bits == 8
    assert options.for_tensor(other).bits == 2
    assert options.for_tensor(out).group == 128
    options.check_all([out, other])
    with pytest.raises(UsageError, match=r"\*\.out"):
        options.check_all([other])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"bits": 8}, "targets"),
        ({"targets": []}, "targets"),
        ({"targets": [3], "bits": 8}, "patterns"),
        ({"targets": ["a"]}, "changes nothing"),
        ({"targets": ["a"], "bit": 8}, "bit"),
        ({"targets": ["a"], "bits": 9}, "9"),
        ({"targets": ["a"], "bits": True}, "True"),
        ({"targets": ["a"], "bits": "8"}, "8"),
        ({"targets": ["a"], "search": "best"}, "best"),
        ({"targets": ["a"], "group": -2}, "-2"),
        ({"targets": ["a"], "group": 8, "group_size": 8}, "twice"),
        ({"targets": ["a"], "overrides": []}, "overrides"),
        (["a"], "mapping"),
    ],
)
def test_bad_overrides_are_refused(override: object, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        Quantize(overrides=(override,)).validate()  # type: ignore[arg-type]
    assert expected in caught.value.message
    assert "overrides[0]" in caught.value.message


@pytest.mark.parametrize(("role", "shape"), [(Role.CONV, (8, 4, 3, 3)), (Role.CONV1D, (32, 8))])
def test_convolutions_and_transposed_linears_are_seen_as_matrices(
    role: Role, shape: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    t = tensor(values, role=role)
    options = Quantize(bits=8, group=-1)
    options.check(t.info)
    back = t.info.from_matrix(options.apply(t).decode())
    assert back.shape == shape
    np.testing.assert_allclose(back, values, atol=0.02)


def test_eight_bit_channels_decode_like_compressed_tensors() -> None:
    torch = pytest.importorskip("torch")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    scheme = pytest.importorskip("compressed_tensors.quantization")
    done = Quantize(bits=8, group=-1).apply(tensor(weights()))
    assert done.codes is not None
    arguments = scheme.QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")
    signed = torch.from_numpy(done.codes.values.astype(np.int16) - 128).to(torch.int8)
    theirs = forward.dequantize(
        signed,
        torch.from_numpy(done.codes.scale.astype(np.float32)),
        args=arguments,
        dtype=torch.float32,
    )
    np.testing.assert_array_equal(theirs.numpy(), done.decode())


class TestSameBytes:
    def test_a_budget_that_more_bits_fit_takes_them(self) -> None:
        found = same_bytes(weights(), budget_bits_per_weight=5.5, group_size=64)
        assert found is not None
        assert (found.bits, found.group_size) == (5, 32)
        assert found.bits_per_weight == 5.5
        done = Quantize(bits=5, group=32).apply(tensor(weights()))
        assert found.squared_error == pytest.approx(done.notes[SQUARED_ERROR])
        assert not found.sampled

    def test_nothing_fits_less_than_two_bits(self) -> None:
        assert same_bytes(weights(), budget_bits_per_weight=2.1, group_size=64) is None
        channel = same_bytes(weights(), budget_bits_per_weight=2.125, group_size=64)
        assert channel is not None
        assert (channel.bits, channel.group_size) == (2, -1)

    def test_a_budget_is_never_exceeded(self) -> None:
        values = weights(columns=120)
        for budget in np.linspace(2.2, 12, 23):
            found = same_bytes(values, budget_bits_per_weight=float(budget), group_size=40)
            assert found is not None
            assert found.bits_per_weight <= budget

    def test_large_matrices_are_sampled_and_say_so(self) -> None:
        values = weights(4096, 1024)
        found = same_bytes(values, budget_bits_per_weight=4.25, group_size=64)
        assert found is not None
        assert found.sampled
        full = Quantize(bits=4, group=64).apply(tensor(values)).notes
        assert found.squared_error == pytest.approx(full[SQUARED_ERROR], rel=0.01)
        relative = np.sqrt(full[SQUARED_ERROR] / full[SQUARED_NORM])
        assert found.relative_error == pytest.approx(relative, rel=0.01)

    def test_an_unusable_matrix_has_no_baseline(self) -> None:
        values = weights()
        values[0, 0] = np.nan
        assert same_bytes(values, budget_bits_per_weight=4.5, group_size=64) is None
        assert same_bytes(values[:0], budget_bits_per_weight=4.5, group_size=64) is None
