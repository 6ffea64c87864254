"""Residual nets, of He et al. (2015), under torchvision's keys."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from graphnet.errors import ConfigError
from graphnet.frontends.dsl import Module, Sequential
from graphnet.frontends.init import kaiming_normal_
from graphnet.frontends.layers import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
)

_relu: Any = torch.relu  # of symbolic values, and of the tensors of a twin


def _shortcut(into: int, out: int, stride: int) -> Sequential | None:
    """A 1x1 convolution where the sum needs other sizes than the block is given."""
    if stride == 1 and into == out:
        return None
    return Sequential(Conv2d(into, out, 1, stride, bias=False), BatchNorm2d(out))


class Basic(Module):
    """Two 3x3 convolutions and the sum with what they were given."""

    widens = 1

    def __init__(self, into: int, width: int, stride: int) -> None:
        self.conv1 = Conv2d(into, width, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.downsample = _shortcut(into, width, stride)

    def forward(self, x: Any) -> Any:
        y = _relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return _relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(Module):
    """A 1x1, a 3x3 and a 1x1 convolution to four times the channels, and the sum. The 3x3 one has
    the stride, as in torchvision."""

    widens = 4

    def __init__(self, into: int, width: int, stride: int) -> None:
        self.conv1 = Conv2d(into, width, 1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.conv3 = Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = BatchNorm2d(4 * width)
        self.downsample = _shortcut(into, 4 * width, stride)

    def forward(self, x: Any) -> Any:
        y = _relu(self.bn1(self.conv1(x)))
        y = _relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return _relu(y + (x if self.downsample is None else self.downsample(x)))


def _stages(block: Any, into: int, widths: list[int], counts: list[int]) -> list[Sequential]:
    """Blocks in a row; the first one of each stage but the first halves the image."""
    out = []
    for k, (width, count) in enumerate(zip(widths, counts, strict=True)):
        made = []
        for n in range(count):
            made.append(block(into, width, 2 if k and not n else 1))
            into = width * block.widens
        out.append(Sequential(*made))
    return out


def _started(net: Module, name: str, shape: tuple[int, int, int]) -> Module:
    """Convolutions start as He et al. have it, by their outputs."""
    for m in net.modules():
        if isinstance(m, Conv2d):
            kaiming_normal_(m, "fan_out")
    net.name, net.input_shape = name, shape
    return net


def _imagenet(name: str, block: Any, counts: list[int], num_classes: int) -> Module:
    layers = _stages(block, 64, [64, 128, 256, 512], counts)
    net = Sequential(
        {
            "conv1": Conv2d(3, 64, 7, 2, 3, bias=False), "bn1": BatchNorm2d(64), "relu": ReLU(),
            "maxpool": MaxPool2d(3, 2, 1), **{f"layer{k}": s for k, s in enumerate(layers, 1)},
            "avgpool": AdaptiveAvgPool2d(1), "flatten": Flatten(),
            "fc": Linear(512 * block.widens, num_classes),
        }
    )  # fmt: skip
    return _started(net, name, (3, 224, 224))


def resnet18(num_classes: int = 1000) -> Module:
    """Eighteen layers with weights, for 3x224x224; 11,689,512 parameters."""
    return _imagenet("resnet18", Basic, [2, 2, 2, 2], num_classes)


def resnet34(num_classes: int = 1000) -> Module:
    """Thirty-four layers with weights, for 3x224x224; 21,797,672 parameters."""
    return _imagenet("resnet34", Basic, [3, 4, 6, 3], num_classes)


def resnet50(num_classes: int = 1000) -> Module:
    """Fifty layers with weights in bottlenecks, for 3x224x224; 25,557,032 parameters."""
    return _imagenet("resnet50", Bottleneck, [3, 4, 6, 3], num_classes)


class Padded(Basic):
    """`Basic` whose shortcut has no weights: every second pixel, and zeros for new channels."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__(into, width, stride)
        self.stride, self.new, self.downsample = stride, width - into, None

    def forward(self, x: Any) -> Any:
        y = _relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.new:
            x = F.avg_pool2d(x, 1, self.stride)  # every second pixel
            x = F.pad(x, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
        return _relu(y + x)


def resnet20(num_classes: int = 10, shortcut: str = "pad") -> Module:
    """For CIFAR, 3x32x32 (section 4.2 of the paper): three stages of three blocks.

    shortcut  "pad" (the paper's A, 269,722 parameters) or "conv" (its B, 272,474)
    """
    if shortcut not in ("pad", "conv"):
        raise ConfigError(f"unknown shortcut {shortcut!r}", help='"pad" or "conv"')
    layers = _stages(Padded if shortcut == "pad" else Basic, 16, [16, 32, 64], [3, 3, 3])
    net = Sequential(
        {
            "conv1": Conv2d(3, 16, 3, 1, 1, bias=False), "bn1": BatchNorm2d(16), "relu": ReLU(),
            **{f"layer{k}": s for k, s in enumerate(layers, 1)},
            "avgpool": AdaptiveAvgPool2d(1), "flatten": Flatten(), "fc": Linear(64, num_classes),
        }
    )  # fmt: skip
    return _started(net, "resnet20", (3, 32, 32))
