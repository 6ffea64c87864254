"""The layers: torch's argument names, order, defaults, shapes and initialisation.

Weights are drawn from torch's global generator with the same calls as torch.nn, so that
`torch.manual_seed(0)` gives a net the weights of its torch twin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from graphnet.errors import ConfigError, ShapeError, UnsupportedOpError
from graphnet.frontends.activations import (  # noqa: F401  torch.nn has one room for all layers
    GELU,
    Hardsigmoid,
    Hardswish,
    LeakyReLU,
    LogSoftmax,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softmax,
    Softmax2d,
    Tanh,
)
from graphnet.frontends.dropout import Dropout, Dropout2d  # noqa: F401
from graphnet.frontends.dsl import Module, Parameter
from graphnet.frontends.norm import BatchNorm1d, BatchNorm2d  # noqa: F401
from graphnet.frontends.symbolic import Symbol, flatten, images, padded
from graphnet.ops.lrn import LrnAttrs

Pair = int | tuple[int, int]


def pair(value: Any, what: str, least: int = 1) -> tuple[int, int]:
    """An int or a pair of ints, as a pair; ConfigError below `least`."""
    two = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(two) == 1:  # as torch takes it
        two *= 2
    if len(two) != 2 or any(not isinstance(v, int) or isinstance(v, bool) for v in two):
        raise ConfigError(f"{what} is an int or a pair of ints, not {value!r}")
    if min(two) < least:
        raise ConfigError(f"{what}={value!r} is below {least}")
    return two


def _sides(both: tuple[int, int]) -> tuple[int, int, int, int]:
    """(vertical, horizontal) padding as (top, bottom, left, right)."""
    return (both[0], both[0], both[1], both[1])


def four_sides(
    padding: Any, kernel: Sequence[int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """What a convolution's `padding` adds: (top, bottom, left, right)."""
    if not isinstance(padding, str):
        return _sides(pair(padding, "padding", 0))
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding != "same":
        raise ConfigError(
            f"unknown padding {padding!r}", help='use an int, a pair, "same" or "valid"'
        )
    if stride != (1, 1):
        raise ConfigError('padding="same" needs stride 1', help="give the padding as numbers")
    v, h = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    return (v // 2, v - v // 2, h // 2, h - h // 2)


def _count(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{what} is a positive int, not {value!r}")
    return value


def _default_init(weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        bound = 1 / math.sqrt(weight[0].numel())
        torch.nn.init.uniform_(bias, -bound, bound)


class Conv2d(Module):
    """2-D convolution of [N, in_channels, H, W]; weight [out, in/groups, R, S], bias [out].

    `padding` is an int, a pair, "valid" or "same" (stride 1 only).
    """

    kind: ClassVar[str] = "conv"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        name: str = "",
    ) -> None:
        self.in_channels = _count(in_channels, "in_channels")
        self.out_channels = _count(out_channels, "out_channels")
        self.kernel_size = pair(kernel_size, "kernel_size")
        self.stride = pair(stride, "stride")
        self.dilation = pair(dilation, "dilation")
        self.groups = _count(groups, "groups")
        self.name = name
        if in_channels % groups or out_channels % groups:
            both = math.gcd(in_channels, out_channels)
            raise ConfigError(
                f"groups={groups} must divide the {in_channels} input channels and the "
                f"{out_channels} output channels",
                help=f"a divisor of {both} divides both",
            )
        if padding_mode != "zeros":
            raise UnsupportedOpError(
                f"padding_mode {padding_mode!r} is not implemented", help='use "zeros"'
            )
        self.padding = padding if isinstance(padding, str) else pair(padding, "padding", 0)
        self._sides = four_sides(self.padding, self.kernel_size, self.stride, self.dilation)
        weight = torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        b = torch.empty(out_channels) if bias else None
        _default_init(weight, b)
        self.weight = Parameter(weight)
        self.bias = None if b is None else Parameter(b)

    def forward(self, x: Symbol) -> Symbol:
        images(type(self).__name__, x)
        if x.shape[1] != self.in_channels:
            raise ShapeError(
                f"{self.in_channels} input channels expected, got {x.shape[1]} "
                f"(shape {list(x.shape)})",
                help=f"Conv2d({x.shape[1]}, ...), or images [N, {self.in_channels}, H, W]",
            )
        operands = [x, self.weight] + ([self.bias] if self.bias is not None else [])
        return x.tracer.emit(
            "conv2d", operands, stride=self.stride, padding=self._sides,
            dilation=self.dilation, groups=self.groups,
        )  # fmt: skip

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        for key, default in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)),
                             ("groups", 1)):  # fmt: skip
            if getattr(self, key) != default:
                parts.append(f"{key}={getattr(self, key)!r}")
        return ", ".join(parts + ([] if self.bias is not None else ["bias=False"]))


