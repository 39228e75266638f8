"""Weights that are names: under `torch.export` a parameter is a node without inputs.

The model's parameters are taken out before it is captured. While it runs under the exporter, each
place holds the output of a node

    compress::Weight()   name = the stored tensor's name   -> float32 of the tensor's shape

so that the graph says where a tensor is used, no weight is ever in memory, and no exporter can fold
one into a constant. A product with a weight is the node `compress::Linear` (see
compress/checkpoint/skeleton.py); GPT-2's Conv1D, whose weight is stored [in, out], is one with the
attribute transposed = 1.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.checkpoint.skeleton import DOMAIN, LINEAR
from compress.runtime.loading import WeightLoader

WEIGHT = "Weight"
_PATCHING = threading.Lock()


@dataclass(frozen=True)
class _Place:
    """Where a weight goes: an entry of a module's parameters or buffers."""

    entries: dict[str, Any]
    attribute: str
    name: str  # of the stored tensor


class NamedWeights:
    """The weights of a model of `compress.runtime.architecture.build`, taken out of it.

    The buffers that the checkpoint holds are read where they are integers (the exporter computes
    with them); those of floating point are weights as parameters are. `shapes` has the shape of
    every weight by the stored tensor's name. Raises InputError where the checkpoint lacks a
    parameter of the model, or has it in another shape.
    """

    def __init__(self, loader: WeightLoader) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: list[_Place] = []
        self._made: dict[int, torch.Tensor] = {}
        missing = []
        for name, tied in loader.slots.items():
            slot = next(slot for slot in tied if slot.name == name)
            info = loader.source(slot)
            if info is None:
                missing.append(name)
            else:
                self.shapes[info.name] = info.shape
                self._places.append(_Place(slot.module._parameters, slot.attribute, info.name))
        loader.require(missing)
        self._take_buffers(loader)
        for place in self._places:
            place.entries[place.attribute] = None

    def _take_buffers(self, loader: WeightLoader) -> None:
        for info in loader.checkpoint.infos():
            target = loader.targets[info.name]
            buffer = loader.buffers.get(target)
            if buffer is None:
                continue
            if buffer.is_floating_point() and tuple(buffer.shape) == info.shape:
                path, _, attribute = target.rpartition(".")
                module = loader.model.get_submodule(path)
                self.shapes[info.name] = info.shape
                self._places.append(_Place(module._buffers, attribute, info.name))
            else:
                loader.fill(info)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it lasts the model holds nodes for its weights; to be entered under the exporter.

        `torch.nn.functional.linear` and Conv1D are replaced for products with these weights; what
        another thread multiplies goes the usual way.
        """
        from transformers.pytorch_utils import Conv1D

        with _PATCHING:
            self._put()
            linear, conv1d = nn.functional.linear, Conv1D.forward
            nn.functional.linear = self._linear(linear)
            Conv1D.forward = self._conv1d(conv1d)  # type: ignore[method-assign]
            try:
                yield
            finally:
                nn.functional.linear = linear
                Conv1D.forward = conv1d  # type: ignore[method-assign]
                self._made = {}
                for place in self._places:
                    place.entries[place.attribute] = None

    def _put(self) -> None:
        nodes = {
            name: _node(WEIGHT, (), {"name": name}, shape) for name, shape in self.shapes.items()
        }
        self._made = {id(node): node for node in nodes.values()}
        for place in self._places:
            place.entries[place.attribute] = nodes[place.name]

    def _linear(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
            if id(weight) not in self._made:
                return original(x, weight, bias)
            return self._product(x, weight, bias, weight.shape[0], {})

        return linear

    def _conv1d(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(module: Any, x: torch.Tensor) -> Any:
            if id(module.weight) not in self._made:
                return original(module, x)
            columns = module.weight.shape[1]
            return self._product(x, module.weight, module.bias, columns, {"transposed": 1})

        return forward

    def _product(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, columns: int,
        attributes: dict[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        inputs = [x, weight]
        named = bias is not None and id(bias) in self._made
        if bias is not None and named:
            inputs.append(bias)
        made = _node(LINEAR, inputs, attributes, (*x.shape[:-1], columns))
        return made if bias is None or named else made + bias


def _node(
    kind: str, inputs: Sequence[torch.Tensor], attributes: dict[str, Any], shape: Sequence[Any]
) -> torch.Tensor:
    """A node of our domain with one float32 output.

    torch's translations of other operators do arithmetic on what they get, which works on what one
    of themselves gave, not on a node of another domain: hence the copy, which its optimizer drops.
    """
    made = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", inputs, attributes, dtype=torch.float32, shape=shape, version=1
    )
    return made.clone()
