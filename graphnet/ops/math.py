"""Functions of arithmetic: neg, sqrt, exp, abs, clamp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.errors import ConfigError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import TensorType
from graphnet.ops.elementwise import floating
from graphnet.ops.function import Function, function


@register
class Neg(Op):
    """-x."""

    name = "neg"
    elementwise = joins = True
    kernel = "elementwise"

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        floating(self.name, ins[0])
        return (ins[0].with_shape(ins[0].shape),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        return (None if dy is None or not needs[0] else b.one("neg", dy),)

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (-args[0],)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [f"(-{expr[0]})"]


@function
class Sqrt(Function):
    """y = sqrt(x); dx = dy / (2 y)."""

    name = "sqrt"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (args[0].sqrt(),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [f"tl.sqrt_rn({expr[0]})"]

    def pull(self, attrs: Attrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return dy / (2 * v)

    def emit_pull(self, v: str, dy: str, attrs: Any, ctx: Any) -> str:
        return f"({dy} / (2.0 * {v}))"


@function
class Exp(Function):
    """y = exp(x); dx = dy y."""

    name = "exp"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (args[0].exp(),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [f"tl.exp({expr[0]})"]

    def pull(self, attrs: Attrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return dy * v

    def emit_pull(self, v: str, dy: str, attrs: Any, ctx: Any) -> str:
        return f"({dy} * {v})"


@function
class Abs(Function):
    """y = |x|; dx = dy times the sign of x, 0 at 0."""

    name = "abs"
    reads = "input"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (args[0].abs(),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [f"tl.abs({expr[0]})"]

    def pull(self, attrs: Attrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return dy * v.sign()

    def emit_pull(self, v: str, dy: str, attrs: Any, ctx: Any) -> str:
        return f"tl.where({v} > 0.0, {dy}, tl.where({v} < 0.0, -{dy}, 0.0 * {dy}))"


@dataclass(frozen=True)
class ClampAttrs(Attrs):
    """low, high: infinite where there is no limit."""

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ConfigError(f"clamp: from {self.low!r} to {self.high!r} there is nothing")


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else f'float("{value}")'


@function
class Clamp(Function):
    """y = min(max(x, low), high); NaN stays NaN. dx = dy where low <= x <= high, else 0."""

    name = "clamp"
    attrs_type = ClampAttrs
    reads = "input"

    def reference(self, attrs: ClampAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (args[0].clamp(attrs.low, attrs.high),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        ctx.uses("maximum_nan")
        above = f"maximum_nan({expr[0]}, {_number(attrs.low)})"
        return [f"-maximum_nan(-{above}, {_number(-attrs.high)})"]

    def pull(self, attrs: ClampAttrs, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return torch.where((v >= attrs.low) & (v <= attrs.high), dy, torch.zeros_like(dy))

    def emit_pull(self, v: str, dy: str, attrs: Any, ctx: Any) -> str:
        inside = f"({v} >= {_number(attrs.low)}) & ({v} <= {_number(attrs.high)})"
        return f"tl.where({inside}, {dy}, 0.0)"
