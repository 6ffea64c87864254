"""SqueezeNet 1.1, of Iandola et al. (2016), under torchvision's keys."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from graphnet.frontends.dsl import Module, Sequential
from graphnet.frontends.init import kaiming_normal_, normal_
from graphnet.frontends.layers import (
    AdaptiveAvgPool2d,
    Conv2d,
    Dropout,
    Flatten,
    MaxPool2d,
    ReLU,
)


class Fire(Module):
    """A 1x1 convolution to few channels, and a 1x1 and a 3x3 one behind it, side by side."""

    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = Conv2d(channels, squeeze, 1)
        self.squeeze_activation = ReLU()
        self.expand1x1 = Conv2d(squeeze, expand, 1)
        self.expand1x1_activation = ReLU()
        self.expand3x3 = Conv2d(squeeze, expand, 3, padding=1)
        self.expand3x3_activation = ReLU()

    def forward(self, x: Any) -> Any:
        x = self.squeeze_activation(self.squeeze(x))
        sides: Any = (
            self.expand1x1_activation(self.expand1x1(x)),
            self.expand3x3_activation(self.expand3x3(x)),
        )
        return torch.cat(sides, 1)


def squeezenet1_1(num_classes: int = 1000, dropout: float = 0.5) -> Sequential:
    """AlexNet's accuracy with a fiftieth of its weights, for 3x224x224; 1,235,496 parameters.

    Weights start as He et al. (2015), those of the last convolution with a deviation of 0.01.
    """
    last = Conv2d(512, num_classes, 1)
    features = Sequential(
        Conv2d(3, 64, 3, 2), ReLU(), MaxPool2d(3, 2, ceil_mode=True),
        Fire(64, 16, 64), Fire(128, 16, 64), MaxPool2d(3, 2, ceil_mode=True),
        Fire(128, 32, 128), Fire(256, 32, 128), MaxPool2d(3, 2, ceil_mode=True),
        Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
    )  # fmt: skip
    kaiming_normal_(features)
    normal_(last, std=0.01)
    classifier = Sequential(Dropout(dropout), last, ReLU(), AdaptiveAvgPool2d(1))
    net = Sequential(OrderedDict(features=features, classifier=classifier, flatten=Flatten()))
    net.name, net.input_shape = "squeezenet1_1", (3, 224, 224)
    return net
