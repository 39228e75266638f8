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
Onnx = Annotated[bool, typer.Option("--onnx", help="Write model.onnx beside the weights, too.")]
OnnxStyle = Annotated[
    str | None,
    typer.Option(help="nbits (MatMulNBits) or qdq (standard operators).", metavar="NAME"),
]
OnnxLevel = Annotated[
    int | None,
    typer.Option(
        "--onnx-accuracy-level", help="0 exact; 4 activations of 8 bits (usual for 2 and 8 bits)."
    ),
]
OnnxOpset = Annotated[
    int | None, typer.Option(help="Opset of a captured graph, 18 to 25 (usual: 21).")
]
OnnxTolerance = Annotated[
    float | None,
    typer.Option(help="Relative error of the outputs above which the run fails (exit 4)."),
]
OnnxActivations = Annotated[
    str | None,
    typer.Option(
        help="auto (8 bits in int8 convolutions, with --images) or float.", metavar="NAME"
    ),
]
SelfContained = Annotated[
    bool, typer.Option("--self-contained", help="Copy every weight into model.onnx.data.")
]
ImageShape = Annotated[
    str | None,
    typer.Option(help="What a --module takes: height,width,channels.", metavar="H,W,C"),
]
StatsFile = Annotated[
    Path | None,
    typer.Option("--stats", help="Statistics of the model's inputs, from compress calibrate."),
]
CalibrateText = Annotated[
    Path | None, typer.Option("--text", help="Calibrate on this UTF-8 text before the work.")
]
CalibrateSentences = Annotated[
    Path | None,
    typer.Option("--sentences", help="Calibrate on sentences: one a line, or a .csv of pairs."),
]
CalibrateIds = Annotated[
    Path | None, typer.Option("--ids", help="Calibrate on token ids (.npy, a row a sample).")
]
CalibrateImages = Annotated[
    Path | None,
    typer.Option("--images", help="Calibrate on images (.npz): of --module, or an .onnx file."),
]
CalibrateSamples = Annotated[
    int | None, typer.Option("--samples", help="Calibration samples at most.", min=1)
]
CalibrateLength = Annotated[
    int | None, typer.Option("--length", help="Tokens of a calibration sample.", min=1)
]
CalibrateDocuments = Annotated[
    bool, typer.Option("--documents", help="Cut --text at blank lines, not every N tokens.")
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
