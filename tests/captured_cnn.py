"""A user's file with modules that are hard to capture: `--module tests/captured_cnn.py:small`."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Small(nn.Module):
    """Everything between an image and its classes, once; two layers share a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.mix = nn.Linear(8, 8)
        self.layer_norm = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.ones(8))
        self.register_buffer("steps", torch.arange(8.0))
        self.hidden = nn.Linear(8, 6)
        self.again = nn.Linear(6, 6, bias=False)
        self.shared = self.again
        self.relu = nn.Linear(6, 5)  # called as a value of the graph is

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.relu(self.norm(self.stem(x)))
        y = functional.relu6(functional.max_pool2d(self.grouped(y) + y, 2))
        t = self.mix(y.flatten(2).transpose(1, 2))
        t = self.layer_norm(t) * self.gain + self.steps
        h = self.shared(self.again(self.hidden(t.mean(1))))
        return {"logits": self.relu(functional.hardswish(h))}


class Branching(nn.Module):
    """Its graph depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.stem(x).mean((2, 3))
        return y if y.sum() > 0 else -y


class Counting(Branching):
    """Its graph depends on the number of images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.stem(x).mean((2, 3))
        return y / len(y)


def small() -> nn.Module:
    """With numbers that are not those of a fresh module."""
    model = Small()
    with torch.no_grad():
        for place in model.state_dict().values():
            if place.is_floating_point():
                place.copy_(torch.rand(place.shape) + 0.1)
    return model


def branching() -> nn.Module:
    return Branching()


def counting() -> nn.Module:
    return Counting()


def unlike() -> nn.Module:
    return nn.Conv2d(3, 4, 5)
