"""Write docs/passes.md from the passes' dataclasses: `python docs/generate_passes.py`.

A test fails where the file is not what this prints.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from pathlib import Path

from compress.passes import pass_classes
from compress.passes.base import Pass, option_fields

PAGE = Path(__file__).with_name("passes.md")
HEAD = """# Passes

Generated from the dataclasses by `python docs/generate_passes.py`; do not edit.

A pass is written `name:key=value,key=value` on the command line, `- name: {key: value}` in a
recipe, and `--key value` as a command of its own. `targets` and `ignore` take globs, or `re:` and a
regular expression that must match in full; both are tried on the tensor's name and its module's.
"""


def page() -> str:
    """The whole document."""
    return HEAD + "".join(section(name, cls) for name, cls in pass_classes().items())


def section(name: str, cls: type[Pass]) -> str:
    """One pass: what it does, its options as a table."""
    hints = typing.get_type_hints(cls)
    roles = ", ".join(sorted(role.value for role in cls.roles))
    lines = [f"\n## {name}\n", inspect.getdoc(cls) or "", ""]
    lines.append(f"Writes: {cls.writes}. Works on (unless `targets` names others): {roles}.\n")
    lines += ["| option | type | default | |", "|---|---|---|---|"]
    for field in option_fields(cls):
        lines.append(
            f"| `{field.name}` | {type_name(hints[field.name])}{bounds(field)} "
            f"| {default(field)} | {text(field)} |"
        )
    return "\n".join(lines) + "\n"


def type_name(hint: typing.Any) -> str:
    """int, float, text, list: what a user writes."""
    names = {int: "int", float: "number", bool: "true or false", str: "text"}
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) is tuple:
        return "list"
    parts = [names.get(a, "list") for a in typing.get_args(hint) if a is not type(None)]
    return " or ".join(dict.fromkeys(parts))


def bounds(field: dataclasses.Field[typing.Any]) -> str:
    """The range or the choices."""
    meta = field.metadata
    if meta["choices"]:
        return ": " + ", ".join(f"`{c}`" for c in meta["choices"])
    if meta["low"] is not None:
        return f", {meta['low']:g} to {meta['high']:g}" if meta["high"] is not None else (
            f", from {meta['low']:g}"
        )  # fmt: skip
    return ""


def default(field: dataclasses.Field[typing.Any]) -> str:
    """The default as a user would write it."""
    if field.default is dataclasses.MISSING or field.default in (None, ()):
        return "-"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def text(field: dataclasses.Field[typing.Any]) -> str:
    """The help line and other spellings."""
    aliases = field.metadata["aliases"]
    also = f" (also `{'`, `'.join(aliases)}`)" if aliases else ""
    return field.metadata["help"].replace("|", "\\|") + also


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.exit(0)
