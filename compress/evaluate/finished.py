"""The evaluation in `compress run` and `compress sweep`: a finished output against its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import Checkpoint
from compress.evaluate.command import check_task
from compress.evaluate.data import Request, load_data, same_data
from compress.evaluate.evaluation import Evaluator, Progress
from compress.evaluate.metrics import TEXT
from compress.evaluate.models import check_kind, check_predicts, make_runner
from compress.evaluate.outputs import Runner
from compress.output import open_any


class Evaluation:
    """Data that was read and checked before the work; it may judge many outputs of one source.

    module  FILE.py:FACTORY of a user's own torch module, None for a transformers model
    threads that torch uses; 0 leaves it
    Raises UsageError or InputError where the source cannot be judged on this data.
    """

    def __init__(
        self, source: Checkpoint, request: Request, *, module: str | None = None, threads: int = 0
    ) -> None:
        is_graph = source.graph_path is not None and module is None
        self._engine = "onnx" if is_graph else "decoded" if module is None else "module"
        check_kind(request.kind, [self._engine])
        self.data = load_data(request, source)
        if request.kind == TEXT and self._engine == "decoded":
            check_predicts(source)
        self._request, self._module, self._source = request, module, source
        self._threads = threads
        self._reference: Runner | None = None
        self._evaluator: Evaluator | None = None

    def run(self, folder: Path, progress: Progress) -> dict[str, Any]:
        """Judge the output in `folder`: metrics, data, engines (JSON types)."""
        if self._threads:
            torch.set_num_threads(self._threads)
        with open_any(folder) as output:
            return self.judge(output, progress)

    def judge(self, candidate: Checkpoint, progress: Progress) -> dict[str, Any]:
        """Judge an open checkpoint, such as a trial."""
        if self._evaluator is None:
            self._reference = make_runner(self._source, self._engine, self._module)
            check_task(self._request.kind, [self._reference])
            self._evaluator = Evaluator(self.data, self._reference)
        runner = make_runner(candidate, self._engine, self._module)
        metrics = self._evaluator.run(runner, progress)
        return {"metrics": metrics, **self._evaluator.record(runner)}

    def warnings(self, calibration: dict[str, Any] | None) -> list[str]:
        """What to say of data that the model was calibrated on (its record in the statistics)."""
        if calibration is None or not same_data(calibration, self.data.record):
            return []
        return [
            f"calibrated and evaluated on the same data ({self.data.record['file']}): the figures"
            " flatter the result; evaluate on data of its own"
        ]
