"""Activations. The gradient is written on the output where that is enough, so that the input may
die."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from graphnet.errors import ConfigError
from graphnet.ir.op import Attrs
from graphnet.ops.function import Function, function


@function
class Relu(Function):
    """y = max(x, 0); NaN stays NaN. dx = 0 where y <= 0, else dy: a NaN in y lets the gradient
    pass, as in torch."""

    name = "relu"
    reads = "sign"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (x,) = args
        return (torch.where(x > 0, x, torch.where(torch.isnan(x), x, torch.zeros_like(x))),)

    def cpu(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.relu(args[0]),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        ctx.uses("maximum_nan")
        return [f"maximum_nan({expr[0]}, 0.0)"]

    def pull(self, attrs: Attrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return torch.where(v <= 0, torch.zeros_like(dy), dy)

    def cpu_pull(self, attrs: Attrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.threshold_backward(dy, v, 0)

    def emit_pull(self, v: str, dy: str, attrs: Any, ctx: Any) -> str:
        return f"tl.where({v} <= 0.0, 0.0, {dy})"


@dataclass(frozen=True)
class LeakyReluAttrs(Attrs):
    """slope: of the negative side, at least 0, or the output would not say on which side x is."""

    slope: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.slope) and self.slope >= 0):
            raise ConfigError(
                f"leaky_relu: negative_slope={self.slope!r} is not a number of at least 0",
                help="0.01 is torch's default",
            )


@function
class LeakyRelu(Function):
    """y = x where x > 0, else slope x."""

    name = "leaky_relu"
    attrs_type = LeakyReluAttrs
    reads = "sign"

    def reference(self, attrs: LeakyReluAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (x,) = args
        return (torch.where(x > 0, x, x * attrs.slope),)

    def cpu(self, attrs: LeakyReluAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (F.leaky_relu(args[0], attrs.slope),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        x = expr[0]
        return [f"tl.where({x} > 0.0, {x}, {x} * {attrs.slope!r})"]

    def pull(self, attrs: LeakyReluAttrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return torch.where(v > 0, dy, dy * attrs.slope)

    def emit_pull(self, v: str, dy: str, attrs: Any, ctx: Any) -> str:
        return f"tl.where({v} > 0.0, {dy}, {dy} * {attrs.slope!r})"


@function
class Relu6(Function):
    """y = min(max(x, 0), 6); NaN stays NaN. dx = dy where 0 < y < 6, else 0, as in torch."""

    name = "relu6"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (args[0].clamp(0, 6),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        ctx.uses("maximum_nan")
        return [f"-maximum_nan(-maximum_nan({expr[0]}, 0.0), -6.0)"]

    def pull(self, attrs: Attrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return torch.where((v <= 0) | (v >= 6), torch.zeros_like(dy), dy)

    def emit_pull(self, v: str, dy: str, attrs: Any, ctx: Any) -> str:
        return f"tl.where(({v} <= 0.0) | ({v} >= 6.0), 0.0, {dy})"


@function
class Tanh(Function):
    """y = tanh(x); dx = dy (1 - y^2)."""

    name = "tanh"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.tanh(args[0]),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        ctx.uses("tanh")
        return [f"tanh({expr[0]})"]

    def pull(self, attrs: Attrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return dy * (1 - v * v)

    def emit_pull(self, v: str, dy: str, attrs: Any, ctx: Any) -> str:
        return f"({dy} * (1.0 - {v} * {v}))"


def _sigmoid(x: str) -> str:
    return f"(1.0 / (1.0 + tl.exp(-({x}))))"


@function
class Sigmoid(Function):
    """y = 1 / (1 + exp(-x)); dx = dy y (1 - y)."""

    name = "sigmoid"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.sigmoid(args[0]),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [_sigmoid(expr[0])]

    def pull(self, attrs: Attrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return dy * v * (1 - v)

    def emit_pull(self, v: str, dy: str, attrs: Any, ctx: Any) -> str:
        return f"({dy} * {v} * (1.0 - {v}))"


@function
class Hardswish(Function):
    """y = x min(max(x + 3, 0), 6) / 6; dx = 0 below -3, dy above 3, dy (x / 3 + 1/2) between."""

    name = "hardswish"
    reads = "input"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (x,) = args
        return (x * (x + 3).clamp(0, 6) / 6,)

    def cpu(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (F.hardswish(args[0]),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        ctx.uses("maximum_nan")
        x = expr[0]
        return [f"({x} * (-maximum_nan(-maximum_nan({x} + 3.0, 0.0), -6.0)) * {1 / 6!r})"]

    def pull(self, attrs: Attrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        between = torch.where(v < 3, dy * (v / 3 + 0.5), dy)
        return torch.where(v <= -3, torch.zeros_like(dy), between)

    def cpu_pull(self, attrs: Attrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.hardswish_backward(dy, v)

    def emit_pull(self, v: str, dy: str, attrs: Any, ctx: Any) -> str:
        between = f"tl.where({v} < 3.0, {dy} * ({v} * {1 / 3!r} + 0.5), {dy})"
        return f"tl.where({v} <= -3.0, 0.0, {between})"


@function
class Silu(Function):
    """y = x s with s = 1 / (1 + exp(-x)); dx = dy s (1 + x (1 - s))."""

    name = "silu"
    reads = "input"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (args[0] * torch.sigmoid(args[0]),)

    def cpu(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (F.silu(args[0]),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [f"({expr[0]} * {_sigmoid(expr[0])})"]

    def pull(self, attrs: Attrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        s = torch.sigmoid(v)
        return dy * s * (1 + v * (1 - s))

    def cpu_pull(self, attrs: Attrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.silu_backward(dy, v)

    def emit_pull(self, v: str, dy: str, attrs: Any, ctx: Any) -> str:
        # 1 - s is formed as s of -x: it does not cancel where s is near 1.
        return f"({dy} * {_sigmoid(v)} * (1.0 + {v} * {_sigmoid(f'-{v}')}))"


@dataclass(frozen=True)
class GeluAttrs(Attrs):
    """approximate: "none" for the error function, "tanh" for its approximation (Hendrycks and
    Gimpel 2016)."""

    approximate: str = "none"

    def __post_init__(self) -> None:
        if self.approximate not in ("none", "tanh"):
            raise ConfigError(
                f"gelu: approximate={self.approximate!r} is unknown", help='"none" or "tanh"'
            )


_ROOT_HALF, _ROOT_2_PI = math.sqrt(0.5), math.sqrt(2 / math.pi)
_CUBE = 0.044715


@function
class Gelu(Function):
    """y = x P(x), P the normal distribution: (1 + erf(x / sqrt 2)) / 2; with `approximate`
    (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""

    name = "gelu"
    attrs_type = GeluAttrs
    reads = "input"

    def reference(self, attrs: GeluAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (x,) = args
        if attrs.approximate == "tanh":
            return (x * 0.5 * (1 + torch.tanh(_ROOT_2_PI * (x + _CUBE * x**3))),)
        return (x * 0.5 * (1 + torch.erf(x * _ROOT_HALF)),)

    def cpu(self, attrs: GeluAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (F.gelu(args[0], approximate=attrs.approximate),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        x = expr[0]
        return [f"({x} * {self._share(x, attrs, ctx)})"]

    def _share(self, x: str, attrs: GeluAttrs, ctx: Any) -> str:
        if attrs.approximate == "tanh":
            ctx.uses("tanh")
            return f"(0.5 + 0.5 * tanh({_ROOT_2_PI!r} * ({x} + {_CUBE!r} * {x} * {x} * {x})))"
        return f"(0.5 + 0.5 * tl.erf({x} * {_ROOT_HALF!r}))"

    def pull(self, attrs: GeluAttrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        if attrs.approximate == "tanh":
            t = torch.tanh(_ROOT_2_PI * (v + _CUBE * v**3))
            inner = _ROOT_2_PI * (1 + 3 * _CUBE * v**2)
            return dy * (0.5 * (1 + t) + 0.5 * v * (1 - t * t) * inner)
        density = torch.exp(-0.5 * v * v) * (_ROOT_2_PI / 2)
        return dy * (0.5 * (1 + torch.erf(v * _ROOT_HALF)) + v * density)

    def cpu_pull(self, attrs: GeluAttrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_backward(dy, v, approximate=attrs.approximate)

    def emit_pull(self, v: str, dy: str, attrs: Any, ctx: Any) -> str:
        share = self._share(v, attrs, ctx)
        if attrs.approximate == "tanh":
            # (1 - tanh^2) / 2 is 2 share (1 - share).
            inner = f"({_ROOT_2_PI!r} * (1.0 + {3 * _CUBE!r} * {v} * {v}))"
            return f"({dy} * ({share} + 2.0 * {v} * {share} * (1.0 - {share}) * {inner}))"
        return f"({dy} * ({share} + {v} * tl.exp(-0.5 * {v} * {v}) * {_ROOT_2_PI / 2!r}))"
