"""Initial values for a whole net, under torch.nn.init's names: `gn.init.kaiming_normal_(net)`.

Each function draws the weights (what has two axes or more) of every layer, sets the biases, and
returns the net. `seed` makes it repeatable; without one torch's global generator is used.
`bias` is a number, or numbers by layer: {"conv2": 0.1, "*": 0.0}, patterns as of a shell, the first
that fits a layer's display name counts, and 0 where none does.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from graphnet.errors import ConfigError, number
from graphnet.frontends.dsl import Module, Parameter

Bias = float | Mapping[str, float]
# Where Caffe's AlexNet starts its biases at 0.1, and the paper at 1 (Krizhevsky et al. 2012).
LATE = ("conv2", "conv4", "conv5", "fc6", "fc7")
NAMES = ("torch", "gaussian", "he", "xavier")


def _generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


def _bias_of(name: str, bias: Bias) -> float:
    of = bias if isinstance(bias, Mapping) else {"*": bias}
    value = next((v for k, v in of.items() if fnmatch.fnmatchcase(name, k)), 0.0)
    return number("init", "bias", value, -math.inf)


def _fill(
    net: Module, draw: Callable[[torch.Tensor, torch.Generator | None], Any], bias: Bias,
    seed: int | None,
) -> Module:  # fmt: skip
    names, generator, done = net.layer_names(), _generator(seed), set()
    for module in net.modules():
        for _, p in module._own(Parameter) if module.drawn else ():
            if p in done:
                continue
            done.add(p)
            value = torch.empty(p.shape)
            if value.ndim > 1:
                draw(value, generator)
            else:
                value.fill_(_bias_of(names.get(module, ""), bias))
            p.data = value
    return net


def normal_(
    net: Module, mean: float = 0.0, std: float = 0.01, *, bias: Bias = 0.0, seed: int | None = None
) -> Module:
    """Weights from a Gaussian: the lecture's and AlexNet's start with std 0.01."""
    number("normal_", "mean", mean, -math.inf)
    number("normal_", "std", std)
    return _fill(net, lambda w, g: torch.nn.init.normal_(w, mean, std, generator=g), bias, seed)


def kaiming_normal_(
    net: Module, mode: str = "fan_in", *, bias: Bias = 0.0, seed: int | None = None
) -> Module:
    """He et al. (2015): std sqrt(2 / fan), which keeps the variance through layers with ReLU."""
    if mode not in ("fan_in", "fan_out"):
        raise ConfigError(f"mode {mode!r}", help='"fan_in" or "fan_out"')
    draw: Any = torch.nn.init.kaiming_normal_
    return _fill(
        net, lambda w, g: draw(w, mode=mode, nonlinearity="relu", generator=g), bias, seed
    )  # fmt: skip


def xavier_uniform_(net: Module, *, bias: Bias = 0.0, seed: int | None = None) -> Module:
    """Glorot and Bengio (2010): for layers with tanh or sigmoid."""
    return _fill(net, lambda w, g: torch.nn.init.xavier_uniform_(w, generator=g), bias, seed)


def default_(net: Module, *, seed: int | None = None) -> Module:
    """What layers are made with: torch's uniform weights and biases within 1 / sqrt(fan in)."""
    generator, bound = _generator(seed), 0.0
    for module in net.modules():
        # A layer's weight stands before its bias.
        for _, p in module._own(Parameter) if module.drawn else ():
            value = torch.empty(p.shape)
            if value.ndim > 1:
                torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
                bound = 1 / math.sqrt(value[0].numel())
            else:
                torch.nn.init.uniform_(value, -bound, bound, generator=generator)
            p.data = value
    return net


def by_name(name: str, net: Module, seed: int | None = None) -> Module:
    """One of NAMES: "gaussian" is std 0.01 with biases 0, or 0.1 in the layers that Caffe's AlexNet
    starts so; ConfigError lists the valid names."""
    if name == "torch":
        return default_(net, seed=seed)
    if name == "gaussian":
        return normal_(net, std=0.01, bias=dict.fromkeys(LATE, 0.1), seed=seed)
    if name == "he":
        return kaiming_normal_(net, seed=seed)
    if name == "xavier":
        return xavier_uniform_(net, seed=seed)
    raise ConfigError(f"unknown init {name!r}", help=f"one of {', '.join(NAMES)}")
