"""An evaluation for people: its figures, and how they were measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from compress.errors import show

# Figures that belong together, a line each: (what to call the line, names of its figures).
_LINES = (
    ("perplexity", ("perplexity", "perplexity_reference", "perplexity_ratio")),
    ("to the reference", ("kl", "top1_agreement", "cosine")),
    ("spearman x 100", ("spearman", "spearman_reference", "spearman_drop")),
    ("accuracy %", ("accuracy", "accuracy_reference", "accuracy_drop", "accuracy_drop_error")),
)


def print_evaluation(body: Mapping[str, Any], console: Console) -> None:
    """The whole document of `compress eval`."""
    console.print(Text(show(str(body["model"])), style="bold"))
    if body["reference"] is not None:
        console.print(Text(f"reference {show(str(body['reference']))}"))
    print_figures(body, console)
    for gate in body["failed_gates"]:
        console.print(Text(f"failed: {gate}", style="red"))


def print_figures(body: Mapping[str, Any], console: Console) -> None:
    """The figures, and the data and engines behind them."""
    metrics = body["metrics"]
    for title, names in _LINES:
        there = [n for n in names if n in metrics]
        if there:
            words = ", ".join(f"{_short(n, title)}{metrics[n]:.5g}" for n in there)
            console.print(Text(f"{title}: {words}", style="bold"))
    console.print(Text(f"measured on {described(body)}"))


def described(body: Mapping[str, Any]) -> str:
    """Data, how it was cut, and the engines, in one sentence."""
    data, metrics = body["data"], body["metrics"]
    if data["kind"] == "pairs":
        what = f"{data['pairs']} sentence pairs"
    elif data["kind"] == "images":
        what = f"{data['images']} images"
    else:
        step = "" if data["stride"] is None else f", stride {data['stride']}"
        what = (
            f"{data['windows']} sequences of at most {data['window']} tokens{step},"
            f" {metrics['tokens']:,.0f} tokens scored"
        )
    engines = body["model_engine"]["engine"]
    if body["reference_engine"] is not None and body["reference_engine"]["engine"] != engines:
        engines += f" (reference {body['reference_engine']['engine']})"
    return f"{show(data['file'])}: {what}; engine {engines}"


def _short(name: str, title: str) -> str:
    """A figure's name within its line: without the title's first word."""
    word = title.partition(" ")[0]
    if name == word:
        return ""
    return name.removeprefix(f"{word}_") + " "
