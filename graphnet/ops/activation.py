"""Activations. Each gradient is written on the output, so that the input may die."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphnet.errors import ShapeError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import TensorType
from graphnet.ops.elementwise import floating


class _Activation(Op):
    """y = f(x), element by element; the gradient op is `<name>_grad(y, dy)`."""

    elementwise = True
    kernel = "elementwise"

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        floating(self.name, ins[0])
        return (ins[0].with_shape(ins[0].shape),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        if dy is None or not needs[0]:
            return (None,)
        return (b.one(f"{self.name}_grad", eqn.out, dy),)


class _ActivationGrad(Op):
    """dx = dy * f'(x), with f' written on y = f(x)."""

    elementwise = True
    kernel = "elementwise"

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        y, dy = ins
        if y.shape != dy.shape:
            raise ShapeError(f"{self.name}: output {y} and gradient {dy} differ in shape")
        floating(self.name, y)
        floating(self.name, dy)
        return (dy.with_shape(dy.shape),)


@register
class Relu(_Activation):
    """y = max(x, 0); NaN stays NaN."""

    name = "relu"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (x,) = args
        return (torch.where(x > 0, x, torch.where(torch.isnan(x), x, torch.zeros_like(x))),)

    def cpu(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.relu(args[0]),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        ctx.uses("maximum_nan")
        return [f"maximum_nan({expr[0]}, 0.0)"]


@register
class ReluGrad(_ActivationGrad):
    """dx = 0 where y <= 0, else dy: a NaN in y lets the gradient pass, as in torch."""

    name = "relu_grad"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, dy = args
        return (torch.where(y <= 0, torch.zeros_like(dy), dy),)

    def cpu(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, dy = args
        return (torch.ops.aten.threshold_backward(dy, y, 0),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        y, dy = expr
        return [f"tl.where({y} <= 0.0, 0.0, {dy})"]


@register
class Tanh(_Activation):
    """y = tanh(x)."""

    name = "tanh"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.tanh(args[0]),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        ctx.uses("tanh")
        return [f"tanh({expr[0]})"]


@register
class TanhGrad(_ActivationGrad):
    """dx = dy (1 - y^2)."""

    name = "tanh_grad"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, dy = args
        return (dy * (1 - y * y),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        y, dy = expr
        return [f"({dy} * (1.0 - {y} * {y}))"]


@register
class Sigmoid(_Activation):
    """y = 1 / (1 + exp(-x))."""

    name = "sigmoid"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.sigmoid(args[0]),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [f"(1.0 / (1.0 + tl.exp(-({expr[0]}))))"]


@register
class SigmoidGrad(_ActivationGrad):
    """dx = dy y (1 - y)."""

    name = "sigmoid_grad"

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, dy = args
        return (dy * y * (1 - y),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        y, dy = expr
        return [f"({dy} * {y} * (1.0 - {y}))"]
