"""ZFNet: AlexNet with a finer first layer, of Zeiler and Fergus (2013)."""

from __future__ import annotations

from collections import OrderedDict

from graphnet.frontends.dsl import Module, Sequential
from graphnet.frontends.init import normal_
from graphnet.frontends.layers import (
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    ReLU,
)


def zfnet(num_classes: int = 1000, dropout: float = 0.5) -> Sequential:
    """7x7 filters at stride 2 in the first layer, for 3x224x224; 62,357,608 parameters.

    Sizes of images as in figure 3 of "Visualizing and understanding convolutional networks": 110,
    55, 26, 13, 6. conv1 and the pools pad by 1, which gives them. Its contrast normalization across
    maps is LRN with alpha 5e-4, beta 0.75 and k 2, as published ports have it. Weights start with a
    standard deviation of 0.01, biases at 0 (section 3).
    """
    made: OrderedDict[str, Module] = OrderedDict()

    def add(key: str, module: Module) -> None:
        module.name = key
        made[key] = module

    #          in, out, kernel, stride, padding
    table = [(3, 96, 7, 2, 1), (96, 256, 5, 2, 0), (256, 384, 3, 1, 1), (384, 384, 3, 1, 1),
             (384, 256, 3, 1, 1)]  # fmt: skip
    for k, (c, o, kernel, stride, padding) in enumerate(table, 1):
        add(f"conv{k}", Conv2d(c, o, kernel, stride, padding))
        add(f"relu{k}", ReLU())
        if k <= 2:
            add(f"pool{k}", MaxPool2d(3, 2, 1))
            add(f"norm{k}", LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0))
    add("pool5", MaxPool2d(3, 2))
    add("flatten", Flatten())
    for k, (c, o) in enumerate([(256 * 6 * 6, 4096), (4096, 4096)], 6):
        add(f"fc{k}", Linear(c, o))
        add(f"relu{k}", ReLU())
        add(f"drop{k}", Dropout(dropout))
    add("fc8", Linear(4096, num_classes))
    net = Sequential(made)
    net.name, net.input_shape = "zfnet", (3, 224, 224)
    normal_(net, std=0.01)
    return net
