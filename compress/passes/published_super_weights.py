"""Coordinates of super weights that others have published, by the shape of the model.

From Yu et al., The Super Weight in Large Language Models (arXiv 2411.07191, table 2 and the
authors' code) and public replications of it. Models are told apart by shape only, and several
share one, so a coordinate is a candidate: it is taken where its weight is also among the largest
of its layer, which the same place in a differently trained model is not.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One model's list: (layer, row, column) of the down projection."""

    model: str
    layers: int
    hidden: int
    intermediate: int
    coordinates: tuple[tuple[int, int, int], ...]


PUBLISHED = (
    Published("Llama-7B", 32, 4096, 11008, ((2, 3968, 7003),)),
    Published("Llama-13B", 40, 5120, 13824, ((2, 2231, 2278), (2, 2231, 6939))),
    Published(
        "Llama-30B", 60, 6656, 17920, ((3, 5633, 12817), (3, 5633, 17439), (10, 5633, 14386))
    ),
    Published("Llama-2-7B, TowerBase-7B", 32, 4096, 11008, ((1, 2533, 7890),)),
    Published("Llama-2-13B", 40, 5120, 13824, ((3, 4743, 7678),)),
    Published("Llama-3-8B", 32, 4096, 14336, ((1, 788, 2427), (1, 1384, 2427), (1, 4062, 2427))),
    Published(
        "Llama-3.2-1B",
        16,
        2048,
        8192,
        ((1, 400, 1417), (1, 698, 1417), (1, 1159, 1417), (1, 2029, 1417)),
    ),
    Published("Mistral-7B-v0.1", 32, 4096, 14336, ((1, 2070, 7310),)),
    # The paper prints layer 1 for the second; it ranks first in layer 2 and nowhere in layer 1.
    Published("OLMo-1B-0724", 16, 2048, 8192, ((1, 1764, 1710), (2, 1764, 8041))),
    Published(
        "OLMo-7B-0724",
        32,
        4096,
        11008,
        ((1, 269, 7467), (2, 269, 8275), (7, 269, 453), (24, 269, 2300)),
    ),
    Published(
        "Phi-3-mini-4k",
        32,
        3072,
        8192,
        (
            (2, 525, 808),
            (2, 1693, 808),
            (2, 1113, 808),
            (4, 525, 2723),
            (4, 1113, 2723),
            (4, 1693, 2723),
        ),
    ),
    Published("gemma-7b", 28, 3072, 24576, ((0, 1995, 21041),)),
)


def candidates(layers: int, hidden: int, intermediate: int) -> list[tuple[int, int, int]]:
    """(layer, row, column) published for models of this shape, sorted, each once."""
    shape = layers, hidden, intermediate
    found = {c for p in PUBLISHED if p[1:4] == shape for c in p.coordinates}
    return sorted(found)
