"""add, sub, mul, div, cast, full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.errors import DTypeError, ShapeError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, get_op, register
from graphnet.ir.types import DTYPES, Shape, TensorType


def broadcast(op: str, a: TensorType, b: TensorType) -> Shape:
    """The shape that two operands have together, by torch's trailing-axis rule; ShapeError where
    kernels cannot run it.

    One operand has the shape of the result. The other has the same, or is one value ([] or sizes of
    1), or is constant over the pixels: [C, 1, 1], [1, C, 1, 1] or [N, C, 1, 1] on [N, C, H, W],
    [C] on [N, C].
    """
    if a.shape == b.shape:
        return a.shape
    large, small = (a.shape, b.shape) if a.numel >= b.numel else (b.shape, a.shape)
    rank = len(large)
    padded = (1,) * (rank - len(small)) + small
    if len(small) <= rank and all(p in (1, s) for p, s in zip(padded, large, strict=True)):
        if all(p == 1 for p in padded[2:]) and (rank > 1 or small == ()):
            return large
    fix = "both need one shape, or one of them [C, 1, 1], [N, C, 1, 1], [C] on [N, C], or a scalar"
    if len(small) == 1 and rank > 2 and large[1:2] == small:
        fix = f"for one value a channel, reshape {list(small)} to {[small[0], *[1] * (rank - 2)]}"
    raise ShapeError(f"{op}: {a} and {b} differ in shape", help=fix)


def summed_to(b: Builder, g: Value, v: Value) -> Value:
    """The gradient of a broadcast operand: summed over the axes along which it was repeated."""
    if g.type.shape == v.type.shape:
        return g
    return b.one("sum_to", g, attrs=get_op("sum_to").attrs_type(shape=v.type.shape))  # type: ignore[call-arg]


class _Binary(Op):
    """One result of two operands, the smaller one broadcast (see `broadcast`)."""

    elementwise = joins = True
    kernel = "elementwise"

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        a, b = ins
        shape = broadcast(self.name, a, b)
        if a.dtype != b.dtype and () not in (a.shape, b.shape):
            raise DTypeError(f"{self.name}: {a} and {b} differ in dtype", help="cast one of them")
        large = a if a.shape == shape else b
        return (large.with_shape(shape),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        if dy is None:
            return (None, None)
        pulls = (self.first, self.second)
        return tuple(
            summed_to(b, pull(b, eqn, dy), v) if need else None
            for pull, v, need in zip(pulls, eqn.inputs, needs, strict=True)
        )

    def first(self, b: Builder, eqn: Eqn, dy: Value) -> Value:
        """The cotangent of the first operand, before it is summed to its shape."""
        return dy

    def second(self, b: Builder, eqn: Eqn, dy: Value) -> Value:
        """The cotangent of the second operand, before it is summed to its shape."""
        return dy


def _alike(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the dtype of the larger: a scalar hyper-parameter follows the tensor."""
    dtype = a.dtype if a.numel() >= b.numel() else b.dtype
    return a.to(dtype), b.to(dtype)


@register
class Add(_Binary):
    """a + b."""

    name = "add"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = _alike(*args)
        return (a + b,)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [f"({expr[0]} + {expr[1]})"]


@register
class Sub(_Binary):
    """a - b."""

    name = "sub"

    def second(self, b: Builder, eqn: Eqn, dy: Value) -> Value:
        return b.one("neg", dy)

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = _alike(*args)
        return (a - b,)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [f"({expr[0]} - {expr[1]})"]


@register
class Mul(_Binary):
    """a b."""

    name = "mul"

    def first(self, b: Builder, eqn: Eqn, dy: Value) -> Value:
        return b.one("mul", dy, eqn.inputs[1])

    def second(self, b: Builder, eqn: Eqn, dy: Value) -> Value:
        return b.one("mul", dy, eqn.inputs[0])

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = _alike(*args)
        return (a * b,)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [f"({expr[0]} * {expr[1]})"]


@register
class Div(_Binary):
    """a / b; the gradient of b is -dy y / b, with y = a / b."""

    name = "div"

    def first(self, b: Builder, eqn: Eqn, dy: Value) -> Value:
        return b.one("div", dy, eqn.inputs[1])

    def second(self, b: Builder, eqn: Eqn, dy: Value) -> Value:
        return b.one("neg", b.one("div", b.one("mul", dy, eqn.out), eqn.inputs[1]))

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = _alike(*args)
        return (a / b,)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [f"({expr[0]} / {expr[1]})"]


def _known(name: str) -> None:
    if name not in DTYPES:
        raise DTypeError(f"unknown dtype {name!r}", help=f"use one of {sorted(DTYPES)}")


@dataclass(frozen=True)
class CastAttrs(Attrs):
    dtype: str = "f32"

    def __post_init__(self) -> None:
        _known(self.dtype)


@register
class Cast(Op):
    """x in another dtype, rounded to nearest even."""

    name = "cast"
    attrs_type = CastAttrs
    elementwise = joins = True
    kernel = "elementwise"

    def infer(self, attrs: CastAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        return (ins[0].with_dtype(DTYPES[attrs.dtype]),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        if dy is None or not needs[0]:
            return (None,)
        return (b.one("cast", dy, attrs=CastAttrs(eqn.inputs[0].type.dtype.name)),)

    def reference(self, attrs: CastAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # The oracle works in float64 throughout: there a float stays what it is.
        if args[0].dtype == torch.float64 and DTYPES[attrs.dtype].is_float:
            return (args[0],)
        return (args[0].to(DTYPES[attrs.dtype].torch),)

    def cpu(self, attrs: CastAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (args[0].to(DTYPES[attrs.dtype].torch),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [expr[0]]  # rounded where it is stored


@dataclass(frozen=True)
class FullAttrs(Attrs):
    value: float = 0.0
    shape: tuple[int, ...] = ()
    dtype: str = "f32"

    def __post_init__(self) -> None:
        _known(self.dtype)


@register
class Full(Op):
    """A constant."""

    name = "full"
    attrs_type = FullAttrs
    kernel = "fill"

    def infer(self, attrs: FullAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        return (TensorType(DTYPES[attrs.dtype], tuple(attrs.shape)),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        return ()

    def reference(self, attrs: FullAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.full(attrs.shape, attrs.value, dtype=DTYPES[attrs.dtype].torch),)


def floating(op: str, t: TensorType) -> None:
    """DTypeError unless the operand holds floating-point numbers."""
    if not t.dtype.is_float:
        raise DTypeError(f"{op} takes floating-point numbers, got {t}", help="cast it first")


def same_dtype(op: str, a: TensorType, b: TensorType) -> None:
    """DTypeError unless both have one dtype."""
    if a.dtype != b.dtype:
        raise DTypeError(f"{op}: {a} and {b} differ in dtype", help="cast one of them")
