r"""Which tensors a pass works on: `targets` and `ignore` patterns against names and roles.

A pattern is a glob (`*.query`), or `re:` and a regular expression that must match in full
(`re:.*layer\.[0-3]\..*`). It is tried against the tensor's name and its module's (the name
without `.weight`). Both are case-sensitive, and a glob's `*` crosses dots. The cost of a regular
expression that backtracks without bound is its author's: patterns come from the user, names
from the file.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

from compress.errors import UsageError, show
from compress.passes.base import NAMED_ROLES, WEIGHT_ROLES
from compress.tensor import Role, TensorInfo

REGEX = "re:"
MATRIX_AXES = 2


@lru_cache(maxsize=1024)
def _compile(pattern: str) -> re.Pattern[str]:
    """The pattern as a compiled expression to match in full. Raises UsageError."""
    if not pattern.startswith(REGEX):
        return re.compile(fnmatch.translate(pattern))
    try:
        return re.compile(pattern.removeprefix(REGEX))
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(
            f"pattern '{show(pattern)}' is not a regular expression: {show(str(error))}",
            hint="escape special characters with a backslash, or write a glob without re:",
        ) from None


def matches(pattern: str, info: TensorInfo) -> bool:
    """Whether the pattern matches the tensor's name or its module's.

    Raises UsageError that names a malformed regular expression.
    """
    expression = _compile(pattern)
    if expression.fullmatch(info.name) is not None:
        return True
    return info.module != info.name and expression.fullmatch(info.module) is not None


def matches_any(patterns: Iterable[str], info: TensorInfo) -> bool:
    """Whether at least one pattern matches the tensor."""
    return any(matches(pattern, info) for pattern in patterns)


def eligible(info: TensorInfo, roles: Collection[Role], *, vectors: bool = False) -> bool:
    """Whether a tensor can be a target at all: floating point, a matrix with weights, a role.

    `vectors`: of passes that work on those instead.
    """
    axes = len(info.shape)
    fits = axes == 1 if vectors else axes >= MATRIX_AXES
    return info.is_float and fits and info.size > 0 and info.role in roles


def select(
    infos: Sequence[TensorInfo],
    targets: Sequence[str] = (),
    ignore: Sequence[str] = (),
    default_roles: Collection[Role] = WEIGHT_ROLES,
    named_roles: Collection[Role] = NAMED_ROLES,
    *,
    vectors: bool = False,
) -> list[TensorInfo]:
    """The tensors a pass works on, in the order of `infos`.

    Without targets: those whose role is one of `default_roles`. With targets: those that match
    one of them and whose role is one of `named_roles`. `ignore` takes tensors away from either.
    Only floating-point tensors of two or more dimensions are ever chosen, with `vectors` only those
    of one.

    Raises UsageError for a malformed pattern, for a pattern that matches no tensor of the
    checkpoint, and for a target that matches only tensors no pass may be pointed at.
    """
    roles = named_roles if targets else default_roles
    for pattern in dict.fromkeys(ignore):
        if not any(matches(pattern, info) for info in infos):
            raise _no_match("ignore", pattern, infos)
    chosen: set[str] = set()
    for pattern in dict.fromkeys(targets):
        matched = [info for info in infos if matches(pattern, info)]
        if not matched:
            raise _no_match("target", pattern, infos)
        fit = [info.name for info in matched if eligible(info, roles, vectors=vectors)]
        if not fit:
            raise _not_eligible(pattern, matched, vectors=vectors)
        chosen.update(fit)
    return [
        info
        for info in infos
        if (info.name in chosen if targets else eligible(info, roles, vectors=vectors))
        and not matches_any(ignore, info)
    ]


def require_matches(kind: str, patterns: Iterable[str], infos: Sequence[TensorInfo]) -> None:
    """Refuse (UsageError) a pattern that matches none of `infos`; `kind` says what it is for."""
    for pattern in patterns:
        if not any(matches(pattern, info) for info in infos):
            raise _no_match(kind, pattern, infos)


def nearest(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names most like what the pattern seems to mean, best first."""
    meant = pattern.removeprefix(REGEX)
    # Wildcards and escapes carry no letters of the name: compare what remains.
    plain = re.sub(r"\.\*|\.\+|[\\*?^$()\[\]|+]", "", meant)
    by_lower: dict[str, str] = {}
    for name in names:
        by_lower.setdefault(name.lower(), name)
    needle = plain.lower()
    inside = [name for low, name in by_lower.items() if needle and needle in low]
    if inside:
        return inside[:count]
    close = difflib.get_close_matches(needle, list(by_lower), n=count, cutoff=0.5)
    if not close:  # a short fragment is unlike every full name: try the names' last parts
        tails = {low.removesuffix(".weight").rsplit(".", 1)[-1]: low for low in by_lower}
        tail_of = needle.strip(".").removesuffix(".weight").rsplit(".", 1)[-1]
        close = [tails[t] for t in difflib.get_close_matches(tail_of, list(tails), count, 0.6)]
    return [by_lower[low] for low in close]


def _no_match(kind: str, pattern: str, infos: Sequence[TensorInfo]) -> UsageError:
    names = nearest(pattern, (info.name for info in infos))
    hint = "list the names with: compress inspect MODEL"
    if names:
        hint = "the nearest names are " + ", ".join(show(name) for name in names)
    return UsageError(f"{kind} pattern '{show(pattern)}' matches no tensor", hint=hint)


def _not_eligible(
    pattern: str, matched: Sequence[TensorInfo], *, vectors: bool = False
) -> UsageError:
    first = matched[0]
    what = "norms or biases" if vectors else "weight matrices"
    hint = (
        "targets of this pass are vectors of floating point: norms, biases, running statistics"
        if vectors
        else "targets are floating-point tensors of two or more dimensions: weights, embeddings, "
        "heads; norms, biases and buffers are kept as they are"
    )
    return UsageError(
        f"target pattern '{show(pattern)}' matches only tensors that are not {what}, "
        f"e.g. {show(first.name)} {list(first.shape)} {first.dtype} ({first.role.value})",
        hint=hint,
    )