class Linear(Module):
    """x @ weight.T + bias for [N, in_features]; weight [out_features, in_features]."""

    kind: ClassVar[str] = "fc"

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, name: str = ""
    ) -> None:
        self.in_features = _count(in_features, "in_features")
        self.out_features = _count(out_features, "out_features")
        self.name = name
        weight = torch.empty(out_features, in_features)
        b = torch.empty(out_features) if bias else None
        _default_init(weight, b)
        self.weight = Parameter(weight)
        self.bias = None if b is None else Parameter(b)

    def forward(self, x: Symbol) -> Symbol:
        if x.ndim != 2:
            raise ShapeError(
                f"Linear takes [N, {self.in_features}], got {list(x.shape)}",
                help="put gn.Flatten() before it",
            )
        operands = [x, self.weight] + ([self.bias] if self.bias is not None else [])
        return x.tracer.emit("linear", operands)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class MaxPool2d(Module):
    """Maximum over windows of [N, C, H, W]; ties give the gradient to the first in row order."""

    kind: ClassVar[str] = "pool"

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        dilation: Pair = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        name: str = "",
    ) -> None:
        if return_indices:
            raise UnsupportedOpError("return_indices is not implemented")
        self.kernel_size = pair(kernel_size, "kernel_size")
        self.stride = self.kernel_size if stride is None else pair(stride, "stride")
        self.padding = _pool_padding(padding, self.kernel_size)
        self.dilation = pair(dilation, "dilation")
        self.ceil_mode = bool(ceil_mode)
        self.name = name

    def forward(self, x: Symbol) -> Symbol:
        images(type(self).__name__, x)
        return x.tracer.emit(
            "maxpool2d", [x], kernel=self.kernel_size, stride=self.stride,
            padding=_sides(self.padding), dilation=self.dilation, ceil_mode=self.ceil_mode,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return _pool_repr(self) + (f", dilation={self.dilation}" * (self.dilation != (1, 1)))


class AvgPool2d(Module):
    """Mean over windows of [N, C, H, W]."""

    kind: ClassVar[str] = "pool"

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        name: str = "",
    ) -> None:
        self.kernel_size = pair(kernel_size, "kernel_size")
        self.stride = self.kernel_size if stride is None else pair(stride, "stride")
        self.padding = _pool_padding(padding, self.kernel_size)
        self.ceil_mode = bool(ceil_mode)
        self.count_include_pad = bool(count_include_pad)
        if divisor_override is not None:
            _count(divisor_override, "divisor_override")
        self.divisor_override = divisor_override
        self.name = name

    def forward(self, x: Symbol) -> Symbol:
        images(type(self).__name__, x)
        return x.tracer.emit(
            "avgpool2d", [x], kernel=self.kernel_size, stride=self.stride,
            padding=_sides(self.padding), ceil_mode=self.ceil_mode,
            count_include_pad=self.count_include_pad,
            divisor_override=self.divisor_override or 0,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return _pool_repr(self)


def _pool_padding(padding: Any, kernel: tuple[int, int]) -> tuple[int, int]:
    two = pair(padding, "padding", 0)
    if any(2 * p > k for p, k in zip(two, kernel, strict=True)):
        raise ConfigError(f"padding {two} is more than half of the window {kernel}")
    return two


def _pool_repr(pool: Any) -> str:
    parts = [f"kernel_size={pool.kernel_size}, stride={pool.stride}"]
    if pool.padding != (0, 0):
        parts.append(f"padding={pool.padding}")
    if pool.ceil_mode:
        parts.append("ceil_mode=True")
    return ", ".join(parts)


class AdaptiveAvgPool2d(Module):
    """Means over windows that divide [N, C, H, W] into `output_size`; None keeps a size."""

    kind: ClassVar[str] = "pool"

    def __init__(self, output_size: Any, *, name: str = "") -> None:
        is_pair = isinstance(output_size, (tuple, list))
        two = tuple(output_size) if is_pair else (output_size, output_size)
        if len(two) != 2:
            raise ConfigError(f"output_size is an int or a pair, not {output_size!r}")
        for size in two:
            if size is not None:
                _count(size, "output_size")
        self.output_size = two
        self.name = name

    def forward(self, x: Symbol) -> Symbol:
        images(type(self).__name__, x)
        sizes = tuple(
            s if want is None else want
            for want, s in zip(self.output_size, x.shape[2:], strict=True)
        )
        return x.tracer.emit("adaptive_avgpool2d", [x], output_size=sizes)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class AdaptiveMaxPool2d(Module):
    """The maximum over all pixels of [N, C, H, W]: `output_size` is 1."""

    kind: ClassVar[str] = "pool"

    def __init__(self, output_size: Any, return_indices: bool = False, *, name: str = "") -> None:
        if output_size not in (1, (1, 1), [1, 1]) or return_indices:
            raise UnsupportedOpError(
                f"AdaptiveMaxPool2d({output_size!r}, return_indices={return_indices})",
                help="output_size=1 without indices, or gn.MaxPool2d of a size written out",
            )
        self.output_size, self.name = (1, 1), name

    def forward(self, x: Symbol) -> Symbol:
        images(type(self).__name__, x)
        h, w = x.shape[2:]
        # An index is a byte. Rows first, then columns: ties go to the first in row order all the
        # same.
        windows = [(h, w)] if h * w <= 256 else [(1, w), (h, 1)]
        for kernel in windows:
            x = x.tracer.emit("maxpool2d", [x], kernel=kernel, stride=kernel)
        return x


class LocalResponseNorm(Module):
    """x_c (k + a sum x_j^2)^-beta over `size` neighbouring channels j of c (Krizhevsky 2012).

    a is alpha / size in alpha_mode "mean" (torch, Caffe) and alpha in "sum" (the paper). With
    several `groups` a channel's neighbours are those of its own group, as where each GPU holds a
    group.
    """

    kind: ClassVar[str] = "norm"

    def __init__(
        self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *,
        alpha_mode: str = "mean", groups: int = 1, name: str = "",
    ) -> None:  # fmt: skip
        # The op's attributes check them, here and not only when the net is traced.
        LrnAttrs(size, alpha, beta, k, alpha_mode, groups)
        self.size, self.alpha, self.beta, self.k = size, float(alpha), float(beta), float(k)
        self.alpha_mode, self.groups = alpha_mode, groups
        self.name = name

    def forward(self, x: Symbol) -> Symbol:
        images(type(self).__name__, x)
        return x.tracer.emit(
            "lrn", [x], size=self.size, alpha=self.alpha, beta=self.beta, k=self.k,
            alpha_mode=self.alpha_mode, groups=self.groups,
        )  # fmt: skip

    def extra_repr(self) -> str:
        mode = ', alpha_mode="sum"' if self.alpha_mode == "sum" else ""
        mode += f", groups={self.groups}" if self.groups > 1 else ""
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}{mode}"


class ZeroPad2d(Module):
    """Zeros around the pixels: `padding` is an int or (left, right, top, bottom)."""

    kind: ClassVar[str] = "pad"

    def __init__(self, padding: int | tuple[int, int, int, int], *, name: str = "") -> None:
        sides = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
        if len(sides) != 4 or any(not isinstance(s, int) for s in sides):
            raise ConfigError(f"padding is an int or four of them, not {padding!r}")
        self.padding, self.name = sides, name

    def forward(self, x: Symbol) -> Symbol:
        images("ZeroPad2d", x)
        return padded(x, self.padding)

    def extra_repr(self) -> str:
        return f"{self.padding}"


class Flatten(Module):
    """Axes start_dim..end_dim joined into one."""

    kind: ClassVar[str] = "flatten"

    def __init__(self, start_dim: int = 1, end_dim: int = -1, *, name: str = "") -> None:
        self.start_dim, self.end_dim, self.name = start_dim, end_dim, name

    def forward(self, x: Symbol) -> Symbol:
        return flatten(x, self.start_dim, self.end_dim)
