"""The kit for authors of passes: passes that keep their promises go through, others do not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest

from compress.passes.base import Pass, Terms, option
from compress.tensor import Tensor, TensorInfo
from compress.testing import check_pass, sample_tensors, tiles_of


@dataclass(frozen=True)
class Halve(Pass):
    """Zero the right half of every row."""

    name: ClassVar[str] = "halve"
    writes: ClassVar[str] = "mask"

    divisor: int = option(2, "keep one part in this many", low=1)

    def predict(self, info: TensorInfo, terms: Terms) -> Terms:
        rows, columns = info.matrix_shape
        kept = rows * (columns // self.divisor)
        return replace(terms, nonzeros=(kept, kept), passes=(*terms.passes, self.name))

    def apply(self, tensor: Tensor) -> Tensor:
        mask = np.zeros(tensor.source.shape, np.bool_)
        mask[:, : tensor.source.shape[1] // self.divisor] = True
        return tensor.with_(mask=mask)


def test_a_sound_pass_goes_through() -> None:
    decided, results = check_pass(Halve, divisor=4)
    assert isinstance(decided, Halve)
    assert all(r.mask is not None and r.mask.mean() == 0.25 for r in results)


def refused(cls: type[Pass], words: str, **options: Any) -> None:
    with pytest.raises(AssertionError, match=words):
        check_pass(cls, **options)


def test_a_wrong_prediction() -> None:
    @dataclass(frozen=True)
    class Wrong(Halve):
        """Predicts one too few."""

        def predict(self, info: TensorInfo, terms: Terms) -> Terms:
            right = super().predict(info, terms).nonzeros
            assert right is not None
            return replace(terms, nonzeros=(0, right[1] - 1), passes=("halve",))

    refused(Wrong, "weights kept, not")


def test_another_term_than_declared() -> None:
    @dataclass(frozen=True)
    class Wrong(Halve):
        """Says codes, writes a mask."""

        writes: ClassVar[str] = "codes"

    refused(Wrong, "wrote mask, but declares codes")


def test_a_source_that_is_written() -> None:
    @dataclass(frozen=True)
    class Wrong(Halve):
        """Writes into its input."""

        def apply(self, tensor: Tensor) -> Tensor:
            tensor.source[0, 0] = 0
            return super().apply(tensor)

    with pytest.raises(ValueError, match="read-only"):
        check_pass(Wrong)


def test_a_source_that_is_replaced() -> None:
    @dataclass(frozen=True)
    class Wrong(Halve):
        """Hands on another source."""

        def apply(self, tensor: Tensor) -> Tensor:
            return super().apply(tensor).with_(source=tensor.source * 2)

    refused(Wrong, "replaced the source")


def test_rows_that_depend_on_each_other() -> None:
    @dataclass(frozen=True)
    class Wrong(Halve):
        """Keeps the first rows of what it is given."""

        def apply(self, tensor: Tensor) -> Tensor:
            mask = np.zeros(tensor.source.shape, np.bool_)
            mask.reshape(-1)[: mask.size // 2] = True
            return tensor.with_(mask=mask)

    refused(Wrong, "tiles of 1 rows gave other mask")


def test_chance() -> None:
    rng = np.random.default_rng()

    @dataclass(frozen=True)
    class Wrong(Halve):
        """Another mask each time."""

        def apply(self, tensor: Tensor) -> Tensor:
            rows, columns = tensor.source.shape
            return tensor.with_(
                mask=rng.permuted(np.tile(np.arange(columns) < columns // 2, (rows, 1)), axis=1)
            )

    refused(Wrong, "a second run gave other mask")


def test_decoding_to_infinity() -> None:
    tensors = sample_tensors()
    values = tensors[0].source.copy()
    values[0, 0] = np.inf
    refused(Halve, "NaN or an infinity", tensors=[tensors[0].with_(source=values)])


def test_classes_that_are_no_passes() -> None:
    @dataclass
    class NotFrozen:
        """Can change."""

        name = "x"

    refused(NotFrozen, "not frozen")  # type: ignore[arg-type]

    class NotDecorated(Halve):
        """Forgot the decorator."""

    refused(NotDecorated, "not itself decorated")

    @dataclass(frozen=True)
    class BadDefault(Halve):
        """Its default is out of range."""

        depth: int = option(0, "how deep", low=1)

    refused(BadDefault, "depth: default too low")

    @dataclass(frozen=True)
    class TwoMeanings(Halve):
        """One word for two options."""

        depth: int = option(1, "how deep", aliases=("divisor",))

    refused(TwoMeanings, "divisor means two options")


def test_a_survey_without_end() -> None:
    @dataclass(frozen=True)
    class Wrong(Halve):
        """Never decides."""

        @property
        def wants_survey(self) -> bool:
            return True

        def survey(self, tensor: Tensor) -> int:
            return 1

        def merge(self, a: int, b: int) -> int:
            return a + b

        def decide(self, statistic: Any, infos: list[TensorInfo]) -> Pass:
            return self

    refused(Wrong, "still wants a survey")


def test_facts_that_are_not_json() -> None:
    @dataclass(frozen=True)
    class Wrong(Halve):
        """Reports a numpy number."""

        def facts(self) -> dict[str, Any]:
            return {"count": np.int64(3)}

    refused(Wrong, "not JSON")


def test_tiles_cover_a_tensor_in_order() -> None:
    tensor = sample_tensors()[0]
    tiles = tiles_of(tensor, 5)
    assert [t.first_row for t in tiles] == [0, 5, 10, 15, 20]
    assert np.array_equal(np.concatenate([t.source for t in tiles]), tensor.source)
