"""Sums over a site's inputs: second moments, diagonal, mean, and the same of inputs kept apart.

Products are float32 over at most `_CHUNK` inputs each, sums are float64. Of the symmetric matrix
only panels of rows on and above the diagonal are multiplied and kept, which halves time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.calibrate.statistics import DIAGONAL, HELD_OUT, MEAN, SECOND_MOMENT, Matrix
from compress.tensor import Array

_CHUNK = 4096
_PANEL = 1024


class Moment:
    """The sum of x x^T over inputs [n, columns], and its mean by rows."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._panels = [
            torch.zeros(min(_PANEL, columns - start), columns - start, dtype=torch.float64)
            for start in range(0, columns, _PANEL)
        ]

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs, float32 [n, columns]."""
        for first in range(0, len(inputs), _CHUNK):
            part = inputs[first : first + _CHUNK]
            for number, panel in enumerate(self._panels):
                start = number * _PANEL
                panel.add_(part[:, start : start + len(panel)].T @ part[:, start:])

    def rows(self, count: int) -> Iterator[Matrix]:
        """The mean over `count` inputs, float32, as panels of rows [<= 1024, columns]."""
        for number, panel in enumerate(self._panels):
            height = len(panel)
            made = np.empty((height, self.columns), np.float32)
            start = number * _PANEL
            for above, other in enumerate(self._panels[:number]):  # by symmetry
                place = start - above * _PANEL
                left = other[:, place : place + height].T / count
                made[:, above * _PANEL : above * _PANEL + len(other)] = left.numpy()
            square = panel[:, :height]
            made[:, start : start + height] = ((square + square.T) / (2 * count)).numpy()
            made[:, start + height :] = (panel[:, height:] / count).numpy()
            yield made


class SiteSums:
    """What is summed at one site.

    kinds   of `compress.calibrate.statistics.SITE_KINDS`
    blocks  parts of the weights' rows that have inputs of their own
    count, held_out_count  inputs seen so far, a block
    """

    def __init__(self, kinds: frozenset[str], columns: int, blocks: int = 1) -> None:
        self.columns, self.blocks = columns, blocks
        self.kinds = kinds - {DIAGONAL} if SECOND_MOMENT in kinds else kinds
        self.count = self.held_out_count = 0
        self._vectors = {
            kind: torch.zeros(blocks, columns, dtype=torch.float64)
            for kind in (DIAGONAL, MEAN)
            if kind in self.kinds
        }
        self._moments = {
            kind: [Moment(columns) for _ in range(blocks)]
            for kind in (SECOND_MOMENT, HELD_OUT)
            if kind in self.kinds
        }

    @torch.no_grad()
    def add(self, inputs: torch.Tensor, *, held_out: bool = False) -> None:
        """Add inputs, float [blocks, n, columns], or [n, columns] where there is one block.

        `held_out` ones count for HELD_OUT alone, where that is among the kinds.
        """
        values = inputs.detach().float()
        if values.ndim == 2:
            values = values[None]
        if HELD_OUT in self.kinds and held_out:
            self.held_out_count += values.shape[1]
            self._add_moments(HELD_OUT, values)
            return
        self.count += values.shape[1]
        if SECOND_MOMENT in self.kinds:
            self._add_moments(SECOND_MOMENT, values)
        for first in range(0, values.shape[1], _CHUNK):
            part = values[:, first : first + _CHUNK]
            if MEAN in self.kinds:
                self._vectors[MEAN] += part.sum(dim=1, dtype=torch.float64)
            if DIAGONAL in self.kinds:
                self._vectors[DIAGONAL] += part.square().sum(dim=1, dtype=torch.float64)

    def _add_moments(self, kind: str, values: torch.Tensor) -> None:
        for moment, inputs in zip(self._moments[kind], values, strict=True):
            moment.add(inputs)

    def shape(self, kind: str) -> tuple[int, ...]:
        """The shape of one kind's array."""
        square = kind in (SECOND_MOMENT, HELD_OUT)
        return (self.blocks, *(self.columns,) * (1 + square))

    def pieces(self, kind: str) -> Iterator[Array]:
        """One kind's means, float32, in pieces that follow each other in memory.

        Nothing comes where no input was seen.
        """
        count = self.held_out_count if kind == HELD_OUT else self.count
        if not count:
            return
        if kind in self._vectors:
            yield (self._vectors[kind] / count).numpy().astype(np.float32)
            return
        for moment in self._moments[kind]:
            yield from moment.rows(count)


def module_inputs(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What the rows of a module's weight are multiplied with, float32 [blocks, n, columns].

    A convolution's columns are its patches; any other module reads the last axis as it is
    (`nn.Linear`, and GPT-2's Conv1D, whose weight is stored transposed).
    """
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return conv_patches(module, inputs)
    return inputs.detach().float().reshape(1, -1, inputs.shape[-1])


@torch.no_grad()
def conv_patches(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The patches of a convolution, float32 [groups, n, channels / groups * kernel].

    module  Conv1d, 2d or 3d with any stride, padding (modes too), dilation and groups
    inputs  [batch, channels, *size], or without the batch; n counts batch and output places
    Columns are in the order of the weight's: channel, then kernel rows, then kernel columns.
    """
    conv: Any = module
    values = inputs.detach().float()
    if values.ndim == len(conv.kernel_size) + 1:
        values = values[None]
    # [left, right] a dimension, the last one first: how torch keeps what "same" comes to
    padding: Sequence[int] = conv._reversed_padding_repeated_twice
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    values = nn.functional.pad(values, list(padding), mode=mode)
    return unfolded(values, conv.kernel_size, conv.stride, conv.dilation, conv.groups)


def unfolded(
    values: torch.Tensor, kernel: Sequence[int], strides: Sequence[int],
    dilations: Sequence[int], groups: int,
) -> torch.Tensor:  # fmt: skip
    """Patches of padded values [batch, channels, *size], as `conv_patches` gives them."""
    for axis, (size, step, gap) in enumerate(zip(kernel, strides, dilations, strict=True)):
        reach = gap * (size - 1) + 1
        values = values.unfold(2 + axis, reach, step)[..., ::gap]
    dimensions = len(kernel)
    batch, channels = values.shape[:2]
    places = values.shape[2 : 2 + dimensions]
    values = values.reshape(batch, groups, channels // groups, *values.shape[2:])
    order = [1, 0, *range(3, 3 + dimensions), 2, *range(3 + dimensions, 3 + 2 * dimensions)]
    patches = values.permute(order)
    return patches.reshape(groups, batch * int(np.prod(places)), -1)
