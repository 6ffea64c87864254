"""Adam and AdamW: moving averages of the gradient and of its square, corrected for their start.

The correction 1 - beta^t is itself a moving average, that of ones from 0. It is kept in that form:
1 - 0.999^t formed from a power in fp32 has lost four digits at the first steps, the average none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.errors import ConfigError, ShapeError, number
from graphnet.ir.graph import Builder, Value
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import TensorType, f32
from graphnet.ops.update import (
    OptimizerSpec,
    Update,
    UpdateAttrs,
    emit_penalised,
    penalised,
    times,
)

_LEAST = 2.0**-126  # of fp32, before it loses digits


@register
class AdamDebias(Op):
    """(c1', c2') from c1, c2, gain1, gain2: c' = c + gain (1 - c), which is 1 - (1 - gain)^t."""

    name = "adam_debias"
    elementwise = True
    kernel = "elementwise"

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        if len(ins) != 4 or any(t.shape != () for t in ins):
            raise ShapeError(f"adam_debias takes 4 scalars, got {', '.join(map(str, ins))}")
        return ins[:2]

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        c1, c2, gain1, gain2 = args
        return c1 + gain1 * (1 - c1), c2 + gain2 * (1 - c2)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        return [f"({c} + {gain} * (1.0 - {c}))" for c, gain in zip(expr[:2], expr[2:], strict=True)]


@dataclass(frozen=True)
class AdamAttrs(UpdateAttrs):
    """decoupled: weight decay beside the gradient (AdamW), not in it; amsgrad: whether the step is
    divided by the largest v' so far, which is a slot of its own."""

    eps: float = 1e-8
    decoupled: bool = False
    amsgrad: bool = False


@register
class AdamUpdate(Update):
    """(w', m', v') from w, g, m, v, lr, gain1, gain2, weight_decay, c1, c2, and l1 where it is one.

    m' = m + gain1 (g' - m), v' = v + gain2 (g'^2 - v) with gain = 1 - beta, and
    w' = w - lr/c1 m' / (sqrt(v')/sqrt(c2) + eps). g' = g + wd w + l1 sign(w); decoupled: wd stays
    out of it and w is (1 - lr wd) w before the step. amsgrad: a slot u behind v, u' = max(u, v'),
    and u' in the place of v' in w'.
    """

    name = "adam_update"
    attrs_type = AdamAttrs

    def slots(self, attrs: AdamAttrs) -> int:
        return 2 + attrs.amsgrad

    def scalars(self, attrs: AdamAttrs) -> int:
        return 6 + attrs.l1

    def _split(self, attrs: AdamAttrs, operands: Sequence[Any]) -> tuple[Any, Any]:
        """The tensors and the scalars among the operands."""
        tensors = 2 + self.slots(attrs)
        return operands[:tensors], operands[tensors:]

    def reference(self, attrs: AdamAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (w, g, m, v, *top), (lr, gain1, gain2, wd, c1, c2, *l1) = self._split(attrs, args)
        lr = lr * attrs.lr_mult
        g = penalised(attrs, w, g, None if attrs.decoupled else wd, l1)
        if attrs.decoupled:
            w = w * (1 - lr * (wd * attrs.decay_mult))
        m1 = m + gain1 * (g - m)
        v1 = v + gain2 * (g * g - v)
        slots = [m1, v1, *(torch.maximum(u, v1) for u in top)]
        return (w - lr / c1 * m1 / (slots[-1].sqrt() / c2.sqrt() + attrs.eps), *slots)

    def flops(
        self, attrs: AdamAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return (14 + 2 * attrs.l1 + attrs.amsgrad) * ins[0].numel

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        (w, g, m, v, *top), (lr, gain1, gain2, wd, c1, c2, *l1) = self._split(attrs, expr)
        lr = times(lr, attrs.lr_mult)
        g = emit_penalised(attrs, w, g, None if attrs.decoupled else wd, l1)
        if attrs.decoupled and attrs.decay_mult:
            w = f"({w} * (1.0 - {lr} * {times(wd, attrs.decay_mult)}))"
        m1 = f"({m} + {gain1} * ({g} - {m}))"
        v1 = f"({v} + {gain2} * ({g} * {g} - {v}))"
        if top:
            ctx.uses("maximum_nan")
        slots = [m1, v1, *(f"maximum_nan({u}, {v1})" for u in top)]
        root = f"(tl.sqrt({slots[-1]} / {c2}) + {attrs.eps!r})"
        return [f"({w} - {lr} * {m1} / ({c1} * {root}))", *slots]


@dataclass(frozen=True)
class Adam(OptimizerSpec):
    """Adam with torch's arguments and defaults, and an L1 penalty as in `SGD`.

    lr, betas, weight_decay and l1 may change between steps; eps, `amsgrad`, `maximize`, and l1 0
    against non-zero, are part of the compiled graph. amsgrad divides by the largest average of
    squares so far (Reddi et al. 2018), which never lets go of a large gradient: one more slot a
    parameter. Behind a change of betas the correction is that of the averages as they are; torch's
    takes the new betas for all steps before.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    l1: float = 0.0
    maximize: bool = False
    op = "adam_update"
    structural = ("l1",)
    decoupled = False

    def __post_init__(self) -> None:
        for knob in self.knobs:
            self.numbers(knob, getattr(self, knob))
        number(type(self).__name__, "l1", self.l1)
        if number(type(self).__name__, "eps", self.eps) < _LEAST:
            raise ConfigError(
                f"{type(self).__name__}: eps={self.eps!r} divides by 0 in fp32", help="use 1e-8"
            )

    def attrs(self, lr_mult: float = 1.0, decay_mult: float = 1.0) -> AdamAttrs:
        """Of a parameter with these multipliers."""
        return AdamAttrs(
            self.l1 != 0, lr_mult, decay_mult, self.maximize, float(self.eps), self.decoupled,
            self.amsgrad,
        )  # fmt: skip

    @property
    def slots(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))

    @property
    def hypers(self) -> tuple[str, ...]:
        return ("lr", "gain1", "gain2", "weight_decay", *(("l1",) if self.l1 else ()))

    @property
    def knobs(self) -> tuple[str, ...]:
        return ("lr", "betas", "weight_decay", *(("l1",) if self.l1 else ()))

    def numbers(self, knob: str, value: Any) -> dict[str, float]:
        if knob != "betas":
            return super().numbers(knob, value)
        name = type(self).__name__
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise ConfigError(f"{name}: betas is a pair of numbers, not {value!r}")
        betas = [number(name, "betas", b) for b in value]
        if max(betas) >= 1:
            raise ConfigError(f"{name}: betas={value!r} are not in [0, 1)")
        return {"gain1": 1 - betas[0], "gain2": 1 - betas[1]}

    def scalars(
        self, b: Builder, hypers: Mapping[str, Value]
    ) -> tuple[list[Value], list[tuple[Value, Value]]]:
        old = [b.input(f"adam.debias{k}", TensorType(f32, ()), "counter") for k in (1, 2)]
        new = b.emit("adam_debias", [*old, hypers["gain1"], hypers["gain2"]])
        made = [v for v in new if v is not None]
        first = [hypers[n] for n in ("lr", "gain1", "gain2", "weight_decay")]
        l1 = [hypers["l1"]] if self.l1 else []
        return [*first, *made, *l1], list(zip(old, made, strict=True))


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with weight decay beside the gradient: w shrinks by lr weight_decay at each step."""

    weight_decay: float = 1e-2
    decoupled = True
