"""GoogLeNet, of Szegedy et al. (2014), with batch normalization and under torchvision's keys."""

from __future__ import annotations

from typing import Any

import torch

from graphnet.frontends.dsl import Module, Sequential
from graphnet.frontends.layers import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
)

_relu: Any = torch.relu  # of symbolic values, and of the tensors of a twin


class Convolution(Module):
    """A convolution, normalised, and its relu."""

    def __init__(self, into: int, out: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        self.conv = Conv2d(into, out, kernel, stride, padding, bias=False)
        self.bn = BatchNorm2d(out, eps=0.001)

    def forward(self, x: Any) -> Any:
        return _relu(self.bn(self.conv(x)))


class Inception(Module):
    """Four branches side by side: 1x1; 1x1 and 3x3; 1x1 and 3x3 (torchvision's, where the paper
    has 5x5); a pool and 1x1."""

    def __init__(
        self, into: int, one: int, reduce3: int, three: int, reduce5: int, five: int, pooled: int
    ) -> None:
        self.branch1 = Convolution(into, one, 1)
        self.branch2 = Sequential(
            Convolution(into, reduce3, 1), Convolution(reduce3, three, 3, padding=1)
        )
        self.branch3 = Sequential(
            Convolution(into, reduce5, 1), Convolution(reduce5, five, 3, padding=1)
        )
        self.branch4 = Sequential(
            MaxPool2d(3, 1, 1, ceil_mode=True), Convolution(into, pooled, 1)
        )

    def forward(self, x: Any) -> Any:
        sides: Any = (self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x))
        return torch.cat(sides, 1)


class Auxiliary(Module):
    """A classifier on an inner value: a mean of 4x4 parts, 1x1, two linear layers."""

    def __init__(self, into: int, num_classes: int, dropout: float) -> None:
        self.avgpool = AdaptiveAvgPool2d(4)
        self.conv = Convolution(into, 128, 1)
        self.fc1 = Linear(2048, 1024)
        self.dropout = Dropout(dropout)
        self.fc2 = Linear(1024, num_classes)

    def forward(self, x: Any) -> Any:
        x = _relu(self.fc1(self.conv(self.avgpool(x)).flatten(1)))
        return self.fc2(self.dropout(x))


class GoogLeNet(Module):
    """Its parts in their order. In training with auxiliary heads: logits, aux2, aux1."""

    def __init__(self, parts: dict[str, Module], heads: dict[str, str]) -> None:
        self.path = [key for key in parts if key not in heads.values()]
        self.heads = heads
        for key, part in parts.items():
            setattr(self, key, part)

    def forward(self, x: Any) -> Any:
        others: list[Any] = []
        for key in self.path:
            x = getattr(self, key)(x)
            if self.training and key in self.heads:
                others.insert(0, getattr(self, self.heads[key])(x))
        return (x, *others) if others else x


def googlenet(
    num_classes: int = 1000,
    dropout: float = 0.2,
    aux_logits: bool = False,
    dropout_aux: float = 0.7,
) -> GoogLeNet:
    """Nine inceptions, for 3x224x224; 6,624,904 parameters, 13,004,888 with auxiliary heads.

    aux_logits  two more classifiers, on inception4a and inception4d. In training their losses are
                added, each times 0.3 (section 5 of the paper); in inference they do nothing

    Weights start Gaussian with a deviation of 0.01, cut off at 2, as in torchvision.
    """
    parts: dict[str, Module] = {
        "conv1": Convolution(3, 64, 7, 2, 3),
        "maxpool1": MaxPool2d(3, 2, ceil_mode=True),
        "conv2": Convolution(64, 64, 1),
        "conv3": Convolution(64, 192, 3, padding=1),
        "maxpool2": MaxPool2d(3, 2, ceil_mode=True),
        "inception3a": Inception(192, 64, 96, 128, 16, 32, 32),
        "inception3b": Inception(256, 128, 128, 192, 32, 96, 64),
        "maxpool3": MaxPool2d(3, 2, ceil_mode=True),
        "inception4a": Inception(480, 192, 96, 208, 16, 48, 64),
        "inception4b": Inception(512, 160, 112, 224, 24, 64, 64),
        "inception4c": Inception(512, 128, 128, 256, 24, 64, 64),
        "inception4d": Inception(512, 112, 144, 288, 32, 64, 64),
        "inception4e": Inception(528, 256, 160, 320, 32, 128, 128),
        "maxpool4": MaxPool2d(2, 2, ceil_mode=True),
        "inception5a": Inception(832, 256, 160, 320, 32, 128, 128),
        "inception5b": Inception(832, 384, 192, 384, 48, 128, 128),
    }
    heads = {"inception4a": "aux1", "inception4d": "aux2"} if aux_logits else {}
    for key, into in zip(heads.values(), (512, 528), strict=False):
        parts[key] = Auxiliary(into, num_classes, dropout_aux)
    parts["avgpool"] = AdaptiveAvgPool2d(1)
    parts["flatten"] = Flatten()
    parts["dropout"] = Dropout(dropout)
    parts["fc"] = Linear(1024, num_classes)
    net = GoogLeNet(parts, heads)
    for m in net.modules():
        if isinstance(m, (Conv2d, Linear)):
            torch.nn.init.trunc_normal_(m.weight.data, std=0.01, a=-2, b=2)
    net.name, net.input_shape = "googlenet", (3, 224, 224)
    net.loss_weights = (1.0, 0.3, 0.3) if aux_logits else None
    return net
