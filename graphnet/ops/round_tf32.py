"""round_tf32: fp32 rounded to the 10 bits of mantissa that a TF32 product reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphnet.errors import DTypeError
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import TensorType, f32

_DROPPED = 13  # of fp32's 23 bits of mantissa


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x rounded to the nearest TF32 number, ties to even, in its own dtype.

    What is no fp32 number (float64) is rounded to fp32 first. NaN stays NaN, and so does infinity;
    a number above the largest of TF32 becomes infinity, as in a conversion to bf16.
    """
    low = x.float()
    bits = low.view(torch.int32)
    half = (1 << (_DROPPED - 1)) - 1
    kept = (bits + half + ((bits >> _DROPPED) & 1)) & -(1 << _DROPPED)
    return torch.where(low.isnan(), low, kept.view(torch.float32)).to(x.dtype)


@register
class RoundTf32(Op):
    """x rounded to TF32 (8 bits of exponent, 10 of mantissa), kept as fp32.

    The tensor cores drop the low 13 bits of what they are given, which shrinks each operand by
    3.4e-4 on average and every product by twice that (measured on an H100: 7e-4). A rounded
    operand has none to drop. The precision pass writes this op, so it has no gradient.
    """

    name = "round_tf32"
    elementwise = joins = keeps = True
    kernel = "elementwise"

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        (x,) = ins
        if x.dtype != f32:
            raise DTypeError(f"round_tf32 takes f32, got {x}", help="cast it to f32 first")
        return (x.with_shape(x.shape),)

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (rounded(args[0]),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        ctx.uses("round_tf32")
        return [f"round_tf32({expr[0]})"]
