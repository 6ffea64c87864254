"""Optimizer updates as ops, and the specs that people write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.errors import ConfigError, ShapeError
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import TensorType

FORMS = ("torch", "classic")


@dataclass(frozen=True)
class SGDAttrs(Attrs):
    """momentum: whether there is a buffer; form: how it is written (they differ after an lr
    change): "torch" v = mom v + g, w -= lr v; "classic" (Caffe) v = mom v - lr g, w += v."""

    momentum: bool = False
    nesterov: bool = False
    form: str = "torch"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"momentum form {self.form!r}", help=f"use one of {FORMS}")


@register
class SGDUpdate(Op):
    """(w', v') from w, g, v, lr, momentum, weight_decay; without momentum w' from w, g, lr, wd.

    g' = g + wd w (L2). torch: v' = mom v + g', w' = w - lr v' (Nesterov: w - lr (g' + mom v')).
    classic: v' = mom v - lr g', w' = w + v' (Nesterov: w - mom v + (1 + mom) v').
    """

    name = "sgd_update"
    attrs_type = SGDAttrs
    kernel = "elementwise"

    def infer(self, attrs: SGDAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        want = 6 if attrs.momentum else 4
        if len(ins) != want:
            raise ShapeError(f"sgd_update takes {want} operands, got {len(ins)}")
        tensors = ins[:3] if attrs.momentum else ins[:2]
        for t in tensors[1:]:
            if t.shape != ins[0].shape:
                raise ShapeError(f"sgd_update: {t} does not fit the parameter {ins[0]}")
        for t in ins[len(tensors) :]:
            if t.shape != ():
                raise ShapeError(f"sgd_update: {t} is no scalar hyper-parameter")
        w = ins[0].with_shape(ins[0].shape)
        return (w, ins[2].with_shape(ins[2].shape)) if attrs.momentum else (w,)

    def reference(self, attrs: SGDAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not attrs.momentum:
            w, g, lr, wd = args
            return (w - lr * (g + wd * w),)
        w, g, v, lr, mom, wd = args
        g = g + wd * w
        if attrs.form == "torch":
            v1 = mom * v + g
            return (w - lr * (g + mom * v1 if attrs.nesterov else v1), v1)
        v1 = mom * v - lr * g
        return (w - mom * v + (1 + mom) * v1 if attrs.nesterov else w + v1, v1)

    def flops(
        self, attrs: SGDAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return (6 if attrs.momentum else 4) * ins[0].numel

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        if not attrs.momentum:
            w, g, lr, wd = expr
            return [f"({w} - {lr} * ({g} + {wd} * {w}))"]
        w, g, v, lr, mom, wd = expr
        g = f"({g} + {wd} * {w})"
        if attrs.form == "torch":
            v1 = f"({mom} * {v} + {g})"
            step = f"({g} + {mom} * {v1})" if attrs.nesterov else v1
            return [f"({w} - {lr} * {step})", v1]
        v1 = f"({mom} * {v} - {lr} * {g})"
        w1 = f"{w} - {mom} * {v} + (1.0 + {mom}) * {v1}" if attrs.nesterov else f"{w} + {v1}"
        w1 = f"({w1})"
        return [w1, v1]


@register
class RecordStep(Op):
    """(ring', step'): the loss stands at ring[step mod its length], then the step counts on."""

    name = "record_step"
    kernel = "record"

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        ring, loss, step = ins
        if len(ring.shape) != 1 or loss.shape != () or step.shape != ():
            raise ShapeError(f"record_step: {ring}, {loss}, {step} are no ring, scalar and counter")
        return (ring, step)

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ring, loss, step = args
        out = ring.clone()
        out[int(step) % len(ring)] = loss
        return (out, step + 1)

    def flops(
        self, attrs: Attrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 0


def _number(name: str, value: float, low: float, high: float = math.inf) -> float:
    if not isinstance(value, (int, float)) or not low <= value <= high or math.isinf(value):
        raise ConfigError(f"SGD: {name}={value!r} is not a finite number >= {low:g}")
    return float(value)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with torch's arguments.

    lr, momentum and weight_decay may change between steps; momentum 0 against non-zero,
    `nesterov` and `form` are part of the compiled graph.
    """

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    form: str = "torch"
    op = "sgd_update"

    def __post_init__(self) -> None:
        _number("lr", self.lr, 0.0)
        _number("momentum", self.momentum, 0.0)
        _number("weight_decay", self.weight_decay, 0.0)
        if self.dampening != 0:
            raise ConfigError(f"SGD: dampening={self.dampening!r} is not supported", help="use 0")
        if self.nesterov and not self.momentum:
            raise ConfigError("SGD: nesterov=True with momentum=0", help="set momentum, e.g. 0.9")
        self.attrs()

    def attrs(self) -> SGDAttrs:
        return SGDAttrs(self.momentum != 0, self.nesterov, self.form)

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the per-parameter buffers, in operand order."""
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def hypers(self) -> tuple[str, ...]:
        """Names of the scalar operands, in operand order."""
        return ("lr", "momentum", "weight_decay") if self.momentum else ("lr", "weight_decay")
