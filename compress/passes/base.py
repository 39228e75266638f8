"""What a pass is: a frozen dataclass whose fields are its arguments, recipe keys, options and docs.

A pass maps a `Tensor` to a `Tensor` and never touches files. A pass with a global decision also
surveys: map (`survey`), associative reduce (`merge`), then `decide` returns the pass that knows.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from compress.errors import UsageError
from compress.tensor import Role, Tensor, TensorInfo

# Roles that every pass works on unless told otherwise.
WEIGHT_ROLES = frozenset({Role.LINEAR, Role.CONV, Role.CONV1D, Role.EXPERTS})
# Roles that a pass may be pointed at by name, beyond those.
NAMED_ROLES = WEIGHT_ROLES | {Role.EMBEDDING, Role.HEAD, Role.POSITION, Role.UNCLEAR, Role.ROUTER}


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
) -> Any:
    """A field of a pass: its default, one line of help, its range or choices, other spellings."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "aliases": aliases}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class CodesSpec:
    """What is known of a tensor's codes before they exist; `group_size` is resolved (>= 1)."""

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: str  # F16, BF16 or F32
    per_tensor: bool = False

    def groups(self, columns: int) -> int:
        """Scales a row has; one where the whole tensor shares a scale."""
        return 1 if self.per_tensor else -(-columns // self.group_size)


@dataclass(frozen=True)
class Terms:
    """The terms a tensor will carry, as far as headers tell: what formats and the plan size.

    `nonzeros` is (at least, at most) kept weights where a mask exists; equal once surveyed.
    `outliers` likewise counts protected entries; `outlier_columns` the distinct columns.
    """

    nonzeros: tuple[int, int] | None = None
    codes: CodesSpec | None = None
    rank: int = 0
    factor_dtype: str = "F16"
    outliers: tuple[int, int] = (0, 0)
    outlier_columns: tuple[int, int] = (0, 0)
    passes: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether the stored weight changes at all; outliers alone leave it as it is."""
        return self.nonzeros is not None or self.codes is not None or self.rank > 0

    @property
    def exact(self) -> bool:
        """Whether nothing about the stored size is left open."""
        return (
            (self.nonzeros is None or self.nonzeros[0] == self.nonzeros[1])
            and self.outliers[0] == self.outliers[1]
            and self.outlier_columns[0] == self.outlier_columns[1]
        )

    def at(self, end: int) -> Terms:
        """The same terms with every open range closed at its low (0) or high (1) end."""
        return dataclasses.replace(
            self,
            nonzeros=None if self.nonzeros is None else (self.nonzeros[end],) * 2,
            outliers=(self.outliers[end],) * 2,
            outlier_columns=(self.outlier_columns[end],) * 2,
        )


@dataclass(frozen=True)
class Pass(ABC):
    """Base of every pass. Subclasses are frozen dataclasses too; fields come from `option`."""

    name: ClassVar[str]  # as typed: "prune"
    writes: ClassVar[str]  # the one term: "mask", "codes", "factors" or "outliers"
    needs: ClassVar[frozenset[str]] = frozenset()  # calibration statistics; empty = data-free
    roles: ClassVar[frozenset[Role]] = WEIGHT_ROLES

    targets: tuple[str, ...] = option(
        (), "only tensors whose name or module matches: a glob, or re: and a full match"
    )
    ignore: tuple[str, ...] = option((), "leave these alone, beside the default exclusions")

    def validate(self) -> None:
        """Check the fields against each other; ranges and choices were checked before.

        Raises UsageError that names the field and the value.
        """

    def check(self, info: TensorInfo) -> None:
        """Refuse a targeted tensor that this pass cannot work on (UsageError), before any work."""

    def check_all(self, infos: list[TensorInfo]) -> None:
        """Refuse the targeted tensors together (UsageError), e.g. a floor that cannot be met."""

    @abstractmethod
    def predict(self, info: TensorInfo, terms: Terms) -> Terms:
        """The terms after this pass, from the header alone or, once decided, exactly."""

    def bind(self, info: TensorInfo, earlier: Sequence[Pass], *, base_stands_alone: bool) -> Pass:
        """The pass as it works on one tensor, after the passes `earlier` that work on it too.

        `base_stands_alone`: the format lets engines run the codes without factors and outliers.
        """
        return self

    def row_wise(self, info: TensorInfo) -> bool:
        """Whether `apply` may be given any range of rows on its own (else the whole matrix)."""
        return True

    @property
    def wants_survey(self) -> bool:
        """True while a sweep over the targets must come before `apply`."""
        return False

    def surveys(self, info: TensorInfo) -> bool:
        """Whether the next sweep has to read this target; the others are not passed to `survey`."""
        return True

    def survey(self, tensor: Tensor) -> Any:
        """A statistic of one tile; None where it tells nothing. It keeps no array of the tile."""
        raise TypeError(f"{self.name} makes no survey")

    def survey_bytes(self, infos: list[TensorInfo]) -> int:
        """Bytes that all sweeps together read, at most; infos are the targets."""
        return sum(i.nbytes for i in infos) if self.wants_survey else 0

    def merge(self, a: Any, b: Any) -> Any:
        """Combine two statistics; associative. Called in order of (tensor, first row)."""
        raise TypeError(f"{self.name} makes no survey")

    def decide(self, statistic: Any, infos: list[TensorInfo]) -> Pass:
        """The pass after a sweep; it may want another. `infos` are its targets in order.

        `statistic` is None where nothing was surveyed.
        """
        raise TypeError(f"{self.name} makes no survey")

    @abstractmethod
    def apply(self, tensor: Tensor) -> Tensor:
        """Write this pass's term. Pure: arrays of the input are not changed."""

    def facts(self) -> dict[str, Any]:
        """What a decided pass found, for the report (JSON types only)."""
        return {}


def option_fields(cls: type[Pass]) -> list[dataclasses.Field[Any]]:
    """The fields that are options (recipe keys), in order; own fields before targets and ignore."""
    fields = [f for f in dataclasses.fields(cls) if "help" in f.metadata]
    shared = {"targets", "ignore"}
    return [f for f in fields if f.name not in shared] + [f for f in fields if f.name in shared]


def refuse(info: TensorInfo, what: str, hint: str) -> UsageError:
    """A UsageError about one tensor."""
    from compress.errors import show

    return UsageError(f"tensor {show(info.name)} {list(info.shape)}: {what}", hint=hint)
