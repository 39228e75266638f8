"""An .onnx file that shows the inputs of its weights: as it is, with further outputs.

The file was checked when its checkpoint was opened; only operators that onnxruntime brings are run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint import Checkpoint
from compress.checkpoint.files import open_inside
from compress.checkpoint.onnx_file import parse
from compress.checkpoint.onnx_uses import Use, weights_of_graph
from compress.checkpoint.skeleton import MAX_BYTES
from compress.errors import ResourceError, UsageError, show


@dataclass(frozen=True)
class OnnxGraph:
    """What calibration knows of a checkpoint that is an .onnx file.

    uses    the inputs that weights are multiplied with, by initializer, in the order of the nodes
    inputs  names of the graph's own inputs
    """

    path: Path
    model: Any
    uses: dict[str, tuple[Use, ...]]
    inputs: frozenset[str]

    def exposed(self, values: Sequence[str]) -> bytes:
        """The file's graph with these values as further outputs. Raises ResourceError."""
        from onnx import GraphProto, ModelProto, ValueInfoProto

        path = self.path
        present = {output.name for output in self.model.graph.output}
        more = [ValueInfoProto(name=value) for value in values if value not in present]
        file = open_inside(os.path.realpath(path.parent), path.name)
        try:
            raw = file.read_all(MAX_BYTES)
        finally:
            file.close()
        # Two messages one behind the other are one, with the outputs of both.
        raw += ModelProto(graph=GraphProto(output=more)).SerializeToString()
        if len(raw) > MAX_BYTES:
            raise ResourceError(f"{show(str(path))}: the graph does not fit 2 GB")
        return bytes(raw)


def onnx_graph(checkpoint: Checkpoint) -> OnnxGraph:
    """The graph of a checkpoint. Raises UsageError where it is no .onnx file."""
    if checkpoint.graph is None or checkpoint.graph_path is None:
        raise UsageError(f"{show(str(checkpoint.path))}: no .onnx file")
    model = parse(checkpoint.graph, show(str(checkpoint.path)))
    weights = weights_of_graph(model)
    return OnnxGraph(
        checkpoint.graph_path,
        model,
        {name: weight.uses for name, weight in weights.items() if weight.uses},
        frozenset(value.name for value in model.graph.input),
    )
