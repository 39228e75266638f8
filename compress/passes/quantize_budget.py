"""Widths by tensor under a budget: the part of `quantize` that shares bits out.

Tensors that engines fuse are one unit (`fuse`). In a survey every unit is quantized at each width
by the pass's own solver, after the passes before it, and the error is weighed
(compress/passes/width_losses.py); or the model is run with one unit at a time at a width
(measured_widths.py). The least sum within the budget is found by
`compress/solvers/allocation.py`. Sums of losses of units choose well and predict badly, so `max_kl`
measures the whole model and adjusts.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.calibrate.statistics import DIAGONAL, INPUTS, OUTPUT_FISHER
from compress.errors import UsageError
from compress.passes.width_losses import FISHER, OUTPUTS, WEIGHTS, Losses
from compress.related import fused_sets
from compress.sizes import parse_size
from compress.solvers.allocation import allocate, total
from compress.tensor import DTYPES, TensorInfo

if TYPE_CHECKING:
    from compress.passes.base import CodesSpec, Outlook
    from compress.passes.quantize import Quantize

KL = "kl"
SENSITIVITIES = (KL, FISHER, OUTPUTS, WEIGHTS)
Choice = tuple[int, int]  # bits, group
_SEARCHES = 12


# -- options ---------------------------------------------------------------------------------


def validate(one: Quantize) -> None:
    """Raises UsageError for budgets that exclude each other, and options that do not fit."""
    given = {k: v for k in ("bpw", "size", "max_kl") if (v := getattr(one, k)) is not None}
    if len(given) > 1:
        shown = " and ".join(f"{k}={v}" for k, v in given.items())
        raise UsageError(f"quantize: {shown} exclude each other", hint="give one budget")
    if not given and (one.groups or one.sensitivity != "auto" or not one.fuse):
        raise UsageError(
            "quantize: groups, sensitivity and fuse have no meaning without a budget",
            hint="give bpw=, size= or max_kl=",
        )
    if one.max_kl is not None and (one.follow or any(o.get("follow") for o in one.overrides)):
        raise UsageError(
            "quantize: max_kl measures trials, and follow=true makes other weights than they have",
            hint="leave follow out, or give bpw= or size=",
        )
    for key, value in given.items():
        if key == "size":
            size_of(one)
        elif not value > 0:
            raise UsageError(f"quantize: {key}={value:g} leaves nothing", hint="e.g. bpw=4.25")
    for key, low, high in (("widths", 2, 8), ("groups", -1, 1 << 30)):
        values = getattr(one, key)
        if len(set(values)) < len(values) or not all(low <= v <= high for v in values):
            raise UsageError(f"quantize: {key}={list(values)}: each once, from {low}"
                             + (f" to {high}" if key == "widths" else ""))  # fmt: skip
    if not one.widths:
        raise UsageError("quantize: widths=[] leaves no choice", hint="e.g. widths=[3,4,5]")


def size_of(one: Quantize) -> int:
    """The budget `size` in bytes."""
    return parse_size("quantize: size", one.size or 0)


def needs(one: Quantize) -> frozenset[str]:
    """Kinds of statistics that the budget cannot do without."""
    if not one.budgeted:
        return frozenset()
    kinds = {KL: {INPUTS}, FISHER: {OUTPUT_FISHER, DIAGONAL}, OUTPUTS: {DIAGONAL}}
    asked: set[str] = kinds.get(one.sensitivity, set())
    return frozenset(asked | ({INPUTS} if one.max_kl is not None else set()))


def welcomes(one: Quantize) -> frozenset[str]:
    """Kinds that it makes use of."""
    chooses = one.budgeted and one.sensitivity == "auto"
    return frozenset({OUTPUT_FISHER, DIAGONAL, INPUTS} if chooses else ())


def warnings(one: Quantize, calibrated: bool) -> list[str]:
    """That without a calibration the weights' own errors decide."""
    if calibrated and one.sensitivity != WEIGHTS:
        return []
    return [
        "quantize: the budget is shared out by the weights' own errors, which say little of what "
        "the model loses; a calibration (--text F) measures that"
    ]


def by_bytes(one: Quantize, info: TensorInfo, options: Iterable[Choice]) -> list[Choice]:
    """The options of one tensor that differ there, fewest bytes first."""
    plain = dataclasses.replace(one, overrides=(), bpw=None, size=None, max_kl=None)
    plain = dataclasses.replace(plain, **one.override_of(info))
    found: dict[CodesSpec, tuple[int, Choice]] = {}
    for bits, group in options:
        spec = dataclasses.replace(plain, bits=bits, group=group).spec(info)
        found.setdefault(spec, (_code_bytes(info, spec), (bits, group)))
    return [choice for _, choice in sorted(found.values())]


