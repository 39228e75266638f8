"""The engine for .onnx files: inputs by the session's own names, types and shapes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.errors import InputError, UsageError, show
from compress.evaluate.outputs import (
    EMBEDDINGS,
    LOGITS,
    Inputs,
    Runner,
    Step,
    image_values,
    no_step,
)
from compress.tensor import Array

_TYPES: dict[str, Any] = {
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_,
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}  # fmt: skip
_IDS = "input_ids"
# What exporters call the output that holds a vector for every token.
_HIDDEN = (EMBEDDINGS, "hidden_states", "token_embeddings")

_UPDATE = "onnxruntime 1.24 or newer runs every graph; it needs Python 3.11"
OLDEST = (1, 24)  # products of codes of 2 bits, and graphs of today's versions


def is_old(version: str) -> bool:
    """Whether this onnxruntime may not run every graph that is written; not for odd versions."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < OLDEST


class Onnx(Runner):
    """A decoder, an encoder or a classifier as a .onnx file, on the CPU.

    graph  run these bytes in the file's place; data outside of them lies in its folder
    exact  products that onnxruntime makes of DequantizeLinear and MatMul round no activations
    called what errors call it; None: the path
    """

    name = "onnx"

    def __init__(
        self,
        path: Path,
        graph: bytes | None = None,
        *,
        exact: bool = False,
        called: str | None = None,
    ) -> None:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        self._where = called or str(path)
        own = [kind for kind in vars(state).values() if isinstance(kind, type)]
        self._errors: tuple[type[Exception], ...] = (
            RuntimeError,
            ValueError,
            *(kind for kind in own if issubclass(kind, Exception)),
        )
        self.version = onnxruntime.__version__
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # its errors come as exceptions, too
        options.intra_op_num_threads = torch.get_num_threads()
        if exact:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        try:
            if graph is not None:
                folder = os.path.realpath(path.parent)
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", folder
                )
            self.session = onnxruntime.InferenceSession(
                graph or str(path), options, providers=["CPUExecutionProvider"]
            )
        except self._errors as error:
            raise InputError(
                f"{show(self._where)}: onnxruntime {self.version} does not load it:"
                f" {show(str(error), 200)}",
                hint=_UPDATE if is_old(self.version) else None,
            ) from error
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]

    def require_decoder(self) -> None:
        """Raises InputError where no output can be the logits of a decoder."""
        if _IDS not in self.inputs or LOGITS not in self.outputs:
            raise InputError(
                f"{show(self._where)}: no decoder: inputs {_names(self.inputs)}, outputs"
                f" {_names(self.outputs)}",
                hint=f"--text needs a graph from {_IDS} to {LOGITS}",
            )

    def run(
        self, inputs: Sequence[Inputs], wanted: str = LOGITS, step: Step = no_step
    ) -> Iterator[torch.Tensor]:
        """The wanted output for each input."""
        name = self._output(wanted)
        for one in inputs:
            values = self.outputs_of(self.feed(one), [name])[0]
            yield torch.from_numpy(np.asarray(values, np.float32))
            step()

    def outputs_of(self, feed: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
        """The named outputs. Raises InputError where the graph cannot be run on this feed."""
        try:
            return list(self.session.run(list(names), dict(feed)))
        except self._errors as error:
            raise InputError(
                f"{show(self._where)}: onnxruntime cannot run it on this data:"
                f" {show(str(error), 200)}",
                hint="see the shapes and ids of the data, and how long a sequence may be",
            ) from error

    def facts(self) -> dict[str, Any]:
        """Engine and versions, for the record."""
        return super().facts() | {"onnxruntime": self.version}

    def _output(self, wanted: str) -> str:
        names = (LOGITS,) if wanted == LOGITS else _HIDDEN
        found = next((name for name in names if name in self.outputs), None)
        if found is None and _IDS not in self.inputs and wanted == LOGITS:
            found = self.outputs[0]  # a classifier's one output has any name
        if found is None:
            raise InputError(
                f"{show(self._where)}: no output called {' or '.join(names)} (there are"
                f" {_names(self.outputs)})",
                hint="export the model with it",
            )
        return found

    def feed(self, one: Inputs) -> dict[str, Array]:
        """Every input that the graph asks for, in its own type."""
        if _IDS not in one:
            return self._image_feed(one)
        ids = np.asarray(one[_IDS])
        known: dict[str, Array] = {
            _IDS: ids,
            "attention_mask": np.asarray(one.get("attention_mask", np.ones_like(ids))),
            "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
            "token_type_ids": np.asarray(one.get("token_type_ids", np.zeros_like(ids))),
            "use_cache_branch": np.zeros(1, bool),
        }
        feed = {}
        for name, spec in self.inputs.items():
            if name in known:
                feed[name] = np.ascontiguousarray(known[name].astype(self.dtype_of(spec)))
            elif name.startswith(("past_key_values", "past.", "past_key", "past_value")):
                feed[name] = np.zeros(_empty_past(spec.shape, len(ids)), self.dtype_of(spec))
            else:
                raise UsageError(
                    f"{show(self._where)}: it wants an input {show(name)}, which nothing here"
                    " gives",
                    hint=f"inputs that are known: {', '.join(known)}, past_key_values.*",
                )
        return feed

    def _image_feed(self, one: Inputs) -> dict[str, Array]:
        if len(self.inputs) != 1:
            raise UsageError(
                f"{show(self._where)}: it has {len(self.inputs)} inputs"
                f" ({_names(self.inputs)}), a classifier has one",
                hint="use --text or --pairs for models of text",
            )
        ((name, spec),) = self.inputs.items()
        images = self._images(spec, np.asarray(next(iter(one.values()))))
        fixed = [n if isinstance(n, int) else None for n in spec.shape]
        fits = len(fixed) == images.ndim and all(
            n is None or n == m for n, m in zip(fixed[1:], images.shape[1:], strict=False)
        )
        if not fits:
            raise InputError(
                f"{show(self._where)}: images of the shape {list(images.shape[1:])} do not fit its"
                f" input {show(name)} {list(spec.shape)}",
                hint="the first axis counts the images",
            )
        return {name: np.ascontiguousarray(images.astype(self.dtype_of(spec)))}

    def _images(self, spec: Any, images: Array) -> Array:
        """Images as the graph takes them: bytes as they are, else 0 to 1 with channels first."""
        channels_last = len(spec.shape) == 4 and spec.shape[3] == images.shape[3]
        if spec.type == "tensor(uint8)":
            return images if channels_last else images.transpose(0, 3, 1, 2)
        return image_values(images)

    def dtype_of(self, spec: Any) -> Any:
        """The numpy type of an input. Raises InputError for one that numpy has not."""
        if spec.type not in _TYPES:
            raise InputError(
                f"{show(self._where)}: input {show(spec.name)} is {show(spec.type)}, which numpy"
                " has not",
                hint="export the model with float32 or float16 inputs",
            )
        return _TYPES[spec.type]


def _empty_past(shape: Sequence[Any], samples: int) -> list[int]:
    """The shape of a cache of no tokens: [batch, heads, 0, width] with open sizes closed."""
    closed = []
    for axis, size in enumerate(shape):
        if isinstance(size, int):
            closed.append(size)
        else:
            closed.append(samples if axis == 0 else 0)
    return closed


def _names(names: Any) -> str:
    return ", ".join(show(name, 40) for name in list(names)[:8])
