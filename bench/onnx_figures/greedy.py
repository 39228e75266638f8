"""Greedy decoding through a graph's cache; numpy alone, since it runs in bare environments, too."""

from __future__ import annotations

from typing import Any

import numpy as np

TOKENS = 64


def by_graph(graph: Any, ids: list[int], tokens: int = TOKENS) -> list[int]:
    """Greedy tokens of the graph: the prompt, then one token a run with what came out as cache."""
    names = [one.name for one in graph.get_inputs()]
    cache = {
        one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
        for one in graph.get_inputs()
        if one.name.startswith("past_key_values.")
    }
    outputs = ["logits", *(n.replace("past_key_values", "present") for n in cache)]
    given, past, found = np.array([ids]), 0, []
    for _ in range(tokens):
        total = past + given.shape[1]
        feed = {
            "input_ids": given,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total)[None],
        }
        feed = {name: values for name, values in feed.items() if name in names} | cache
        logits, *new = graph.run(outputs, feed)
        cache = dict(zip(cache, new, strict=True))
        past = total
        found.append(int(logits[0, -1].argmax()))
        given = np.array([found[-1:]])
    return found
