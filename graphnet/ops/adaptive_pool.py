"""Adaptive average pooling: windows that divide the input into a given number of parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from graphnet.errors import ShapeError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import TensorType
from graphnet.ops.conv2d import pair
from graphnet.ops.pool import PoolGrad, like_gradient


@dataclass(frozen=True)
class AdaptiveAttrs(Attrs):
    output_size: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_size", pair(self.output_size))


@dataclass(frozen=True)
class AdaptiveGradAttrs(Attrs):
    input_size: tuple[int, int] = (1, 1)


def adaptive_span(i: int, size: int, out: int) -> tuple[int, int]:
    """[floor(i size / out), ceil((i + 1) size / out)): the input range of output i."""
    return i * size // out, -(-(i + 1) * size // out)


@register
class AdaptiveAvgPool2d(Op):
    """Mean over windows that divide the input into `output_size` parts."""

    name = "adaptive_avgpool2d"
    attrs_type = AdaptiveAttrs
    kernel = "pool"

    def infer(self, attrs: AdaptiveAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        if len(ins[0].shape) != 4:
            raise ShapeError(f"pooling takes a 4-d input, got {ins[0]}")
        return (ins[0].with_shape((*ins[0].shape[:2], *attrs.output_size)),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        if dy is None or not needs[0]:
            return (None,)
        attrs = AdaptiveGradAttrs(eqn.inputs[0].type.shape[2:])  # type: ignore[arg-type]
        return (b.one("adaptive_avgpool2d_grad", dy, attrs=attrs),)

    def reference(self, attrs: AdaptiveAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (x,) = args
        oh, ow = attrs.output_size
        y = x.new_empty(*x.shape[:2], oh, ow)
        for i in range(oh):
            for j in range(ow):
                a, b = adaptive_span(i, x.shape[2], oh)
                c, d = adaptive_span(j, x.shape[3], ow)
                y[:, :, i, j] = x[:, :, a:b, c:d].mean((2, 3))
        return (y,)

    def cpu(self, attrs: AdaptiveAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (F.adaptive_avg_pool2d(args[0], attrs.output_size),)

    def flops(
        self, attrs: AdaptiveAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return ins[0].numel


@register
class AdaptiveAvgPool2dGrad(PoolGrad):
    """dx: each dy over its window's size goes to every element of its window."""

    name = "adaptive_avgpool2d_grad"
    attrs_type = AdaptiveGradAttrs
    kernel = "pool"

    def reference(self, attrs: AdaptiveGradAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (dy,) = args
        h, w = attrs.input_size
        dx = dy.new_zeros(*dy.shape[:2], h, w)
        for i in range(dy.shape[2]):
            for j in range(dy.shape[3]):
                a, b = adaptive_span(i, h, dy.shape[2])
                c, d = adaptive_span(j, w, dy.shape[3])
                dx[:, :, a:b, c:d] += (dy[:, :, i, j] / ((b - a) * (d - c)))[:, :, None, None]
        return (dx,)

    def cpu(self, attrs: AdaptiveGradAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (dy,) = args
        x = like_gradient(dy, attrs.input_size)
        if dy.shape[2:] == (1, 1):  # torch's own takes four times as long channels-last
            return (x.copy_(dy / (x.shape[2] * x.shape[3])),)
        return (torch.ops.aten._adaptive_avg_pool2d_backward(dy, x),)
