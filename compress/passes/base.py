"""What a pass is: a frozen dataclass whose fields are its arguments, recipe keys, options and docs.

A pass maps a `Tensor` to a `Tensor` and never touches files. A pass with a global decision also
surveys: map (`survey`), associative reduce (`merge`), then `decide` returns the pass that knows.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from compress.errors import UsageError
from compress.tensor import Role, Tensor, TensorInfo

if TYPE_CHECKING:
    from compress.calibrate.statistics import Statistics, TensorStatistics
    from compress.checkpoint import Checkpoint

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
    """What is known of a tensor's codes before they exist; `group_size` is resolved (>= 1).

    While a budget is not shared out yet, it is the choice of the most bytes.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: str  # F16, BF16 or F32
    per_tensor: bool = False
    least: CodesSpec | None = None  # the fewest bytes that an open budget may still turn it into

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
    least_rank: int | None = None  # the lowest that an open budget may still turn `rank` into
    factor_dtype: str = "F16"
    outliers: tuple[int, int] = (0, 0)
    outlier_columns: tuple[int, int] = (0, 0)
    values: bool = False  # other values in the tensor's own dtype and shape, stored as it was
    passes: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether the weight is stored as other arrays; outliers alone leave it as it is."""
        return self.nonzeros is not None or self.codes is not None or self.rank > 0

    @property
    def exact(self) -> bool:
        """Whether nothing about the stored size is left open."""
        return (
            (self.nonzeros is None or self.nonzeros[0] == self.nonzeros[1])
            and self.outliers[0] == self.outliers[1]
            and self.outlier_columns[0] == self.outlier_columns[1]
            and (self.codes is None or self.codes.least is None)
            and self.least_rank is None
        )

    def at(self, end: int) -> Terms:
        """The same terms with every open range closed at its low (0) or high (1) end."""
        codes, rank = self.codes, self.rank
        if codes is not None and codes.least is not None:
            codes = codes.least if end == 0 else dataclasses.replace(codes, least=None)
        if self.least_rank is not None and end == 0:
            rank = self.least_rank
        return dataclasses.replace(
            self,
            codes=codes,
            rank=rank,
            least_rank=None,
            nonzeros=None if self.nonzeros is None else (self.nonzeros[end],) * 2,
            outliers=(self.outliers[end],) * 2,
            outlier_columns=(self.outlier_columns[end],) * 2,
        )


@dataclass(frozen=True)
class Context:
    """What a pass may know of the place it works in.

    base_stands_alone  the format lets engines run the codes without factors and outliers
    statistics         of the tensor's inputs, where there was a calibration
    """

    base_stands_alone: bool = False
    statistics: TensorStatistics | None = None


def _silent(_what: str, _done: int, _total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Outlook:
    """What a pass with a global decision may ask about the whole run before it decides.

    source        the checkpoint that is compressed
    output_bytes  the output's bytes, at least and at most, were this (decided) pass in its place
    tensor_bytes  the same of each of its targets: name -> bytes of all that is stored for it
    trial         a checkpoint whose weights are what this (decided) pass and those before it
                  make of them; compress.engines runs either as a model
    statistics    of the calibration, with its inputs, where there was one
    module        FILE.py:FACTORY of a user's own torch module, where that is the model
    workers       threads to use
    progress      (what, done, in all), for work that takes long
    """

    source: Checkpoint
    output_bytes: Callable[[Pass], tuple[int, int]]
    tensor_bytes: Callable[[Pass], dict[str, tuple[int, int]]]
    trial: Callable[[Pass], Checkpoint]
    statistics: Statistics | None = None
    module: str | None = None
    workers: int = 1
    progress: Callable[[str, int, int], None] = _silent


@dataclass(frozen=True)
class Pass(ABC):
    """Base of every pass. Subclasses are frozen dataclasses too; fields come from `option`."""

    name: ClassVar[str]  # as typed: "prune"
    writes: ClassVar[str]  # the one term: "mask", "codes", "factors", "outliers" or "values"
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

    def check_outlook(self, outlook: Outlook, infos: list[TensorInfo]) -> None:
        """Refuse (UsageError) what the headers of the whole run rule out: before any work."""

    def most_bytes(self, outlook: Outlook, infos: list[TensorInfo]) -> int | None:
        """What a budget that is not shared out holds the output's bytes to, if one does."""
        return None

    def possible(self, infos: list[TensorInfo]) -> list[Pass]:
        """Decided forms that show between them all that the format has to hold.

        None where that is known from the terms before the survey.
        """
        return []

    def warnings(self, calibrated: bool) -> list[str]:
        """What a user should hear before the work, in plain words."""
        return []

    @abstractmethod
    def predict(self, info: TensorInfo, terms: Terms) -> Terms:
        """The terms after this pass, from the header alone or, once decided, exactly."""

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of calibration statistics this pass cannot do without; empty = data-free."""
        return frozenset()

    @property
    def welcomes(self) -> frozenset[str]:
        """Kinds that it makes use of where there is a calibration anyway."""
        return frozenset()

    def follows(self, info: TensorInfo) -> bool:
        """Whether it wants a target's inputs as the compressed layers before give them.

        Its statistics then hold a cross moment (compress/following.py).
        """
        return False

    def bind(self, info: TensorInfo, earlier: Sequence[Pass], context: Context) -> Pass:
        """The pass as it works on one tensor, after the passes `earlier` that work on it too."""
        return self

    def row_wise(self, info: TensorInfo) -> bool:
        """Whether `apply` may be given any range of rows on its own (else the whole matrix)."""
        return True

    def workspace(self, info: TensorInfo) -> int:
        """Bytes that `apply` needs for a tile of this target beside the tile and its terms."""
        return 0

    @property
    def wants_survey(self) -> bool:
        """True while a sweep over the targets must come before `apply`."""
        return False

    def surveys(self, info: TensorInfo) -> bool:
        """Whether the next sweep has to read this target; the others are not passed to `survey`."""
        return True

    def surveys_whole(self, info: TensorInfo) -> bool:
        """Whether the next sweep must see this target in one tile."""
        return False

    def survey(self, tensor: Tensor) -> Any:
        """A statistic of one tile; None where it tells nothing. It keeps no array of the tile.

        It is called on the pass as bound to the tensor.
        """
        raise TypeError(f"{self.name} makes no survey")

    def survey_workspace(self, info: TensorInfo) -> int:
        """Bytes that `survey` needs for a tile of this target beside the tile and its terms."""
        return 0

    def survey_bytes(self, infos: list[TensorInfo]) -> int:
        """Bytes that all sweeps together read, at most; infos are the targets."""
        return sum(i.nbytes for i in infos) if self.wants_survey else 0

    def merge(self, a: Any, b: Any) -> Any:
        """Combine two statistics; associative. Called in order of (tensor, first row)."""
        raise TypeError(f"{self.name} makes no survey")

    def foresee(self, outlook: Outlook) -> Pass:
        """The pass with what it wants to keep of the outlook; called before each `decide`."""
        return self

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
