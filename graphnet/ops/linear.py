"""The fully connected product y = x w^T + b, with torch's weight layout [out, in]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphnet.errors import ShapeError, UnsupportedOpError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import DTYPES, TensorType, f32
from graphnet.ops.conv2d import MATH
from graphnet.ops.elementwise import same_dtype


@dataclass(frozen=True)
class LinearAttrs(Attrs):
    """math: how products are formed; out: dtype of the result, "" for the first operand's."""

    math: str = "ieee"
    out: str = ""

    def __post_init__(self) -> None:
        if self.math not in MATH:
            raise UnsupportedOpError(f"math {self.math!r}", help=f"use one of {MATH}")


def _typed(attrs: LinearAttrs, first: TensorType, *shape: int) -> tuple[TensorType, ...]:
    return (TensorType(DTYPES[attrs.out] if attrs.out else first.dtype, shape),)


def _rounded(attrs: LinearAttrs, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (y.to(DTYPES[attrs.out].torch) if attrs.out else y,)


class _Product(Op):
    attrs_type = LinearAttrs
    kernel = "linear"

    def flops(
        self, attrs: LinearAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 2 * ins[0].numel * ins[1].shape[1]


@register
class Linear(_Product):
    """y[n,o] = b[o] + sum over i of x[n,i] w[o,i]."""

    name = "linear"

    def infer(self, attrs: LinearAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        x, w = ins[:2]
        same_dtype("linear", x, w)
        if len(x.shape) != 2 or len(w.shape) != 2:
            raise ShapeError(
                f"linear takes 2-d operands, got input {x} and weight {w}",
                help="put a Flatten in front",
            )
        if x.shape[1] != w.shape[1]:
            raise ShapeError(
                f"expects {w.shape[1]} input features, got {x.shape[1]}",
                help=f"set in_features={x.shape[1]}, or check the image size",
            )
        if len(ins) > 2 and ins[2].shape != (w.shape[0],):
            raise ShapeError(f"bias {ins[2]} does not fit {w.shape[0]} output features")
        return _typed(attrs, x, x.shape[0], w.shape[0])

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        if dy is None:
            return (None,) * len(eqn.inputs)
        x, w = eqn.inputs[:2]
        attrs = LinearAttrs(math=eqn.attrs.math)  # type: ignore[attr-defined]
        dx = dw = db = None
        if any(needs[1:]):
            unread = [] if len(needs) > 2 and needs[2] else [1]
            dw, db = b.emit("linear_wgrad", [x, dy], attrs, unread=unread)
        if needs[0]:
            dx = b.one("linear_dgrad", dy, w, attrs=attrs)
        return (dx, dw if needs[1] else None, db)[: len(eqn.inputs)]

    def reference(self, attrs: LinearAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.einsum("ni,oi->no", args[0], args[1])
        return (y + args[2] if len(args) > 2 else y,)

    def cpu(self, attrs: LinearAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bias = args[2].to(args[0].dtype) if len(args) > 2 else None
        return _rounded(attrs, torch.nn.functional.linear(args[0], args[1], bias))

    def flops(
        self, attrs: LinearAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 2 * ins[0].shape[0] * ins[1].numel


@register
class LinearDgrad(_Product):
    """dx = dy w."""

    name = "linear_dgrad"

    def infer(self, attrs: LinearAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        dy, w = ins
        same_dtype("linear_dgrad", dy, w)
        if dy.shape[1] != w.shape[0]:
            raise ShapeError(f"gradient {dy} does not fit weight {w}")
        return _typed(attrs, dy, dy.shape[0], w.shape[1])

    def reference(self, attrs: LinearAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.einsum("no,oi->ni", args[0], args[1]),)

    def cpu(self, attrs: LinearAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _rounded(attrs, args[0] @ args[1])


@register
class LinearWgrad(_Product):
    """dw = dy^T x and db = sum of dy over the batch; always fp32. Either may be left out."""

    name = "linear_wgrad"
    optional = (0, 1)

    def infer(self, attrs: LinearAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        x, dy = ins
        same_dtype("linear_wgrad", x, dy)
        if x.shape[0] != dy.shape[0]:
            raise ShapeError(f"gradient {dy} does not fit input {x}")
        out, inn = dy.shape[1], x.shape[1]
        return (TensorType(f32, (out, inn)), TensorType(f32, (out,)))

    def reference(self, attrs: LinearAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, dy = args
        return (torch.einsum("no,ni->oi", dy, x), dy.sum(0))

    def cpu(self, attrs: LinearAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, dy = args
        return ((dy.t() @ x).float(), dy.float().sum(0))

    def flops(
        self, attrs: LinearAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        if outs and outs[0] is None:
            return ins[1].numel
        return 2 * ins[0].numel * ins[1].shape[1]
