"""A Hugging Face checkpoint's architecture as a skeleton: an ONNX graph whose weights are names.

The transformers class that config.json names is built without weights and traced once by torch's
exporter; no tensor of the checkpoint is read but integer buffers. What comes out depends on the
config and on the headers alone: the same for a plain checkpoint and for every output made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from compress.checkpoint import Checkpoint
from compress.export_onnx.exporting_model import (
    check_opset,
    export,
    failing_in_one_line,
)  # fmt: skip
from compress.export_onnx.named_weights import NamedWeights
from compress.export_onnx.rewriting import to_skeleton
from compress.export_onnx.tasks import DECODER, SEQUENCE, TOTAL, Input, inputs_of, task_of
from compress.export_onnx.torch_exporter import require_exporter
from compress.export_onnx.wrappers import CacheLayer, Flat, cache_layers
from compress.run import Progress, silent
from compress.runtime.architecture import build
from compress.runtime.loading import WeightLoader

OPSET = 21
_STEP = "capturing the model"


@dataclass(frozen=True)
class Captured:
    """A model as a graph.

    model    the skeleton (onnx.ModelProto); see compress/checkpoint/skeleton.py
    task     "decoder", "encoder" or "classifier"
    inputs   name, axes and dtype of each input, in order: axes are sizes, or the names "batch",
             "sequence", "past" and "total" (past + sequence)
    outputs  the names of the outputs: logits; last_hidden_state and, where the model has it,
             pooler_output; present.N.key and present.N.value behind the logits
    cache    the layers of a decoder's cache; empty where the architecture has none
    cls      the name of the transformers class
    """

    model: Any
    task: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    cache: tuple[CacheLayer, ...]
    cls: str


def capture(checkpoint: Checkpoint, *, opset: int = OPSET, progress: Progress = silent) -> Captured:
    """Capture the architecture of a checkpoint, plain or compressed.

    Raises UsageError where a package is missing, the opset is none that can be written, or the
    architecture is none that can be captured (encoder-decoders); InputError where checkpoint and
    config do not fit, or the model's code cannot be traced.
    """
    require_exporter("transformers")
    check_opset(opset)
    where = str(checkpoint.path)
    progress(_STEP, 0, 2)
    model = build(checkpoint.config, torch.float32, where)
    task = task_of(model, where)
    inputs = inputs_of(model, task, checkpoint)
    weights = NamedWeights(WeightLoader(checkpoint, model, None))
    with failing_in_one_line(where, model):
        # Masks of the fused attentions are minus infinity, which a padded row turns into NaN.
        model.set_attn_implementation("eager")
        cache = cache_layers(model, weights, inputs) if task == DECODER else []
        if not cache:  # a mask is as long as what is read
            inputs = [one.renamed(TOTAL, SEQUENCE) for one in inputs]
        for number, layer in enumerate(cache):
            inputs += layer.inputs(number)
        progress(_STEP, 1, 2)
        named = inputs[: len(inputs) - 2 * len(cache)]
        flat = Flat(model, weights, task, named, len(cache)).eval()
        exported = export(flat, inputs, opset)
    to_skeleton(exported, weights.shapes, inputs, task)
    progress(_STEP, 2, 2)
    return Captured(
        exported, task, tuple(inputs), tuple(flat.seen.outputs), tuple(cache), type(model).__name__
    )
