"""What may happen to a gradient before its update: summing over steps, clipping, a guard.

All but the norm are elementwise and join the kernels around them. The norm reads every gradient
before any update may run: it is what a fused update has to give way to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.errors import ConfigError, ShapeError
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import TensorType, f32

POLICIES = ("auto", "stop", "skip", None)


@dataclass(frozen=True)
class Handling:
    """How a training step treats its gradients.

    accumulate  there are sums over several steps; `apply` says that this step ends one
    clip        the gradients together are scaled down to a norm
    nonfinite   "stop": a loss that is not finite leaves the state untouched; "skip": so does a
                gradient that is not; "auto": as "stop", and so do the steps behind it
    """

    accumulate: bool = False
    apply: bool = True
    clip: bool = False
    nonfinite: str | None = None

    def __post_init__(self) -> None:
        if self.nonfinite not in POLICIES:
            raise ConfigError(f"nonfinite={self.nonfinite!r}", help=f"one of {POLICIES}")

    @property
    def sticky(self) -> bool:
        """Whether a step that is not finite holds back those behind it."""
        return self.nonfinite == "auto"

    @property
    def norm(self) -> bool:
        """Whether the norm of all gradients is formed. A sum over steps may hold what an earlier
        loss, which nobody guards, has left there."""
        guarded = self.nonfinite is not None
        return self.clip or self.nonfinite == "skip" or (guarded and self.accumulate)


class _OnGradient(Op):
    """Elementwise over its first operand; `like` more have its shape, the rest are scalars."""

    elementwise = True
    kernel = "elementwise"
    like = 0
    least = 2
    most = 2
    as_operand = 0  # whose type the result has, its layout included

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        if not self.least <= len(ins) <= self.most:
            raise ShapeError(f"{self.name} takes {self.least} to {self.most} operands: {len(ins)}")
        for k, t in enumerate(ins[1:]):
            if t.shape != (ins[0].shape if k < self.like else ()):
                raise ShapeError(f"{self.name}: operand {k + 2}, {t}, does not fit {ins[0]}")
        return (ins[self.as_operand],)


@register
class Accumulate(_OnGradient):
    """sum + live g from sum, g, live: g is a mean over `live` rows. With a fourth operand, the
    rows of all steps, the mean over them."""

    name = "accumulate"
    like, least, most = 1, 3, 4

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = args[0] + args[1] * args[2].to(args[1].dtype)
        return (total / args[3] if len(args) == 4 else total,)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        total = f"({expr[0]} + {expr[1]} * {expr[2]}.to(tl.float32))"
        return [f"({total} / {expr[3]})" if len(expr) == 4 else total]


@register
class GlobalNorm(Op):
    """sqrt of the sum of squares over all operands: gradients of any shapes."""

    name = "global_norm"
    kernel = "reduce"

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        if not ins or any(not t.dtype.is_float for t in ins):
            got = ", ".join(map(str, ins)) or "none"
            raise ShapeError(f"global_norm takes gradients, got {got}")
        return (TensorType(f32, ()),)

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.stack([(g * g).sum() for g in args]).sum().sqrt(),)

    def cpu(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.stack([g.norm() for g in args]).norm(),)

    def flops(
        self, attrs: Attrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 2 * sum(t.numel for t in ins)


@register
class Clip(_OnGradient):
    """g min(1, limit / (norm + 1e-6)) from g, norm, limit; a norm that is NaN makes NaN (torch)."""

    name = "clip"
    least = most = 3

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        g, norm, limit = args
        return (g * (limit / (norm + 1e-6)).clamp(max=1.0),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        g, norm, limit = expr
        return [f"({g} * tl.where({norm} + 1e-6 <= {limit}, 1.0, {limit} / ({norm} + 1e-6)))"]


@register
class IfFinite(_OnGradient):
    """new where all the scalars are finite, else old; from new, old, scalars."""

    name = "if_finite"
    like, least, most = 1, 3, 4
    as_operand = 1  # new lies as old does

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        new, old, *flags = args
        return (new if all(math.isfinite(f) for f in flags) else old.clone(),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        finite = " & ".join(f'(tl.abs({f}) < float("inf"))' for f in expr[2:])
        return [f"tl.where({finite}, {expr[0]}, {expr[1]})"]
