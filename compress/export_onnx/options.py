"""What can be asked of an export. Imports nothing heavy: the command line checks it at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from compress.errors import UsageError, show
from compress.export_onnx.style import Style

STYLES = ("nbits", "qdq")
LEVELS = (0, 1, 2, 3, 4)
ACTIVATIONS = ("auto", "float")
MIN_OPSET, MAX_OPSET = 18, 25
OPSET = 21


@dataclass(frozen=True)
class ExportOptions:
    """How an output becomes ONNX.

    opset        of a graph that is captured; an .onnx file keeps its own where it can
    module       FILE.py:FACTORY of a user's own torch module
    image_shape  height, width and channels of the images that the module takes
    activations  "auto": of 8 bits in convolutions of 8-bit weights where images are given;
                 "float": never
    tolerance    relative error of the outputs above which the export fails; None: 1e-3 where
                 products are exact, 0.25 where they round activations
    """

    style: Style = field(default_factory=Style)
    opset: int = OPSET
    module: str | None = None
    image_shape: tuple[int, int, int] | None = None
    activations: str = "auto"
    tolerance: float | None = None

    def check(self) -> None:
        """Raises UsageError for a value that is none."""
        if self.style.style not in STYLES:
            raise UsageError(
                f"--onnx-style {show(self.style.style)}: unknown",
                hint=f"one of {', '.join(STYLES)}",
            )
        if self.style.accuracy_level not in (None, *LEVELS):
            raise UsageError(
                f"--onnx-accuracy-level {self.style.accuracy_level}: not 0 to 4",
                hint="0 is exact, 4 rounds activations to 8 bits",
            )
        if self.activations not in ACTIVATIONS:
            raise UsageError(
                f"--onnx-activations {show(self.activations)}: unknown",
                hint=f"one of {', '.join(ACTIVATIONS)}",
            )
        if not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise UsageError(f"--onnx-opset {self.opset}: not {MIN_OPSET} to {MAX_OPSET}")
        if self.style.style == "qdq" and self.opset < OPSET:
            raise UsageError(
                f"--onnx-style qdq needs opset {OPSET}, not {self.opset}",
                hint="leave --onnx-opset out",
            )
        if self.tolerance is not None and not self.tolerance >= 0:
            raise UsageError(f"--onnx-tolerance {self.tolerance}: not a number from 0")
