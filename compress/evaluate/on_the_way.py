"""`compress run --eval-text` and its like: from options to what judges the finished stage.

torch is imported only where there is something to evaluate on.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.terminal import leave_threads_to_torch

if TYPE_CHECKING:
    from compress.checkpoint import Checkpoint
    from compress.evaluate.data import Request
    from compress.evaluate.finished import Evaluation
    from compress.plan import Options


@dataclass(frozen=True)
class EvaluateOn:
    """The options --eval-text, --eval-pairs, --eval-images, --eval-window and --eval-samples."""

    text: Path | None = None
    pairs: Path | None = None
    images: Path | None = None
    window: int | None = None
    samples: int | None = None

    def request(self) -> Request | None:
        """What they ask for, None where none is given. Raises UsageError."""
        if all(value is None for value in astuple(self)):
            return None
        import numpy  # noqa: F401 (its BLAS keeps the one thread that it was started with)

        leave_threads_to_torch()
        from compress.evaluate.data import request_of

        return request_of(
            self.text, self.pairs, self.images, window=self.window, samples=self.samples
        )


def prepared(
    checkpoint: Checkpoint, request: Request | None, options: Options
) -> Evaluation | None:
    """The data, read and checked. Raises UsageError, InputError."""
    if request is None:
        return None
    from compress.evaluate.finished import Evaluation

    return Evaluation(checkpoint, request, module=options.module, threads=options.jobs)
