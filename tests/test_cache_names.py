"""transformers 5.24 gave the cache of its decoders another name: both are known."""

from __future__ import annotations

import types
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from compress.export_onnx.tasks import BATCH, SEQUENCE, Input
from compress.export_onnx.wrappers import CacheLayer, Flat, cache_layers
from compress.runtime import cache_names

INPUTS = [Input("input_ids", (BATCH, SEQUENCE), torch.int64)]
WEIGHTS: Any = types.SimpleNamespace(in_place=nullcontext)


class Output(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


def decoder(name: str) -> Any:
    """A module whose cache goes in and out under `name`: one layer, 2 heads of 4."""

    class Decoder(torch.nn.Module):
        config = types.SimpleNamespace(use_cache=True)

        def _run(self, input_ids: torch.Tensor, kept: Any) -> Output:
            states = input_ids.float()[:, None, :, None].expand(-1, 2, -1, 4)
            keys, _ = kept.update(states, states, 0)
            return Output({"logits": keys.sum((1, 3))[..., None], name: kept})

    class Older(Decoder):
        def forward(self, input_ids: Any, past_key_values: Any = None, **_: Any) -> Output:
            return self._run(input_ids, past_key_values)

    class Newer(Decoder):
        def forward(self, input_ids: Any, cache: Any = None, **_: Any) -> Output:
            return self._run(input_ids, cache)

    return {"past_key_values": Older, "cache": Newer}[name]()


@pytest.mark.parametrize("name", cache_names.NAMES)
def test_a_cache_is_found_and_used_under_either_name(name: str) -> None:
    model = decoder(name)
    assert cache_names.argument_of(model) == name
    layers = cache_layers(model, WEIGHTS, INPUTS)
    assert layers == [CacheLayer(heads=2, key_size=4, value_size=4)]
    flat = Flat(model, WEIGHTS, "decoder", INPUTS, len(layers))
    past = torch.ones(1, 2, 5, 4)
    logits, keys, _ = flat([torch.full((1, 3), 2), past, past])
    assert keys.shape == (1, 2, 8, 4)
    assert flat.seen.outputs == ["logits", "present.0.key", "present.0.value"]
    assert logits[0, :, 0].tolist() == [8.0] * 5 + [16.0] * 3


def test_a_model_without_a_cache_has_none() -> None:
    class Plain:
        def forward(self, input_ids: Any) -> None: ...

    assert cache_names.argument_of(Plain()) is None
    assert cache_layers(Plain(), WEIGHTS, INPUTS) == []
    assert cache_names.of_output(types.SimpleNamespace(logits=1)) is None
