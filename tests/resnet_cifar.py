"""ResNet-20 for CIFAR-10 as the original paper has it (He et al. 2016, section 4.2, shortcut A).

A file as `--module tests/resnet_cifar.py:resnet20` takes it: a factory and its preprocessing.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions; where the shape changes, the shortcut drops pixels and pads channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.pad = stride, (channels - channels_in) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = functional.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad)
            )
        return torch.relu(y + x)


class ResNet(nn.Module):
    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, depth, 1)
        self.layer2 = self._stage(width, 2 * width, depth, 2)
        self.layer3 = self._stage(2 * width, 4 * width, depth, 2)
        self.linear = nn.Linear(4 * width, 10)

    @staticmethod
    def _stage(channels_in: int, channels: int, depth: int, stride: int) -> nn.Sequential:
        first = Block(channels_in, channels, stride)
        return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(depth - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.linear(y.mean(dim=(2, 3)))


def preprocess(images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 32, 32, 3] -> float32 [n, 3, 32, 32], normalised as in training."""
    values = images.permute(0, 3, 1, 2).to(torch.float32) / 255
    return (values - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]


def resnet20() -> nn.Module:
    """Three blocks a stage."""
    return ResNet(3)


def resnet8() -> nn.Module:
    """One block a stage, four channels: for quick tests."""
    return ResNet(1, 4)
