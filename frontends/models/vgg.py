"""VGG: stacks of 3x3 convolutions, of Simonyan and Zisserman (2014), under torchvision's keys."""

from __future__ import annotations

from collections import OrderedDict

from graphnet.frontends.dsl import Module, Sequential
from graphnet.frontends.init import kaiming_normal_, normal_
from graphnet.frontends.layers import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
)

# Channels of the convolutions between two pools: configurations A, B, D and E of the paper.
_STACKS = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


def _vgg(depth: int, num_classes: int, dropout: float, norm: bool = False) -> Sequential:
    """For 3x224x224. Convolutions start as He et al. (2015), the rest with a deviation of 0.01."""
    features: list[Module] = []
    channels = 3
    for stack in _STACKS[depth]:
        for out in stack:
            features += [Conv2d(channels, out, 3, padding=1)]
            features += [BatchNorm2d(out), ReLU()] if norm else [ReLU()]
            channels = out
        features += [MaxPool2d(2)]
    classifier = Sequential(
        Linear(512 * 7 * 7, 4096), ReLU(), Dropout(dropout), Linear(4096, 4096), ReLU(),
        Dropout(dropout), Linear(4096, num_classes),
    )  # fmt: skip
    convolutions = Sequential(*features)
    kaiming_normal_(convolutions, "fan_out")
    normal_(classifier, std=0.01)
    net = Sequential(
        OrderedDict(
            features=convolutions, avgpool=AdaptiveAvgPool2d(7), flatten=Flatten(),
            classifier=classifier,
        )  # fmt: skip
    )
    net.name, net.input_shape = f"vgg{depth}{'_bn' * norm}", (3, 224, 224)
    return net


def vgg11(num_classes: int = 1000, dropout: float = 0.5) -> Sequential:
    """Eleven layers with weights (configuration A); 132,863,336 parameters."""
    return _vgg(11, num_classes, dropout)


def vgg13(num_classes: int = 1000, dropout: float = 0.5) -> Sequential:
    """Thirteen layers with weights (configuration B); 133,047,848 parameters."""
    return _vgg(13, num_classes, dropout)


def vgg16(num_classes: int = 1000, dropout: float = 0.5) -> Sequential:
    """Sixteen layers with weights (configuration D); 138,357,544 parameters."""
    return _vgg(16, num_classes, dropout)


def vgg19(num_classes: int = 1000, dropout: float = 0.5) -> Sequential:
    """Nineteen layers with weights (configuration E); 143,667,240 parameters."""
    return _vgg(19, num_classes, dropout)


def vgg11_bn(num_classes: int = 1000, dropout: float = 0.5) -> Sequential:
    """`vgg11` with batch normalization behind each convolution; 132,868,840 parameters."""
    return _vgg(11, num_classes, dropout, norm=True)


def vgg13_bn(num_classes: int = 1000, dropout: float = 0.5) -> Sequential:
    """`vgg13` with batch normalization behind each convolution; 133,053,736 parameters."""
    return _vgg(13, num_classes, dropout, norm=True)


def vgg16_bn(num_classes: int = 1000, dropout: float = 0.5) -> Sequential:
    """`vgg16` with batch normalization behind each convolution; 138,365,992 parameters."""
    return _vgg(16, num_classes, dropout, norm=True)


def vgg19_bn(num_classes: int = 1000, dropout: float = 0.5) -> Sequential:
    """`vgg19` with batch normalization behind each convolution; 143,678,248 parameters."""
    return _vgg(19, num_classes, dropout, norm=True)
