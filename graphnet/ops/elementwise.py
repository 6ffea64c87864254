"""add, mul, cast, full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.errors import DTypeError, ShapeError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import DTYPES, TensorType


class _Binary(Op):
    elementwise = True
    kernel = "elementwise"

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        a, b = ins
        if b.shape not in (a.shape, ()):
            raise ShapeError(
                f"{self.name}: {a} and {b} differ in shape",
                help="both operands need one shape; the second may be a scalar",
            )
        if a.dtype != b.dtype and b.shape != ():
            raise DTypeError(f"{self.name}: {a} and {b} differ in dtype", help="cast one of them")
        return (a.with_shape(a.shape),)


@register
class Add(_Binary):
    """a + b."""

    name = "add"

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        return tuple(cotangents[0] if n else None for n in needs)

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (args[0] + args[1],)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [f"({expr[0]} + {expr[1]})"]


@register
class Mul(_Binary):
    """a * b."""

    name = "mul"

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        x, y = eqn.inputs
        if dy is None:
            return (None, None)
        if needs[1] and y.type.shape != x.type.shape:
            raise ShapeError(f"mul: no gradient for the broadcast scalar {y}")
        return (
            b.one("mul", dy, y) if needs[0] else None,
            b.one("mul", dy, x) if needs[1] else None,
        )

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (args[0] * args[1].to(args[0].dtype),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [f"({expr[0]} * {expr[1]})"]


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
    elementwise = True
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
