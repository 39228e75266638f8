"""Labelled images: top-1 accuracy, and its paired difference from a reference's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from compress.errors import InputError


@dataclass
class Accuracy:
    """Which images each model gets right, in order.

    right, right_reference  one array of bool a batch
    """

    right: list[NDArray[np.bool_]] = field(default_factory=list)
    right_reference: list[NDArray[np.bool_]] = field(default_factory=list)

    def add(
        self, logits: torch.Tensor, labels: NDArray[np.int64], reference: torch.Tensor | None
    ) -> None:
        """A batch: logits [n, classes] of the model (and of the reference), labels [n]."""
        self.right.append(_right(logits, labels))
        if reference is not None:
            self.right_reference.append(_right(reference, labels))

    @property
    def count(self) -> int:
        """Images seen."""
        return sum(len(r) for r in self.right)

    @property
    def accuracy(self) -> float:
        """Percent of images whose likeliest class is the label."""
        return 100 * float(np.concatenate(self.right).mean())

    @property
    def accuracy_reference(self) -> float:
        """The same of the reference."""
        return 100 * float(np.concatenate(self.right_reference).mean())

    @property
    def drop(self) -> float:
        """Points that the model is below the reference."""
        return self.accuracy_reference - self.accuracy

    @property
    def drop_error(self) -> float:
        """The standard error of `drop` over the images, paired: both saw the same ones.

        Of d = right_reference - right for each image: sd(d) / sqrt(n), sd with n - 1; NaN for one.
        """
        d = np.concatenate(self.right_reference).astype(np.float64)
        d -= np.concatenate(self.right)
        if len(d) < 2:
            return math.nan
        return 100 * float(d.std(ddof=1) / math.sqrt(len(d)))


def _right(logits: torch.Tensor, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    if logits.ndim != 2 or logits.shape[0] != len(labels):
        raise InputError(
            f"the model's output for {len(labels)} images is {list(logits.shape)}, not"
            f" [{len(labels)}, classes]",
            hint="--images needs a classifier that returns one row of logits an image",
        )
    if int(labels.max()) >= logits.shape[1] or int(labels.min()) < 0:
        raise InputError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, the model has"
            f" {logits.shape[1]} classes",
            hint="labels count from 0",
        )
    right: NDArray[np.bool_] = logits.argmax(-1).numpy() == labels
    return right
