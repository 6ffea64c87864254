"""softmax and log_softmax along any axis but that of the batch, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.errors import ShapeError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import TensorType
from graphnet.ops.elementwise import floating, same_dtype


@dataclass(frozen=True)
class SoftmaxAttrs(Attrs):
    """axis: what is normalised, counted from the batch, which is axis 0."""

    axis: int = 1


class _AlongAxis(Op):
    attrs_type = SoftmaxAttrs
    kernel = "softmax"

    def infer(self, attrs: SoftmaxAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        x = ins[0]
        floating(self.name, x)
        if len(x.shape) not in (2, 3, 4):
            raise ShapeError(f"{self.name} takes two to four axes, the batch first, got {x}")
        if not 1 <= attrs.axis < len(x.shape):
            raise ShapeError(f"{self.name} over axis {attrs.axis} of {x}: axis 0 is the batch")
        if len(ins) == 2:
            same_dtype(self.name, x, ins[1])
            if ins[1].shape != x.shape:
                raise ShapeError(f"{self.name}: result {x} and gradient {ins[1]} differ in shape")
        return (x.with_shape(x.shape),)

    def flops(
        self, attrs: Any, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 4 * ins[0].numel


class _Softmax(_AlongAxis):
    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        if dy is None or not needs[0]:
            return (None,)
        return (b.one(f"{self.name}_grad", eqn.out, dy, attrs=eqn.attrs),)


@register
class Softmax(_Softmax):
    """y = exp(x - max) / sum exp(x - max)."""

    name = "softmax"

    def reference(self, attrs: SoftmaxAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        e = torch.exp(args[0] - args[0].amax(attrs.axis, keepdim=True))
        return (e / e.sum(attrs.axis, keepdim=True),)

    def cpu(self, attrs: SoftmaxAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.softmax(args[0], attrs.axis),)


@register
class SoftmaxGrad(_AlongAxis):
    """dx = y (dy - sum dy y)."""

    name = "softmax_grad"

    def reference(self, attrs: SoftmaxAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, dy = args
        return (y * (dy - (dy * y).sum(attrs.axis, keepdim=True)),)


@register
class LogSoftmax(_Softmax):
    """y = x - max - log sum exp(x - max)."""

    name = "log_softmax"

    def reference(self, attrs: SoftmaxAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = args[0] - args[0].amax(attrs.axis, keepdim=True)
        return (z - z.exp().sum(attrs.axis, keepdim=True).log(),)

    def cpu(self, attrs: SoftmaxAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.log_softmax(args[0], attrs.axis),)


@register
class LogSoftmaxGrad(_AlongAxis):
    """dx = dy - exp(y) sum dy."""

    name = "log_softmax_grad"

    def reference(self, attrs: SoftmaxAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, dy = args
        return (dy - y.exp() * dy.sum(attrs.axis, keepdim=True),)
