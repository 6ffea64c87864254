"""Dropout. No mask is stored: a counter-based generator makes it again in the backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.errors import ConfigError, ShapeError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, numel, register
from graphnet.ir.types import TensorType
from graphnet.ops.philox import dropout_mask, threshold


@dataclass(frozen=True)
class DropoutAttrs(Attrs):
    """p: share dropped; mode: "inverted" (scale by 1/(1-p) in training) or "vanilla" (scale by
    1-p in inference); stream: CRC-32 of the layer's name; global_batch: rows of one step; parts:
    x is one of so many equal parts of each sample, along axis 1."""

    p: float = 0.5
    mode: str = "inverted"
    stream: int = 0
    training: bool = True
    global_batch: int = 0
    parts: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.p < 1.0:
            raise ConfigError(f"dropout p={self.p} is not in [0, 1)")
        if self.mode not in ("inverted", "vanilla"):
            raise ConfigError(f"dropout mode {self.mode!r}", help="use inverted or vanilla")

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by."""
        if self.training:
            return 1.0 / (1.0 - self.p) if self.mode == "inverted" else 1.0
        return 1.0 if self.mode == "inverted" else 1.0 - self.p


@register
class Dropout(Op):
    """y = x mask scale from x, seed, step and, where the batch is a part of a larger one, the row
    of that one at which it starts; where x is a part of each sample, which one (the rank) in its
    place. Linear in x, so its gradient is itself."""

    name = "dropout"
    attrs_type = DropoutAttrs
    elementwise = joins = True
    kernel = "elementwise"

    def infer(self, attrs: DropoutAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        for t in ins[1:]:
            if t.shape != () or t.dtype.name != "i64":
                raise ShapeError(f"dropout takes its seed and step as i64[], got {t}")
        return (ins[0].with_shape(ins[0].shape),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        if dy is None or not needs[0]:
            return (None,) * len(eqn.inputs)
        gradient = b.one("dropout", dy, *eqn.inputs[1:], attrs=eqn.attrs)
        return (gradient, *(None,) * (len(eqn.inputs) - 1))

    def reference(self, attrs: DropoutAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, seed, step, *first = args
        if not attrs.training:
            return (x * attrs.scale,)
        at = int(first[0]) if first else 0
        row, element = (0, at * numel(x.shape[1:])) if attrs.parts > 1 else (at, 0)
        keep = dropout_mask(
            int(seed), int(step), tuple(x.shape), attrs.p, attrs.stream, attrs.global_batch, row,
            element,
        )  # fmt: skip
        mask = torch.from_numpy(keep).to(x.device)
        return (torch.where(mask, x * attrs.scale, torch.zeros_like(x)),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        scaled = f"({expr[0]} * {attrs.scale!r})"
        if not attrs.training:
            return [scaled]
        ctx.uses("dropout_keep")
        i0, i1, i2, i3 = ctx.coords
        _, *rest = (*ctx.shape, 1, 1, 1)[:4]
        element = f"({i1} * {numel(rest[1:])} + {i2} * {rest[2]} + {i3})"
        batch = attrs.global_batch or ctx.shape[0]
        first = ""
        if attrs.parts > 1:
            element = f"({expr[3]} * {numel(ctx.shape[1:])} + {element})"
        elif len(expr) > 3:
            first = f"{expr[3]} + "
        sample = f"({expr[2]} * {batch} + {first}{i0})"
        keep = f"dropout_keep({expr[1]}, {sample}, {element}, {attrs.stream}, {threshold(attrs.p)})"
        return [f"tl.where({keep}, {scaled}, 0.0)"]
