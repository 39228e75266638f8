"""Recipes: what is accepted, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress import strict_yaml
from compress.errors import CompressError, InputError, UsageError
from compress.passes.quantize import Quantize
from compress.recipe import (
    Gate,
    Recipe,
    parse_pass,
    read_recipe,
    recipe_from_mapping,
)
from compress.sweep.grid import parse_axis


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_words_and_yaml_give_the_same_pass(tmp_path: Path) -> None:
    word = parse_pass('quantize:bits=8,group=-1,targets=["re:.*query", "*.key"]')
    text = "passes:\n  - quantize: {bits: 8, group: -1, targets: ['re:.*query', '*.key']}\n"
    assert read_recipe(write(tmp_path, text)).passes == (word,)
    assert isinstance(word, Quantize)
    assert word.targets == ("re:.*query", "*.key")


def test_a_glob_is_not_a_yaml_alias() -> None:
    assert parse_pass("quantize:targets=*query*").targets == ("*query*",)


def test_group_size_is_an_alias_but_not_twice() -> None:
    assert parse_pass("quantize:group_size=32") == parse_pass("quantize:group=32")
    with pytest.raises(UsageError, match="twice"):
        parse_pass("quantize:group_size=32,group=64")


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("quantise", "unknown pass"),
        ("quantize:bit=4", "unknown key bit"),
        ("quantize:bits=9", "out of range"),
        ("quantize:bits=4.5", "whole number"),
        ("quantize:bits=true", "whole number"),
        ("quantize:bits", "key=value"),
        ("quantize:bits=4,bits=8", "given twice"),
        ("quantize:search=msee", "unknown value"),
        ("prune:sparsity=1.5", "sparsity"),
        ("prune:sparsity=.nan", "finite"),
        ("quantize:targets=[&a b, *a]", "anchors"),
        ("quantize:targets=!!python/name:os.system", "tag"),
    ],
)
def test_a_wrong_word_is_named(word: str, what: str) -> None:
    with pytest.raises(CompressError) as caught:
        parse_pass(word)
    assert what in caught.value.message
    assert caught.value.exit_code in (2, 3)


def test_a_misspelt_key_gets_its_neighbour() -> None:
    with pytest.raises(UsageError) as caught:
        parse_pass("quantize:simmetric=true")
    assert caught.value.hint == "did you mean `symmetric`?"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("passes: []", "list of passes"),
        ("passes: [quantize]\nbits: 4", "unknown key bits"),
        ("version: 2\npasses: [quantize]", "version"),
        ("passes: [quantize]\noutput: {format: gguf}", "format"),
        ("passes: [quantize]\nseed: -1", "seed"),
        ("passes: [quantize]\ngates: [{metric: ppl, max: 3}]", "unknown metric"),
        ("passes: [quantize]\ngates: [{metric: bytes}]", "one of"),
        ("passes: [{quantize: {bits: 4}, prune: {}}]", "one name"),
        ("- quantize", "mapping"),
    ],
)
def test_a_wrong_recipe_is_a_usage_error(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_recipe(write(tmp_path, text))
    assert what in caught.value.message
    assert "recipe.yaml" in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "passes: [quantize]\npasses: [prune]",
        "passes: [quantize]\n---\npasses: [prune]",
        "passes: " + "[" * 40 + "]" * 40,
        "a: &x [1]\npasses: *x",
        "passes: !!python/object/apply:os.mkdir ['x']",
        "passes: [quantize",
        "? - {a: b}\n",
        "passes: [{quantize: {overrides: {[1]: 2}}}]",
        "passes: [quantize]\nseed: 2026-11-24",
    ],
)
def test_odd_yaml_is_an_input_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError):
        read_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        f"passes: [quantize]\nseed: 0x{'f' * 5000}\n",  # Python does not write it out
        f"passes: [{{quantize: {{bits: [0x{'f' * 5000}]}}}}]\n",
        f"passes: [quantize]\ngates: [{{metric: bytes, max: {'9' * 400}}}]\n",  # no float holds it
        f"passes: [{{quantize: {{group: {'9' * 41}}}}}]\n",  # `verify` could not read the manifest
    ],
)
def test_vast_integers_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"recipe\.yaml: an integer of more than 64 bits"):
        read_recipe(write(tmp_path, text))


@pytest.mark.parametrize("key", ["version: ", "seed: ", "output: {onnx: "])
def test_errors_quote_long_values_shortened(tmp_path: Path, key: str) -> None:
    end = "}" if "{" in key else ""
    long = "\N{LATIN SMALL LETTER E WITH ACUTE}" * 9000
    text = f"passes: [quantize]\n{key}{long}{end}\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_recipe(tmp_path / "recipe.yaml")
    assert caught.value.message.isascii() and len(caught.value.message) < 400


def test_words_that_are_no_utf_8_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"bits: not UTF-8: \\udcff"):
        parse_pass("quantize:bits=\udcff")
    with pytest.raises(UsageError, match="not UTF-8"):
        parse_pass("quantize:targets=*\udcff*")
    with pytest.raises(UsageError, match="not UTF-8"):
        parse_axis("quantize.bits=\udcff", Recipe((parse_pass("quantize"),)))


def test_bad_yaml_in_a_grid_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--grid"):
        parse_axis("quantize.bits='", Recipe((parse_pass("quantize"),)))


def test_numbers_are_yaml_1_2() -> None:
    assert strict_yaml.loads(b"1e-3", "x") == pytest.approx(0.001)
    assert strict_yaml.loads(b"010", "x") == 10
    assert strict_yaml.loads(b"yes", "x") == "yes"


@pytest.mark.parametrize("version", ["1.1", "1.3", "0.2", "2.0"])
def test_a_directive_changes_no_rules(version: str) -> None:
    assert strict_yaml.loads(b"%YAML 1.2\n---\na: yes\n", "x") == {"a": "yes"}
    with pytest.raises(InputError, match="x: "):
        strict_yaml.loads(f"%YAML {version}\n---\na: yes\n".encode(), "x")
    with pytest.raises(InputError, match="x: "):
        strict_yaml.loads(f"a: yes\nb:\n%YAML {version}\n: 1".encode(), "x")


def test_every_default_is_written_out() -> None:
    resolved = recipe_from_mapping({"passes": ["quantize"]}).resolved()
    options = resolved["passes"][0]["quantize"]
    assert options["bits"] == 4
    assert set(options) >= {"group", "search", "symmetric", "scale_dtype", "targets", "ignore"}
    assert recipe_from_mapping(resolved).passes == (parse_pass("quantize"),)


def test_a_gate_compares_as_it_says() -> None:
    gate = Gate.parse("relative_error>0.1")
    assert gate.fails({"relative_error": 0.11})
    assert not gate.fails({"relative_error": 0.1})
    assert gate.fails({"relative_error": float("nan")})
    assert Gate.parse("sparsity<0.5").fails({"sparsity": 0.4})
    for wrong in ("relative_error", "relative_error>x", "relative_error>>1", "nothing>1"):
        with pytest.raises(UsageError):
            Gate.parse(wrong)
