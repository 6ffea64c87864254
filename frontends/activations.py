"""Functions of one value, element by element: the function, its layer, and what they are called.

A new one is a function here, a layer where torch has one, and a row of `ROWS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from graphnet.frontends.dsl import Module
from graphnet.frontends.symbolic import Symbol, softmax_along
from graphnet.frontends.tracer import active_tracer
from graphnet.ops.activation import GeluAttrs, LeakyReluAttrs


def _of(op: str, x: Any, **attrs: Any) -> Symbol:
    return active_tracer(f"gn.{op}").emit(op, [x], kind=op, **attrs)


def relu(x: Symbol) -> Symbol:
    """max(x, 0), element by element."""
    return _of("relu", x)


def leaky_relu(x: Symbol, negative_slope: float = 0.01) -> Symbol:
    """x where x > 0, else negative_slope x (at least 0), element by element."""
    return _of("leaky_relu", x, slope=float(negative_slope))


def relu6(x: Symbol) -> Symbol:
    """min(max(x, 0), 6), element by element."""
    return _of("relu6", x)


def tanh(x: Symbol) -> Symbol:
    """Hyperbolic tangent, element by element."""
    return _of("tanh", x)


def sigmoid(x: Symbol) -> Symbol:
    """1 / (1 + exp(-x)), element by element."""
    return _of("sigmoid", x)


def hardswish(x: Symbol) -> Symbol:
    """x min(max(x + 3, 0), 6) / 6, element by element."""
    return _of("hardswish", x)


def silu(x: Symbol) -> Symbol:
    """x / (1 + exp(-x)), element by element."""
    return _of("silu", x)


def gelu(x: Symbol, approximate: str = "none") -> Symbol:
    """x times the normal distribution of x, or its approximation "tanh", element by element."""
    return _of("gelu", x, approximate=approximate)


def hardsigmoid(x: Symbol) -> Symbol:
    """min(max(x + 3, 0), 6) / 6, element by element."""
    return clamp(x / 6.0 + 0.5, 0.0, 1.0)


def neg(x: Symbol) -> Symbol:
    """-x, element by element."""
    return _of("neg", x)


def sqrt(x: Symbol) -> Symbol:
    """The square root, element by element."""
    return _of("sqrt", x)


def exp(x: Symbol) -> Symbol:
    """The exponential, element by element."""
    return _of("exp", x)


def absolute(x: Symbol) -> Symbol:
    """|x|, element by element."""
    return _of("abs", x)


def clamp(x: Symbol, min: float | None = None, max: float | None = None) -> Symbol:
    """x, at least `min` and at most `max`, element by element."""
    limits = {"low": min, "high": max}
    return _of("clamp", x, **{k: float(v) for k, v in limits.items() if v is not None})


# ---- the layers ----------------------------------------------------------------------------------


class _Function(Module):
    def __init__(self, inplace: bool = False, *, name: str = "") -> None:
        self.name = name  # `inplace` is torch's; where a result lives is the planner's decision

    def forward(self, x: Symbol) -> Symbol:
        return x.tracer.emit(self.kind, [x])


class ReLU(_Function):
    """max(x, 0)."""

    kind: ClassVar[str] = "relu"


class LeakyReLU(_Function):
    """x where x > 0, else negative_slope x; the slope is at least 0."""

    kind: ClassVar[str] = "leaky_relu"

    def __init__(
        self, negative_slope: float = 0.01, inplace: bool = False, *, name: str = ""
    ) -> None:
        self.negative_slope = LeakyReluAttrs(float(negative_slope)).slope
        super().__init__(inplace, name=name)

    def forward(self, x: Symbol) -> Symbol:
        return x.tracer.emit("leaky_relu", [x], slope=self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class ReLU6(_Function):
    """min(max(x, 0), 6)."""

    kind: ClassVar[str] = "relu6"


class Tanh(_Function):
    """Hyperbolic tangent."""

    kind: ClassVar[str] = "tanh"


class Sigmoid(_Function):
    """1 / (1 + exp(-x))."""

    kind: ClassVar[str] = "sigmoid"


class Hardswish(_Function):
    """x min(max(x + 3, 0), 6) / 6."""

    kind: ClassVar[str] = "hardswish"


class Hardsigmoid(_Function):
    """min(max(x + 3, 0), 6) / 6."""

    kind: ClassVar[str] = "hardsigmoid"

    def forward(self, x: Symbol) -> Symbol:
        return hardsigmoid(x)


class SiLU(_Function):
    """x / (1 + exp(-x))."""

    kind: ClassVar[str] = "silu"


class GELU(_Function):
    """x times the normal distribution of x; `approximate` is "none" or "tanh"."""

    kind: ClassVar[str] = "gelu"

    def __init__(self, approximate: str = "none", *, name: str = "") -> None:
        self.approximate = GeluAttrs(approximate).approximate
        super().__init__(name=name)

    def forward(self, x: Symbol) -> Symbol:
        return x.tracer.emit("gelu", [x], approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class _Normalised(Module):
    """Along axis `dim`, which is not that of the batch."""

    op: ClassVar[str] = ""

    def __init__(self, dim: int | None = None, *, name: str = "") -> None:
        self.dim, self.name = dim, name

    def forward(self, x: Symbol) -> Symbol:
        return softmax_along(self.op, x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Softmax(_Normalised):
    """exp(x) over its sum along axis `dim`; without one along axis 1 of [N, C] and [N, C, H, W]."""

    kind: ClassVar[str] = "softmax"
    op: ClassVar[str] = "softmax"


class Softmax2d(Softmax):
    """`Softmax` over the channels of [N, C, H, W]."""

    def __init__(self, *, name: str = "") -> None:
        super().__init__(1, name=name)

    def extra_repr(self) -> str:
        return ""


class LogSoftmax(_Normalised):
    """The logarithm of softmax along axis `dim`, as `Softmax`."""

    kind: ClassVar[str] = "softmax"
    op: ClassVar[str] = "log_softmax"


# ---- what they are called ------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One function.

    call   ours
    torch  its name in torch, torch.nn.functional and among a tensor's methods
    onnx   its operator in ONNX
    layer  its layer, under torch's name
    """

    call: Callable[..., Symbol]
    torch: str
    onnx: str
    layer: type[Module] | None = None


ROWS = (
    Row(relu, "relu", "Relu", ReLU),
    Row(leaky_relu, "leaky_relu", "LeakyRelu", LeakyReLU),
    Row(relu6, "relu6", "Clip", ReLU6),
    Row(tanh, "tanh", "Tanh", Tanh),
    Row(sigmoid, "sigmoid", "Sigmoid", Sigmoid),
    Row(hardswish, "hardswish", "HardSwish", Hardswish),
    Row(silu, "silu", "Swish", SiLU),
    Row(gelu, "gelu", "Gelu", GELU),
    Row(neg, "neg", "Neg"),
    Row(sqrt, "sqrt", "Sqrt"),
    Row(exp, "exp", "Exp"),
    Row(absolute, "abs", "Abs"),
    Row(clamp, "clamp", "Clip"),
)
