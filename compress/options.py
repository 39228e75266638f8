"""Options that more than one command takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Pickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .pt/.pth/.th/.bin files, in a limited child.")
]
FailIf = Annotated[
    list[str] | None,
    typer.Option("--fail-if", help='A gate, e.g. "relative_error>0.1"; exit 4 when it holds.'),
]
ReportFile = Annotated[
    Path | None, typer.Option("--report", help="Write the report (JSON) here, gate or not.")
]
EvalText = Annotated[
    Path | None,
    typer.Option("--eval-text", help="Evaluate the result on this text (or .npy of token ids)."),
]
EvalPairs = Annotated[
    Path | None, typer.Option("--eval-pairs", help="Evaluate it on sentence pairs (.csv).")
]
EvalImages = Annotated[
    Path | None, typer.Option("--eval-images", help="Evaluate it on labelled images (.npz).")
]
EvalWindow = Annotated[
    int | None, typer.Option("--eval-window", help="Tokens of a sequence, BOS included.", min=2)
]
EvalSamples = Annotated[
    int | None, typer.Option("--eval-samples", help="Sequences, pairs, images at most.", min=1)
]
Module = Annotated[
    str | None,
    typer.Option(
        help="Your own torch module: its code is run, as you are.", metavar="FILE.py:FACTORY"
    ),
]
