"""sum_to: the sum over the axes along which a broadcast operand was repeated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graphnet.errors import ShapeError
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import Shape, TensorType, bf16, f32


@dataclass(frozen=True)
class SumToAttrs(Attrs):
    """shape: of the result; it broadcasts to that of the operand."""

    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))


def aligned(shape: Shape, rank: int) -> Shape:
    """A shape with sizes of 1 in front."""
    return (1,) * (rank - len(shape)) + shape


@register
class SumTo(Op):
    """x summed over the axes along which `shape` is 1 or absent, in fp32 at least.

    A gradient: rows of the batch that are not live hold zeros, so it needs no number of rows.
    """

    name = "sum_to"
    attrs_type = SumToAttrs
    kernel = "reduce"

    def infer(self, attrs: SumToAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        (x,) = ins
        rank = len(x.shape)
        small = aligned(attrs.shape, rank)
        fits = len(attrs.shape) <= rank and all(
            p in (1, s) for p, s in zip(small, x.shape, strict=True)
        )
        if not fits or not x.dtype.is_float:
            raise ShapeError(f"sum_to: {x} is no broadcast of {list(attrs.shape)}")
        return (TensorType(f32 if x.dtype == bf16 else x.dtype, attrs.shape),)

    def reference(self, attrs: SumToAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (x,) = args
        small = aligned(attrs.shape, x.ndim)
        axes = [d for d, (p, s) in enumerate(zip(small, x.shape, strict=True)) if p != s]
        whole = x.float() if x.dtype == torch.bfloat16 else x
        return ((whole.sum(axes) if axes else whole.clone()).reshape(attrs.shape),)

    def flops(
        self, attrs: SumToAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return ins[0].numel
