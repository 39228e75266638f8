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
class ExportWords:
    """The options of an export as they were typed; None: not given.

    wanted  --onnx, or what says the same
    """

    wanted: bool = False
    style: str | None = None
    accuracy_level: int | None = None
    opset: int | None = None
    tolerance: float | None = None
    activations: str | None = None
    self_contained: bool = False
    image_shape: str | None = None

    def lone(self) -> str | None:
        """An option that means nothing without an export, if one was given."""
        given = {
            "--onnx-style": self.style,
            "--onnx-accuracy-level": self.accuracy_level,
            "--onnx-opset": self.opset,
            "--onnx-tolerance": self.tolerance,
            "--onnx-activations": self.activations,
            "--self-contained": self.self_contained or None,
            "--image-shape": self.image_shape,
        }
        return next((name for name, value in given.items() if value is not None), None)

    def options(self, module: str | None = None) -> ExportOptions:
        """The checked options. Raises UsageError."""
        made = ExportOptions(
            style=Style(self.style or STYLES[0], self.accuracy_level, self.self_contained),
            opset=OPSET if self.opset is None else self.opset,
            module=module,
            image_shape=None if self.image_shape is None else _shape(self.image_shape),
            activations=self.activations or ACTIVATIONS[0],
            tolerance=self.tolerance,
        )
        made.check()
        return made


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
        if self.style.style == "qdq" and self.style.accuracy_level is not None:
            raise UsageError(
                "--onnx-accuracy-level: a graph of --onnx-style qdq has none",
                hint="onnxruntime has session.qdq_matmulnbits_accuracy_level for it",
            )
        if self.style.style == "qdq" and self.opset < OPSET:
            raise UsageError(
                f"--onnx-style qdq needs opset {OPSET}, not {self.opset}",
                hint="leave --onnx-opset out",
            )
        if self.tolerance is not None and not self.tolerance >= 0:
            raise UsageError(f"--onnx-tolerance {self.tolerance}: not a number from 0")


def _shape(text: str) -> tuple[int, int, int]:
    """Height, width and channels, as `32,32,3`. Raises UsageError."""
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise UsageError(
            f"--image-shape {show(text)}: expected height,width,channels", hint="e.g. 224,224,3"
        )
    height, width, channels = (int(part) for part in parts)
    return height, width, channels