def _code_bytes(info: TensorInfo, spec: CodesSpec) -> int:
    """Bytes of codes, scales and zero points, each row of codes packed to whole bytes."""
    rows, columns = info.matrix_shape
    groups = spec.groups(columns)
    nbytes = rows * -(-columns * spec.bits // 8)
    scale_rows = 1 if spec.per_tensor else rows
    if not spec.symmetric:
        nbytes += scale_rows * -(-groups * spec.bits // 8)
    return nbytes + scale_rows * groups * DTYPES[spec.scale_dtype].itemsize


# -- the decision ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ledger:
    """Units, their options and what these cost.

    units    tensors that share a choice
    options  by unit, fewest bytes first
    costs    bytes by unit and option
    fixed    bytes of targets without a choice
    weights  of all targets
    """

    units: list[list[TensorInfo]]
    options: list[list[Choice]]
    costs: list[list[int]]
    fixed: int
    weights: int

    @classmethod
    def of(cls, one: Quantize, infos: list[TensorInfo], outlook: Outlook | None) -> Ledger:
        """The ledger of a pass's targets; without an outlook in bytes of the native format."""
        units = units_of(one, infos)
        options = [one.options_of(unit[0]) for unit in units]
        priced = []
        for j in range(max(map(len, options), default=1)):
            priced.append(_prices(one, settled(one, infos, j), infos, outlook))
        costs = [
            [sum(priced[j][i.name] for i in unit) for j in range(len(row))]
            for unit, row in zip(units, options, strict=True)
        ]
        open_ = {i.name for unit in units for i in unit}
        fixed = sum(n for name, n in priced[0].items() if name not in open_)
        return cls(units, options, costs, fixed, sum(i.size for i in infos))

    def choose(self, losses: Sequence[Sequence[float]], budget: int) -> list[int]:
        """By unit the number of its option: the least loss for at most so many bytes in all."""
        return allocate(self.costs, losses, budget - self.fixed) if self.units else []

    def nbytes(self, choice: Sequence[int]) -> int:
        """Bytes of all targets."""
        return self.fixed + int(total(self.costs, choice))

    def named(self, choice: Sequence[int]) -> dict[str, Choice]:
        """(bits, group) by tensor."""
        return {
            info.name: row[j]
            for unit, row, j in zip(self.units, self.options, choice, strict=True)
            for info in unit
        }

    @property
    def least(self) -> int:
        """Bytes with the first option everywhere."""
        return self.fixed + sum(row[0] for row in self.costs)

    @property
    def most(self) -> int:
        """Bytes with the dearest options."""
        return self.fixed + sum(max(row) for row in self.costs)


def units_of(one: Quantize, infos: list[TensorInfo]) -> list[list[TensorInfo]]:
    """Tensors that share a choice, in order of the first of each."""
    by_name = {i.name: i for i in infos if len(one.options_of(i)) > 1}
    together: dict[str, list[TensorInfo]] = {}
    for names in fused_sets(infos) if one.fuse else []:
        members = [by_name[n] for n in names if n in by_name]
        if len({tuple(one.options_of(i)) for i in members}) == 1:
            together |= dict.fromkeys((i.name for i in members), members)
    units = []
    for name, info in by_name.items():
        unit = together.get(name, [info])
        if unit[0] is info:
            units.append(unit)
    return units


def settled(one: Quantize, infos: list[TensorInfo], number: int) -> Quantize:
    """The pass decided with option `number` everywhere, or the last where there are fewer."""
    chosen = {}
    for info in infos:
        options = one.options_of(info)
        chosen[info.name] = options[min(number, len(options) - 1)]
    return dataclasses.replace(one, chosen=chosen)


def possible(one: Quantize, infos: list[TensorInfo]) -> list[Quantize]:
    """Decided forms that a format must hold: each option everywhere, and both ends mixed."""
    count = max((len(one.options_of(i)) for i in infos), default=1)
    forms = [settled(one, infos, j) for j in range(count)]
    if not one.fuse and count > 1:
        mixed = dict(settled(one, infos, 0).chosen or {})
        for names in fused_sets(infos):
            for name in names[1:]:
                if name in mixed:
                    mixed[name] = (forms[-1].chosen or {})[name]
        forms.append(dataclasses.replace(one, chosen=mixed))
    return forms


def check(one: Quantize, outlook: Outlook, infos: list[TensorInfo]) -> None:
    """Refuse (UsageError) a budget below what the cheapest options take, by headers alone."""
    if one.max_kl is not None or one.sensitivity == KL:
        _require_tokens(one, outlook)
    least = settled(one, infos, 0)
    ways = "a higher budget, smaller widths=, a larger group=, or fewer targets"
    if one.size is not None:
        nbytes = outlook.output_bytes(least)[0]
        if nbytes > size_of(one):
            raise UsageError(
                f"quantize: size={one.size} is below the minimum: with the smallest widths"
                f" the output takes {nbytes:,} bytes",
                hint=f"give {ways}",
            )
    if one.bpw is not None:
        weights = sum(i.size for i in infos)
        nbytes = sum(low for low, _ in outlook.tensor_bytes(least).values())
        if 8 * nbytes > one.bpw * weights:
            minimum = math.ceil(8000 * nbytes / weights) / 1000
            raise UsageError(
                f"quantize: bpw={one.bpw:g} is below the minimum: with the smallest widths all that"
                f" is stored (scales, masks, factors) takes {minimum:g} bits a weight",
                hint=f"give {ways}",
            )


def most_bytes(one: Quantize, outlook: Outlook, infos: list[TensorInfo]) -> int | None:
    """Bytes of the output at most: the size, or with all of the targets' `bpw`."""
    if one.size is not None:
        return size_of(one)
    if one.bpw is None:
        return None
    dearest = sum(high for _, high in outlook.tensor_bytes(one).values())
    allowed = int(one.bpw * sum(i.size for i in infos) / 8)
    return outlook.output_bytes(one)[1] - max(0, dearest - allowed)


def _require_tokens(one: Quantize, outlook: Outlook) -> None:
    if outlook.statistics is None or _has_tokens(outlook):
        return  # without statistics at all the plan has refused, or a calibration is to come
    what = "max_kl" if one.max_kl is not None else "sensitivity=kl"
    raise UsageError(
        f"quantize: {what} measures a language model on the calibration's tokens, and there are"
        " none in its statistics",
        hint="calibrate with --text or --ids and this recipe; else give bpw= or size=",
    )


def _has_tokens(outlook: Outlook | None) -> bool:
    if outlook is None or outlook.statistics is None or outlook.module is not None:
        return False
    return outlook.statistics.has_array("inputs/input_ids")


def decide(one: Quantize, surveyed: Mapping[str, Losses], infos: list[TensorInfo]) -> Quantize:
    """The pass with a choice for every target and what is to be said of it."""
    outlook = one.outlook
    if outlook is not None:
        check(one, outlook, infos)  # earlier passes may have decided since
    ledger = Ledger.of(one, infos, outlook)
    kind, table = _losses_of(one, ledger, surveyed)
    facts: dict[str, Any] = {"sensitivity": kind}
    if one.max_kl is not None:
        choice, facts["measured_kl"] = _below(one, ledger, table)
    else:
        choice = _within(one, ledger, table, infos)
    return dataclasses.replace(
        _with(one, ledger, choice, infos),
        found=facts | _facts(one, ledger, choice, table, infos),
        outlook=None,
    )


def _losses_of(
    one: Quantize, ledger: Ledger, surveyed: Mapping[str, Losses]
) -> tuple[str, list[list[float]]]:
    """(measure, losses by unit and option)."""
    from compress.passes import measured_widths

    outlook = one.outlook
    names = [i.name for unit in ledger.units for i in unit]
    known = [k for k in SENSITIVITIES[1:] if all(k in surveyed.get(n, {}) for n in names)]
    wants = one.sensitivity == KL
    if one.sensitivity == "auto" and FISHER not in known and outlook and _has_tokens(outlook):
        wants = measured_widths.is_cheap(outlook, sum(map(len, ledger.options)))
    if wants:
        if outlook is None or not _has_tokens(outlook):
            raise UsageError("quantize: sensitivity=kl has no model to run")
        return KL, measured_widths.Measured(one, outlook).alone(ledger)
    if one.sensitivity == "auto" and known:
        kind = known[0]
    elif one.sensitivity in known:
        kind = one.sensitivity
    else:
        kind = ""
    if kind:
        return kind, [
            [sum(surveyed[i.name][kind][j] for i in unit) for j in range(len(row))]
            for unit, row in zip(ledger.units, ledger.options, strict=True)
        ]
    raise UsageError(
        f"quantize: sensitivity={one.sensitivity} has no statistics for every target",
        hint="calibrate with --for and this recipe, or use sensitivity=weights",
    )


def _within(
    one: Quantize, ledger: Ledger, table: list[list[float]], infos: list[TensorInfo]
) -> list[int]:
    """The best choice within `bpw` or `size`; the latter counts names and headers too."""
    if one.bpw is not None:
        return ledger.choose(table, math.floor(one.bpw * ledger.weights / 8))
    outlook = one.outlook
    if outlook is None:
        raise UsageError("quantize: size= has no output to count")
    limit = size_of(one)
    around = outlook.output_bytes(settled(one, infos, 0))[1] - ledger.least
    budget = limit - around
    for _ in range(_SEARCHES):
        if budget < ledger.least:
            break
        choice = ledger.choose(table, budget)
        above = outlook.output_bytes(_with(one, ledger, choice, infos))[1] - limit
        if above <= 0:
            return choice
        budget = min(budget, ledger.nbytes(choice)) - above
    least = [0] * len(ledger.units)
    nbytes = outlook.output_bytes(_with(one, ledger, least, infos))[1]
    if nbytes > limit:
        raise UsageError(
            f"quantize: size={one.size} is below the minimum: with the smallest widths"
            f" the output takes {nbytes:,} bytes",
            hint="give a higher budget, smaller widths=, a larger group=, or fewer targets; where a"
            " later pass has a budget too, give the size to that one",
        )
    return least


def _below(one: Quantize, ledger: Ledger, table: list[list[float]]) -> tuple[list[int], float]:
    """The fewest bytes whose measured divergence is at most `max_kl`, and that divergence."""
    from compress.passes.measured_widths import Measured

    outlook, limit = one.outlook, one.max_kl
    if outlook is None or limit is None or not _has_tokens(outlook):
        raise UsageError("quantize: max_kl has no model to run")
    measured = Measured(one, outlook)
    low, high = ledger.least, ledger.most
    best = ledger.choose(table, high)
    kl = measured.kl(ledger.named(best))
    if not kl <= limit:
        raise UsageError(
            f"quantize: max_kl={limit:g} cannot be met: with the largest widths the model is"
            f" {kl:.4g} nats per token from its source",
            hint="give a higher max_kl, larger widths=, a smaller group=, or fewer targets",
        )
    for step in range(_SEARCHES):
        outlook.progress("quantize: max_kl", step, _SEARCHES)
        middle = low if step == 0 else (low + high) // 2
        choice = ledger.choose(table, middle)
        found = measured.kl(ledger.named(choice))
        if found <= limit:
            best, kl, high = choice, found, ledger.nbytes(choice)
        else:
            low = middle
        if high - low <= max(1, (ledger.most - ledger.least) // 500):
            break
    return best, kl


def _with(
    one: Quantize, ledger: Ledger, choice: Sequence[int], infos: list[TensorInfo]
) -> Quantize:
    chosen = dict(settled(one, infos, 0).chosen or {}) | ledger.named(choice)
    return dataclasses.replace(one, chosen=chosen)


def _prices(
    one: Quantize, made: Quantize, infos: list[TensorInfo], outlook: Outlook | None
) -> dict[str, int]:
    """Bytes of every target; ranks that a later pass has not decided come on top."""
    if outlook is not None:
        return {name: low for name, (low, _) in outlook.tensor_bytes(made).items()}
    return {i.name: _code_bytes(i, made.spec(i)) for i in infos}


def _facts(
    one: Quantize,
    ledger: Ledger,
    choice: Sequence[int],
    table: list[list[float]],
    infos: list[TensorInfo],
) -> dict[str, Any]:
    made = _with(one, ledger, choice, infos).chosen or {}
    counts: Counter[Choice] = Counter()
    for info in infos:
        counts[made[info.name]] += info.size
    tensors = Counter(made[i.name] for i in infos)
    budget = next(f"{k}={getattr(one, k)}" for k in ("bpw", "size", "max_kl")
                  if getattr(one, k) is not None)  # fmt: skip
    return {
        "budget": budget,
        "bits_per_weight": 8 * ledger.nbytes(choice) / max(1, ledger.weights),
        "expected_loss": total(table, choice),
        "units": len(ledger.units),
        "widths": [
            {"bits": bits, "group": group, "tensors": tensors[bits, group], "weights": weights}
            for (bits, group), weights in sorted(counts.items())
        ],
    }
