"""Which tensors a pass works on."""

from __future__ import annotations

import pytest

from compress.errors import UsageError
from compress.passes.base import NAMED_ROLES, WEIGHT_ROLES
from compress.patterns import matches, select
from compress.tensor import Role, TensorInfo


def info(name: str, role: Role, shape: tuple[int, ...] = (8, 8), dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name, "model.safetensors", dtype, shape, 4, role=role)


QUERY = info("encoder.layer.0.attention.self.query.weight", Role.LINEAR)
DENSE = info("encoder.layer.10.output.dense.weight", Role.LINEAR)
EMBEDDING = info("embeddings.word_embeddings.weight", Role.EMBEDDING)
NORM = info("encoder.layer.0.norm.weight", Role.NORM, (8,))
BIAS = info("encoder.layer.0.attention.self.query.bias", Role.BIAS, (8,))
RELATIVE = info("position.table", Role.POSITION, (4, 4))
STATE = info("buffer.matrix", Role.STATE, (4, 4))
CODES = info("packed.weight", Role.LINEAR, (4, 4), "I32")
MODEL = [EMBEDDING, QUERY, BIAS, NORM, DENSE, RELATIVE, STATE, CODES]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("encoder.layer.0.attention.self.query.weight", True),
        ("encoder.layer.0.attention.self.query", True),  # the module's name
        ("*query", True),
        ("*.query.weight", True),
        ("encoder.*", True),  # * crosses dots
        ("*Query*", False),
        ("query", False),  # a glob matches in full
        ("encoder.layer.?.attention.*", True),
        ("encoder.layer.[1-9].*", False),
        (r"re:.*\.query", True),
        (r"re:encoder\.layer\.\d+\..*weight", True),
        ("re:query", False),  # a full match
        ("re:.*QUERY", False),
        ("re:encoder", False),
    ],
)
def test_one_pattern(pattern: str, expected: bool) -> None:
    assert matches(pattern, QUERY) is expected


def test_a_glob_does_not_run_past_a_newline_in_a_name() -> None:
    assert not matches("a", info("a\n", Role.LINEAR))


def test_the_module_of_a_bias_is_not_its_layer() -> None:
    assert not matches("*.query", BIAS)


def test_without_targets_the_roles_decide() -> None:
    assert select(MODEL, (), (), WEIGHT_ROLES, NAMED_ROLES) == [QUERY, DENSE]


def test_targets_reach_what_the_defaults_leave_alone_and_nothing_that_is_no_weight() -> None:
    assert select(MODEL, ("embeddings.*", "re:.*layer.*")) == [EMBEDDING, QUERY, DENSE]
    assert select(MODEL, ("position.*",)) == [RELATIVE]
    assert select(MODEL, ("*",)) == [EMBEDDING, QUERY, DENSE, RELATIVE]


def test_ignore_takes_away_from_both() -> None:
    assert select(MODEL, (), ("*dense",)) == [QUERY]
    assert select(MODEL, ("*layer*",), ("re:.*query",)) == [DENSE]


@pytest.mark.parametrize("kind", ["target", "ignore"])
def test_a_pattern_that_matches_nothing_names_the_nearest(kind: str) -> None:
    pattern = "*.word_embedings.weight"
    with pytest.raises(UsageError) as caught:
        select(MODEL, **{"targets" if kind == "target" else "ignore": (pattern,)})  # type: ignore[arg-type]
    assert kind in caught.value.message
    assert pattern in caught.value.message
    assert "embeddings.word_embeddings.weight" in (caught.value.hint or "")


def test_one_of_several_patterns_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="nowhere"):
        select(MODEL, ("*query", "nowhere"))


def test_a_regular_expression_that_misses_by_its_ends_suggests_the_name() -> None:
    with pytest.raises(UsageError) as caught:
        select(MODEL, (r"re:self\.query",))
    assert QUERY.name in (caught.value.hint or "")


def test_a_malformed_regular_expression_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        select(MODEL, ("re:(query",))
    assert "re:(query" in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("pattern", ["*.bias", "*norm*", "buffer.*", "packed"])
def test_a_target_that_matches_only_what_cannot_be_one_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError) as caught:
        select(MODEL, (pattern,))
    assert pattern in caught.value.message


def test_hostile_names_are_shown_escaped() -> None:
    evil = info("a\x1b[31m.weight", Role.LINEAR)
    with pytest.raises(UsageError) as caught:
        select([evil], ("a.weigth",))
    assert "\x1b" not in caught.value.message + (caught.value.hint or "")
