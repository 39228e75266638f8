"""Ranks by tensor under one budget: the part of `low-rank` that shares ranks out.

Rank i of a tensor removes sigma_i^2 of its error, in the metric of the factors; ranks are bought
where they remove most a byte. Errors of outputs are weighed by the mean Fisher information of the
tensor's outputs where the calibration has it (what remains is then an estimate of the model's
divergence); else, and with the plain metric, errors of all tensors count alike.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.calibrate.statistics import OUTPUT_FISHER
from compress.errors import UsageError
from compress.sizes import parse_size
from compress.solvers.allocation import spend
from compress.tensor import Role, Tensor, TensorInfo

if TYPE_CHECKING:
    from compress.passes.base import Outlook
    from compress.passes.low_rank import LowRank

_SEARCHES = 12


def validate(one: LowRank) -> None:
    """Raises UsageError for a rank and budgets that exclude each other, or a budget of nothing."""
    given = [f"{k}={v}" for k in ("rank", "bpw", "size") if (v := getattr(one, k)) is not None]
    if len(given) > 1:
        raise UsageError(
            f"low-rank: {' and '.join(given)} exclude each other", hint="give one of them"
        )
    if one.bpw is not None and not one.bpw > 0:
        raise UsageError(f"low-rank: bpw={one.bpw:g} leaves no rank", hint="e.g. bpw=0.5")
    if one.size is not None:
        parse_size("low-rank: size", one.size)
        if one.allocate != "global":
            raise UsageError(
                f"low-rank: size={one.size} is a budget of all tensors", hint="add allocate=global"
            )
    if one.allocate == "global" and one.bpw is None and one.size is None:
        raise UsageError("low-rank: allocate=global has no budget", hint="give bpw= or size=")


def gains(one: LowRank, tensor: Tensor) -> list[float]:
    """The squared singular values of a tensor's error, largest first, weighed."""
    from compress.passes.low_rank import shared, stack_of

    info = tensor.info
    if tensor.codes is None and tensor.mask is None:
        return []
    error = tensor.source.astype(np.float32) - tensor.with_(factors=None).decode()
    metric = "full" if one.metric == "auto" else one.metric
    metrics = dataclasses.replace(one, metric=metric).metrics_of(info)
    if metrics is not None and info.role is not Role.EXPERTS and len(metrics) > 1:
        metrics = [shared(metrics)]
    experts, rows, _ = stack_of(info)
    found = np.zeros(min(rows, info.matrix_shape[1]))
    for e in range(experts):
        part = error[e * rows : (e + 1) * rows]
        if metrics is not None:
            part = metrics[e].whiten(part)
        thin = part if part.shape[0] <= part.shape[1] else part.T
        # The eigenvalues of a Gram matrix: small ones are lost to rounding, and bought by no one.
        found += np.linalg.eigvalsh((thin @ thin.T).astype(np.float64))[::-1]
    return (np.maximum(found, 0.0) * _weight(one)).tolist()  # type: ignore[no-any-return]


def _weight(one: LowRank) -> float:
    known = one.statistics
    if one.metric == "plain" or known is None or not known.has(OUTPUT_FISHER):
        return 1.0
    return float(known.output_fisher().mean(dtype=np.float64))


def check(one: LowRank, outlook: Outlook) -> None:
    """Refuse (UsageError) a size that the output exceeds without any factor."""
    if one.size is None:
        return
    nbytes = outlook.output_bytes(dataclasses.replace(one, ranks={}))[0]
    if nbytes > parse_size("low-rank: size", one.size):
        raise UsageError(
            f"low-rank: size={one.size} is below the minimum: without any factors the output takes"
            f" {nbytes:,} bytes",
            hint="give a higher budget, or fewer bits to quantize",
        )


def most_bytes(one: LowRank, outlook: Outlook, infos: list[TensorInfo]) -> int:
    """Bytes of the output at most: the size, or with factors of at most `bpw` bits a weight."""
    if one.bpw is None:
        return parse_size("low-rank: size", one.size or 0)
    all_ranks = sum(one.rank_of(i) * one.bytes_a_rank(i) for i in infos)
    allowed = int(one.bpw * sum(i.size for i in infos) / 8)
    return outlook.output_bytes(one)[1] - max(0, all_ranks - allowed)


def decide(one: LowRank, surveyed: Mapping[str, list[float]], infos: list[TensorInfo]) -> LowRank:
    """The pass with a rank for every target and what is to be said of them."""
    rows = [surveyed.get(i.name, []) for i in infos]
    prices = [one.bytes_a_rank(i) for i in infos]
    weights = sum(i.size for i in infos)

    def bought(budget: int) -> LowRank:
        ranks = spend(rows, prices, budget)
        return dataclasses.replace(
            one, ranks={i.name: r for i, r in zip(infos, ranks, strict=True)}
        )

    if one.bpw is not None:
        made = bought(int(one.bpw * weights / 8))
    else:
        made = _within(one, bought, {i.name: p for i, p in zip(infos, prices, strict=True)})
    ranks = [(made.ranks or {})[i.name] for i in infos]
    facts: dict[str, Any] = {
        "budget": f"bpw={one.bpw:g}" if one.bpw is not None else f"size={one.size}",
        "bits_per_weight": 8
        * sum(r * p for r, p in zip(ranks, prices, strict=True))
        / max(1, weights),
        "expected_loss": sum(sum(row[r:]) for row, r in zip(rows, ranks, strict=True)),
        "ranks": [{"rank": r, "tensors": n} for r, n in sorted(Counter(ranks).items())],
    }
    return dataclasses.replace(made, found=facts, outlook=None)


def _within(one: LowRank, bought: Any, prices: Mapping[str, int]) -> LowRank:
    """The ranks that an output of at most `size` bytes has room for, names and headers too."""
    outlook = one.outlook
    if outlook is None:
        raise UsageError("low-rank: size= has no output to count")
    check(one, outlook)
    limit = parse_size("low-rank: size", one.size or 0)
    none = dataclasses.replace(one, ranks={})
    budget = limit - outlook.output_bytes(none)[1]
    for _ in range(_SEARCHES):
        if budget <= 0:
            break
        made: LowRank = bought(budget)
        above = outlook.output_bytes(made)[1] - limit
        if above <= 0:
            return made
        spent = sum(prices[name] * rank for name, rank in (made.ranks or {}).items())
        budget = min(budget, spent) - above
    return none_of(none, prices)


def none_of(one: LowRank, names: Mapping[str, int]) -> LowRank:
    """The pass with rank 0 everywhere."""
    return dataclasses.replace(one, ranks=dict.fromkeys(names, 0))
