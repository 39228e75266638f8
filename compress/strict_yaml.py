"""YAML from an untrusted file, read strictly: one document of what JSON has, nothing that unfolds.

Aliases can make a short text a huge value, tags name types, and the rest of YAML's types have no
place in a recipe. All of that is refused as it is parsed, before anything is built.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml import events as ev
from ruamel.yaml.error import YAMLError
from ruamel.yaml.parser import Parser
from ruamel.yaml.resolver import VersionedResolver

from compress.errors import InputError, show

MAX_DEPTH = 32
MAX_INTEGER = (1 << 63) - 1
_VERSION = (1, 2)


def loads(raw: bytes, where: str) -> Any:
    """The value of one YAML 1.2 document without aliases, tags or duplicate keys.

    where  what `raw` is, in errors
    Raises InputError.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8") from error
    reader = _Reader(where)
    try:
        value = reader.load(io.StringIO(text))
    except YAMLError as error:
        line = str(getattr(error, "problem", None) or error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        at = f" (line {mark.line + 1})" if mark is not None else ""
        raise InputError(f"{where}: {show(line)}{at}") from error
    except (ValueError, TypeError, AssertionError, RecursionError) as error:
        # The library asserts that a directive names YAML 1.1 or 1.2.
        raise InputError(f"{where}: not a value this tool reads") from error
    _require_plain(value, where)
    return value


class _Reader(YAML):
    """The library's safe reader over a parser that refuses."""

    def __init__(self, where: str) -> None:
        super().__init__(typ="safe", pure=True)
        self.allow_duplicate_keys = False
        self.where = where
        self.Parser = _StrictParser
        self.Resolver = _Resolver

    def official_plug_ins(self) -> list[str]:
        """None: the library would search its folder for them, for every value that is read."""
        return []


class _Resolver(VersionedResolver):
    """Values by the rules of YAML 1.2, whatever a directive further down may say."""

    @property
    def processing_version(self) -> tuple[int, int]:
        """The library would take that of the directive that was scanned last."""
        return _VERSION


class _StrictParser(Parser):
    """Refuses aliases, anchors, tags, second documents and deep nesting where they come."""

    def __init__(self, loader: _Reader) -> None:
        super().__init__(loader)
        self.depth = self.documents = 0

    def get_event(self) -> Any:
        """The next event, which the composer now takes: it is looked at once."""
        event = super().get_event()
        where = self.loader.where
        if isinstance(event, ev.AliasEvent) or getattr(event, "anchor", None):
            raise InputError(f"{where}: YAML anchors and aliases are not allowed")
        tag = getattr(event, "ctag", None) or getattr(event, "tag", None)
        if tag:
            raise InputError(f"{where}: YAML tags are not allowed ({show(str(tag))})")
        if isinstance(event, ev.DocumentStartEvent):
            self.documents += 1
            if event.version is not None and tuple(event.version) != _VERSION:
                raise InputError(f"{where}: a document of another YAML than 1.2")
        elif isinstance(event, ev.MappingStartEvent | ev.SequenceStartEvent):
            self.depth += 1
        elif isinstance(event, ev.MappingEndEvent | ev.SequenceEndEvent):
            self.depth -= 1
        if self.documents > 1:
            raise InputError(f"{where}: one YAML document expected")
        if self.depth > MAX_DEPTH:
            raise InputError(f"{where}: nested deeper than {MAX_DEPTH} levels")
        return event


def _require_plain(value: Any, where: str) -> None:
    """Refuse what JSON does not have: dates, lists as keys; and integers of more than 64 bits."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, Mapping):
            if any(isinstance(key, tuple) for key in item):
                raise InputError(f"{where}: a list as a key")
            todo += [*item, *item.values()]
        elif isinstance(item, list):
            todo += item
        elif isinstance(item, int) and abs(item) > MAX_INTEGER:
            raise InputError(f"{where}: an integer of more than 64 bits")
        elif item is not None and not isinstance(item, str | int | float):
            raise InputError(f"{where}: {show(str(item))} is a {type(item).__name__}, not a value")
