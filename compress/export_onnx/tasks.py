"""What a model is captured as, and the inputs that it then has: their names, axes and samples."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.checkpoint import Checkpoint, strict_json
from compress.errors import InputError, UsageError, show
from compress.runtime.architecture import require_transformers

DECODER, ENCODER, CLASSIFIER = "decoder", "encoder", "classifier"
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "total"
# The sizes that a model is traced with. None is 0 or 1, and no two are the same or add up to a
# third but for total = past + sequence, so that no axis is mistaken for another.
SAMPLES = {BATCH: 2, SEQUENCE: 3, PAST: 5, TOTAL: 8}

_PREPROCESSING = "preprocessor_config.json"
_MAX_JSON = 1 << 20
_IMAGE = 224  # where nothing tells
_ENCODERS = ("Model", "ForMaskedLM", "ForQuestionAnswering", "ForPreTraining")


@dataclass(frozen=True)
class Input:
    """An input of a captured graph: its name, and for each axis a size or the axis's name."""

    name: str
    axes: tuple[int | str, ...]
    dtype: torch.dtype

    def sample(self) -> torch.Tensor:
        """Ones: right for masks, and in range for token numbers, positions and token types."""
        shape = [SAMPLES[axis] if isinstance(axis, str) else axis for axis in self.axes]
        return torch.ones(shape, dtype=self.dtype)

    def renamed(self, axis: str, name: str) -> Input:
        """The same input with another name for an axis."""
        return replace(self, axes=tuple(name if one == axis else one for one in self.axes))

    def dynamic(self) -> dict[int, Any]:
        """The axes of any size, as `torch.export` wants them."""
        free = torch.export.Dim.DYNAMIC
        return {i: free for i, axis in enumerate(self.axes) if isinstance(axis, str)}


def task_of(model: Any, where: str) -> str:
    """The task of a transformers model by its class.

    Raises UsageError that names the class where it is none of decoder, encoder and classifier.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise _unsupported(name, where, "an encoder-decoder")
    names = require_transformers().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if name in names.values() and model.can_generate():
        return DECODER
    if name.endswith("Classification"):
        return CLASSIFIER
    if name.endswith(_ENCODERS):
        return ENCODER
    raise _unsupported(name, where, "neither a decoder nor an encoder nor a classifier")


def _unsupported(name: str, where: str, what: str) -> UsageError:
    return UsageError(
        f"{show(where)}: {show(name)} is {what}, which cannot be captured as ONNX",
        hint="compress an .onnx file of it instead, or give its code with --module FILE.py:FACTORY",
    )


def inputs_of(model: Any, task: str, checkpoint: Checkpoint) -> list[Input]:
    """The inputs that a model of this task has, without the cache.

    Raises UsageError where its class wants something that is neither text nor an image.
    """
    where = str(checkpoint.path)
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        size = _image_size(model.config, checkpoint)
        channels = getattr(model.config, "num_channels", 3)
        return [Input(main, (BATCH, channels, *size), torch.float32)]
    if main != "input_ids":
        raise _unsupported(type(model).__name__, where, f"a model of {show(main)}")
    text = (BATCH, SEQUENCE)
    found = [Input("input_ids", text, torch.int64)]
    if "attention_mask" in takes:
        length = TOTAL if task == DECODER else SEQUENCE
        found.append(Input("attention_mask", (BATCH, length), torch.int64))
    if task == DECODER and "position_ids" in takes:
        found.append(Input("position_ids", text, torch.int64))
    types = getattr(model.config, "type_vocab_size", None) or 0
    if task != DECODER and "token_type_ids" in takes and types > 1:
        found.append(Input("token_type_ids", text, torch.int64))
    return found


def _image_size(config: Any, checkpoint: Checkpoint) -> tuple[int, int]:
    """Height and width from config.json, else from the file that says how images are prepared."""
    size = _pair(getattr(config, "image_size", None))
    if size is None and _PREPROCESSING in checkpoint.sidecars:
        file = checkpoint.open_sidecar(_PREPROCESSING)
        try:
            fields = strict_json.parse(file.read_all(_MAX_JSON), _PREPROCESSING, floats=True)
        finally:
            file.close()
        if isinstance(fields, dict):
            size = _pair(fields.get("crop_size")) or _pair(fields.get("size"))
    size = size or (_IMAGE, _IMAGE)
    if min(size) < 1:
        raise InputError(f"{show(str(checkpoint.path))}: images of {size[0]} x {size[1]} pixels")
    return size


def _pair(value: Any) -> tuple[int, int] | None:
    """Height and width as configs write them: n, [h, w], {height, width} or {shortest_edge}."""
    if isinstance(value, Mapping):
        value = [value.get(key, value.get("shortest_edge")) for key in ("height", "width")]
    elif type(value) is int:
        value = [value, value]
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(n) is int for n in value):
        return value[0], value[1]
    return None
