"""LeNet: the network of LeCun et al. (1998), and Caffe's wider one of the same name."""

from __future__ import annotations

from graphnet.errors import ConfigError
from graphnet.frontends.dsl import Sequential
from graphnet.frontends.layers import (
    AvgPool2d,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sigmoid,
    Tanh,
)

_ACTIVATIONS = {"relu": ReLU, "tanh": Tanh, "sigmoid": Sigmoid}
_POOLS = {"max": MaxPool2d, "avg": AvgPool2d}


def _choice(table: dict, value: str, what: str):  # type: ignore[no-untyped-def,type-arg]
    if value not in table:
        raise ConfigError(f"unknown {what} {value!r}", help=f"one of {', '.join(table)}")
    return table[value]


def lenet5(num_classes: int = 10, activation: str = "relu", pool: str = "max") -> Sequential:
    """LeNet-5 for 1x28x28: 6@5x5, 16@5x5, 120, 84 units; 61,706 parameters for 10 classes.

    conv1 pads by 2, which gives the 32x32 field of the paper. `activation="tanh", pool="avg"`
    is the flavour of 1998.
    """
    act = _choice(_ACTIVATIONS, activation, "activation")
    down = _choice(_POOLS, pool, "pool")
    net = Sequential(
        Conv2d(1, 6, 5, padding=2),
        act(),
        down(2),
        Conv2d(6, 16, 5),
        act(),
        down(2),
        Flatten(),
        Linear(16 * 5 * 5, 120),
        act(),
        Linear(120, 84),
        act(),
        Linear(84, num_classes),
    )
    net.name, net.input_shape = "lenet5", (1, 28, 28)
    return net


def caffe_lenet(num_classes: int = 10) -> Sequential:
    """Caffe's LeNet for 1x28x28: 20@5x5, 50@5x5, 500 units; only the hidden layer has a ReLU."""
    net = Sequential(
        Conv2d(1, 20, 5),
        MaxPool2d(2),
        Conv2d(20, 50, 5),
        MaxPool2d(2),
        Flatten(),
        Linear(50 * 4 * 4, 500),
        ReLU(),
        Linear(500, num_classes),
    )
    net.name, net.input_shape = "caffe_lenet", (1, 28, 28)
    return net
