"""transformers models as functions of a flat list of tensors, which is what a graph is.

A decoder's cache goes in and comes out as a key and a value a layer,
[batch, heads, past, size].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.export_onnx.named_weights import NamedWeights
from compress.export_onnx.tasks import BATCH, DECODER, PAST, Input
from compress.runtime import cache_names

_NOT_OUTPUTS = frozenset({*cache_names.NAMES, "loss", "hidden_states", "attentions"})


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of the tokens before: key and value, [batch, heads, past, size]."""

    heads: int
    key_size: int
    value_size: int

    def inputs(self, layer: int) -> list[Input]:
        """The inputs of the graph that hold it."""
        return [
            Input(f"past_key_values.{layer}.{kind}", (BATCH, self.heads, PAST, size), torch.float32)
            for kind, size in (("key", self.key_size), ("value", self.value_size))
        ]


class _Seen:
    """What a call found out; torch's exporter undoes what is assigned to the module itself."""

    def __init__(self) -> None:
        self.outputs: list[str] = []


class Flat(nn.Module):
    """A model that is called with a list of tensors and gives a tuple of tensors.

    inputs   the names of the first tensors; then come, for a decoder with a cache, the key and the
             value of each layer
    cache    layers of the cache, 0 for none
    seen     has the names of what came out, once it has been called

    Raises, when it is called, whatever the model raises.
    """

    def __init__(
        self, model: Any, weights: NamedWeights, task: str, inputs: Sequence[Input], cache: int = 0
    ) -> None:
        super().__init__()
        self.model = model
        self.weights, self.task, self.cache = weights, task, cache
        self.inputs = [one.name for one in inputs]
        self.seen = _Seen()

    def forward(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The model's output tensors, and the new cache behind them."""
        count = len(self.inputs)
        named: dict[str, Any] = dict(zip(self.inputs, tensors[:count], strict=True))
        if self.cache:
            argument = cache_names.argument_of(self.model)
            named |= {str(argument): _cache_of(tensors[count:]), "use_cache": True}
        elif getattr(self.model.config, "use_cache", None) is not None:
            named["use_cache"] = False
        with self.weights.in_place():
            output = self.model(**named, return_dict=True)
        found = self._tensors(output)
        if self.cache:
            for index, layer in enumerate(cache_names.of_output(output).layers):
                found |= {
                    f"present.{index}.key": layer.keys,
                    f"present.{index}.value": layer.values,
                }
        self.seen.outputs = list(found)
        return tuple(found.values())

    def _tensors(self, output: Any) -> dict[str, torch.Tensor]:
        if self.task == DECODER:
            return {"logits": output["logits"]}
        return {
            name: value
            for name, value in output.items()
            if isinstance(value, torch.Tensor) and name not in _NOT_OUTPUTS
        }


def _cache_of(tensors: Sequence[torch.Tensor]) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()  # without a config: one growing layer each, sliding windows too
    for layer in range(len(tensors) // 2):
        cache.update(tensors[2 * layer], tensors[2 * layer + 1], layer)
    return cache


def cache_layers(model: Any, weights: NamedWeights, inputs: Sequence[Input]) -> list[CacheLayer]:
    """The cache that a decoder keeps, found by calling it with fake tensors. Empty: it has none.

    A model whose cache is no plain list of keys and values (state-space layers) has none here.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import DynamicCache

    argument = cache_names.argument_of(model)
    if argument is None:
        return []
    cache = DynamicCache()
    length = 3
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), weights.in_place():
        named = {one.name: torch.ones(2, length, dtype=one.dtype) for one in inputs}
        output = model(**named, **{argument: cache}, use_cache=True, return_dict=True)
    if cache_names.of_output(output) is not cache:
        return []
    found = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or not keys.ndim == values.ndim == 4:
            return []
        if keys.shape[:3] != values.shape[:3] or keys.shape[2] != length:
            return []
        found.append(CacheLayer(keys.shape[1], keys.shape[3], values.shape[3]))
    return found
