"""Grids: `pass.option=value,value` turned into recipes, one a point of their product."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from compress.errors import UsageError, show
from compress.passes.base import Pass, option_fields
from compress.recipe import Recipe, build_pass, parse_value, split_outside_brackets

OFF = "off"  # the value that leaves the pass out
MAX_POINTS = 1000


@dataclass(frozen=True)
class Axis:
    """One option of one pass, and the values that it takes.

    name    as typed, e.g. "quantize.bits"
    place   of the pass in the recipe
    option  the field's own name
    """

    name: str
    place: int
    option: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Point:
    """One combination: its recipe, or why there is none.

    settings  axis name -> value, those of passes that are left out apart
    """

    settings: Mapping[str, Any]
    recipe: Recipe | None
    error: str | None = None
    key: str = field(default="")

    @property
    def label(self) -> str:
        """What tells it from the others, e.g. "bits=3 rank=8"."""
        words = []
        for name, value in self.settings.items():
            owner, _, option = name.rpartition(".")
            words.append(f"{owner}={OFF}" if value == OFF else f"{option}={_typed(value)}")
        return " ".join(words) or "the recipe"


def parse_axis(text: str, recipe: Recipe) -> Axis:
    """`pass.option=value,value` or `pass[index].option=...`. Raises UsageError."""
    key, equals, rest = text.partition("=")
    match = re.fullmatch(r"\s*([a-z0-9_-]+)(?:\[([0-9]+)\])?\.([A-Za-z0-9_-]+)\s*", key)
    values = [_value(part.strip(), text) for part in split_outside_brackets(rest)]
    if match is None or not equals or not values:
        raise UsageError(
            f"--grid {show(text)}: expected pass.option=value,value",
            hint='e.g. --grid "quantize.bits=2,3,4"',
        )
    name, index, option = match.groups()
    place = _place(name, None if index is None else int(index), recipe, text)
    one = recipe.passes[place]
    return Axis(key.strip(), place, _option(one, option, text), tuple(values))


def points(recipe: Recipe, axes: Sequence[Axis]) -> list[Point]:
    """Every combination once; one whose values do not build a recipe carries the reason.

    Raises UsageError for two axes over one option and for too many points.
    """
    for a, b in itertools.combinations(axes, 2):
        if (a.place, a.option) == (b.place, b.option):
            raise UsageError(
                f"--grid {show(a.name)} is given twice", hint="list all its values in one grid"
            )
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MAX_POINTS:
        raise UsageError(
            f"--grid: {count:,} points, at most {MAX_POINTS:,} are run", hint="use fewer values"
        )
    made: dict[str, Point] = {}
    for values in itertools.product(*(axis.values for axis in axes)):
        point = _point(recipe, axes, values)
        made.setdefault(point.key, point)
    return list(made.values())


def _point(recipe: Recipe, axes: Sequence[Axis], values: Sequence[Any]) -> Point:
    off = {axis.place for axis, value in zip(axes, values, strict=True) if value == OFF}
    settings: dict[str, Any] = {}
    changes: dict[int, dict[str, Any]] = {}
    for axis, value in zip(axes, values, strict=True):
        if axis.place not in off:
            settings[axis.name] = value
            changes.setdefault(axis.place, {})[axis.option] = value
        elif value == OFF:
            settings[axis.name] = OFF
    try:
        passes = []
        for place, (one, entry) in enumerate(
            zip(recipe.passes, recipe.resolved()["passes"], strict=True)
        ):
            if place not in off:
                own = changes.get(place)
                passes.append(one if own is None else build_pass(one.name, entry[one.name] | own))
        made = replace(recipe, passes=tuple(passes))
    except UsageError as error:
        return Point(settings, None, error.message, json.dumps(settings, default=str))
    resolved = made.resolved()
    del resolved["gates"]  # they judge a point and do not change it
    return Point(settings, made, None, json.dumps(resolved, sort_keys=True))


def _place(name: str, index: int | None, recipe: Recipe, text: str) -> int:
    """Where in the recipe the named pass stands."""
    places = [i for i, one in enumerate(recipe.passes) if one.name == name]
    if not places:
        names = list(dict.fromkeys(one.name for one in recipe.passes))
        raise UsageError(
            f"--grid {show(text)}: the recipe has no pass {show(name)}",
            hint=_nearest(name, names),
        )
    if index is None and len(places) > 1:
        raise UsageError(
            f"--grid {show(text)}: the recipe has {len(places)} passes called {name}",
            hint=f"say which one: {name}[0] to {name}[{len(places) - 1}]",
        )
    chosen = index or 0
    if chosen >= len(places):
        raise UsageError(
            f"--grid {show(text)}: there is no {name}[{chosen}]",
            hint=f"the recipe has {len(places)}, counted from 0",
        )
    return places[chosen]


def _option(one: Pass, typed: str, text: str) -> str:
    """The field that an option's spelling means."""
    spellings = {}
    for known in option_fields(type(one)):
        for spelling in (known.name, *known.metadata["aliases"]):
            spellings[spelling] = known.name
    name = typed.replace("-", "_")
    if name not in spellings:
        raise UsageError(
            f"--grid {show(text)}: {one.name} has no option {show(typed)}",
            hint=_nearest(name, list(spellings)),
        )
    return spellings[name]


def _value(part: str, text: str) -> Any:
    """One value: a YAML scalar or a flow list; a glob is text."""
    return parse_value(part, f"--grid {show(text)}")


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean `{close[0]}`?" if close else f"there are: {', '.join(known)}"


def _typed(value: Any) -> str:
    """A value as it is typed."""
    if value is None or isinstance(value, bool | list | dict):
        return json.dumps(value)
    return str(value)
