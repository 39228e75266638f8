"""Statistics files for tests, made from inputs that are drawn here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from compress.calibrate.statistics import (
    HELD_OUT,
    INPUTS,
    KEY,
    OUTPUT_FISHER,
    SECOND_MOMENT,
    Record,
    Site,
    Statistics,
    open_statistics,
)

Inputs = NDArray[np.float64]


def correlated(rng: np.random.Generator, count: int, columns: int) -> Inputs:
    """Inputs of a few strong directions and a few large channels, as transformers have them."""
    mixing = rng.standard_normal((columns, columns)) * np.exp(-np.arange(columns) / columns * 5)
    scale = np.exp(rng.standard_normal(columns) / 2)
    return rng.standard_normal((count, columns)) @ mixing.T * scale


def moment(inputs: Inputs) -> NDArray[np.float32]:
    """float32 [blocks, columns, columns] of [n, columns] or [blocks, n, columns]."""
    stack = inputs if inputs.ndim == 3 else inputs[None]
    return np.stack([x.T @ x / len(x) for x in stack]).astype(np.float32)


def write_statistics(
    path: Path,
    inputs: Mapping[Sequence[str], Inputs],
    held_out: Mapping[Sequence[str], Inputs] | None = None,
    fingerprint: str = "any",
    *,
    fisher: Mapping[str, NDArray[np.float32]] | None = None,
    given: Mapping[str, NDArray[np.integer]] | None = None,
) -> Statistics:
    """A file with second moments of the inputs of each group of tensor names, opened.

    fisher  Fisher diagonal of the outputs by tensor
    given   what the model was given: input_ids or images
    """
    arrays, sites = {}, []
    for number, (names, values) in enumerate(inputs.items()):
        second = moment(values)
        sites.append(Site(number, tuple(names), values.shape[-2], 0, second.shape[0]))
        arrays[f"site/{number}/{SECOND_MOMENT}"] = second
        if held_out is not None:
            arrays[f"site/{number}/{HELD_OUT}"] = moment(held_out[names])
    kinds = {SECOND_MOMENT} | ({HELD_OUT} if held_out is not None else set())
    for name, values in (fisher or {}).items():
        arrays[f"tensor/{name}/{OUTPUT_FISHER}"] = values
        kinds.add(OUTPUT_FISHER)
    for name, array in (given or {}).items():
        arrays[f"inputs/{name}"] = array
        kinds.add(INPUTS)
    record = Record(fingerprint, "hf", tuple(sites), frozenset(kinds))
    save_file(arrays, path, {KEY: record.to_json()})
    return open_statistics(path)
