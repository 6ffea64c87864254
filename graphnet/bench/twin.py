"""The torch.nn twin of a net: the same layers, the same weights, the same state_dict keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graphnet.errors import ConfigError, UnsupportedOpError
from graphnet.frontends import dsl, layers


class VanillaDropout(nn.Module):
    """Dropout that scales in inference instead of in training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Any) -> Any:
        kept = 1.0 - self.p
        return nn.functional.dropout(x, self.p) * kept if self.training else x * kept


def _conv(m: Any) -> nn.Module:
    return nn.Conv2d(
        m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups,
        bias=m.bias is not None,
    )  # fmt: skip


class GroupedNorm(nn.Module):
    """A normalization within each of some groups of channels."""

    def __init__(self, norm: nn.Module, groups: int) -> None:
        super().__init__()
        self.norm, self.groups = norm, groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.norm(part) for part in x.chunk(self.groups, 1)], 1)


def _lrn(m: Any) -> nn.Module:
    # torch's alpha is divided by the size; in mode "sum" the net's is not.
    alpha = m.alpha * (m.size if m.alpha_mode == "sum" else 1)
    norm = nn.LocalResponseNorm(m.size, alpha, m.beta, m.k)
    return norm if m.groups == 1 else GroupedNorm(norm, m.groups)


def _avg(m: Any) -> nn.Module:
    return nn.AvgPool2d(
        m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    )


def _norm(m: Any) -> tuple:
    return m.num_features, m.eps, m.momentum, m.affine, m.track_running_stats


_TWINS: dict[str, Callable[[Any], nn.Module]] = {
    "Conv2d": _conv,
    "Linear": lambda m: nn.Linear(m.in_features, m.out_features, bias=m.bias is not None),
    "MaxPool2d": lambda m: nn.MaxPool2d(
        m.kernel_size, m.stride, m.padding, m.dilation, ceil_mode=m.ceil_mode
    ),
    "AvgPool2d": _avg,
    "AdaptiveMaxPool2d": lambda m: nn.AdaptiveMaxPool2d(m.output_size),
    "AdaptiveAvgPool2d": lambda m: nn.AdaptiveAvgPool2d(m.output_size),
    "BatchNorm1d": lambda m: nn.BatchNorm1d(*_norm(m)),
    "BatchNorm2d": lambda m: nn.BatchNorm2d(*_norm(m)),
    "LocalResponseNorm": _lrn,
    "Dropout": lambda m: nn.Dropout(m.p) if m.mode == "inverted" else VanillaDropout(m.p),
    "Dropout2d": lambda m: nn.Dropout2d(m.p),
    "Hardsigmoid": lambda m: nn.Hardsigmoid(),
    "Softmax2d": lambda m: nn.Softmax2d(),
    "Flatten": lambda m: nn.Flatten(m.start_dim, m.end_dim),
    "ReLU": lambda m: nn.ReLU(inplace=True),
    "Tanh": lambda m: nn.Tanh(),
    "Sigmoid": lambda m: nn.Sigmoid(),
    "LeakyReLU": lambda m: nn.LeakyReLU(m.negative_slope, inplace=True),
    "ReLU6": lambda m: nn.ReLU6(inplace=True),
    "Hardswish": lambda m: nn.Hardswish(),
    "SiLU": lambda m: nn.SiLU(),
    "GELU": lambda m: nn.GELU(m.approximate),
    "Softmax": lambda m: nn.Softmax(m.dim),
    "LogSoftmax": lambda m: nn.LogSoftmax(m.dim),
    "ZeroPad2d": lambda m: nn.ZeroPad2d(m.padding),
}


class Composed(nn.Module):
    """The twin of a module with a `forward` of its own, which runs on the twins of its submodules.

    So a `forward` that is benchmarked is written with operators, methods and torch's functions,
    which symbolic values and tensors both have: `torch.cat`, not `gn.cat`.
    """

    def __init__(self, net: dsl.Module) -> None:
        super().__init__()
        for key, child in net._own(dsl.Module):
            self._modules[key] = _build(child)
        object.__setattr__(self, "net", net)  # no submodule

    def forward(self, *args: Any) -> Any:
        try:
            return type(self.net).forward(self, *args)  # type: ignore[arg-type]
        except ConfigError as error:  # a function of ours was given a tensor
            raise UnsupportedOpError(
                f"no torch twin for {type(self.net).__name__}: {error.args[0]}",
                help="write its forward with torch's functions: torch.relu(x), torch.cat([x, y])",
            ) from None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what is neither a submodule nor torch's, such as a number
            if name.startswith("__"):  # what Python asks for, as copy.deepcopy does
                raise
            return getattr(self.net, name)


def _build(m: dsl.Module) -> nn.Module:
    if type(m) is dsl.Sequential:
        return nn.Sequential(OrderedDict((key, _build(child)) for key, child in m._own(dsl.Module)))
    name = type(m).__name__
    if getattr(layers, name, None) is type(m):
        if name not in _TWINS:
            raise UnsupportedOpError(f"no torch twin for {name}", help="bench another net")
        return _TWINS[name](m)
    if any(True for _ in m._own(dsl.Parameter)):
        raise UnsupportedOpError(
            f"no torch twin for {name}, which has parameters of its own",
            help="put them into layers: gn.Linear, gn.Conv2d",
        )
    return Composed(m)


def torch_twin(net: dsl.Module) -> nn.Module:
    """A torch.nn.Module that computes what `net` does, with a copy of its weights.

    UnsupportedOpError for a layer that has no twin, and for parameters outside of layers.
    """
    made = _build(net)
    made.load_state_dict(net.state_dict())
    return made
