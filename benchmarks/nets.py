"""Nets of other benchmarks, for `graphnet bench benchmarks/nets.py:NAME`."""

from __future__ import annotations

from collections import OrderedDict

import graphnet as gn


def kernelbench_alexnet() -> gn.Sequential:
    """KernelBench level 3, problem 5: the single tower on 3x224x224 with padding 2 in conv1, no
    normalization and no dropout."""
    tower = gn.models.alexnet(dropout=0.0)
    layers = OrderedDict((key, m) for key, m in tower.named_modules() if key and "norm" not in key)
    layers["conv1"] = gn.Conv2d(3, 96, 11, 4, 2)
    layers["conv1"].name = "conv1"
    net = gn.Sequential(layers)
    net.name, net.input_shape = "kernelbench_alexnet", (3, 224, 224)
    return net


def kernelbench_lenet5() -> gn.Sequential:
    """KernelBench level 3, problem 4: LeNet-5 on 1x32x32 without padding, ten classes."""
    net = gn.Sequential(
        gn.Conv2d(1, 6, 5), gn.ReLU(), gn.MaxPool2d(2), gn.Conv2d(6, 16, 5), gn.ReLU(),
        gn.MaxPool2d(2), gn.Flatten(), gn.Linear(400, 120), gn.ReLU(), gn.Linear(120, 84),
        gn.ReLU(), gn.Linear(84, 10),
    )  # fmt: skip
    net.name, net.input_shape = "kernelbench_lenet5", (1, 32, 32)
    return net
