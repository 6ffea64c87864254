"""Optimizer updates as ops, and the specs that people write: SGD here, Adam in `adam.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from graphnet.errors import ConfigError, ShapeError, number
from graphnet.ir.graph import Builder, Value
from graphnet.ir.op import Attrs, Op, get_op, register
from graphnet.ir.types import TensorType, f32

FORMS = ("torch", "classic")


@dataclass(frozen=True)
class UpdateAttrs(Attrs):
    """What every update has. l1: whether there is an L1 operand; lr_mult and decay_mult: what the
    parameter multiplies the rate, and the penalties, with; maximize: whether it climbs."""

    l1: bool = False
    lr_mult: float = 1.0
    decay_mult: float = 1.0
    maximize: bool = False


class Update(Op, ABC):
    """Base: results are the new parameter and slots; operands w, g, slots, then scalars."""

    kernel = "elementwise"

    @abstractmethod
    def slots(self, attrs: Any) -> int:
        """How many buffers a parameter has."""

    @abstractmethod
    def scalars(self, attrs: Any) -> int:
        """How many scalar operands stand behind the tensors."""

    def infer(self, attrs: Any, *ins: TensorType) -> tuple[TensorType, ...]:
        tensors = 2 + self.slots(attrs)
        want = tensors + self.scalars(attrs)
        if len(ins) != want:
            raise ShapeError(f"{self.name} takes {want} operands, got {len(ins)}")
        for t in ins[1:tensors]:
            if t.shape != ins[0].shape:
                raise ShapeError(f"{self.name}: {t} does not fit the parameter {ins[0]}")
        for t in ins[tensors:]:
            if t.shape != ():
                raise ShapeError(f"{self.name}: {t} is no scalar hyper-parameter")
        return (ins[0], *ins[2:tensors])  # each lies as what it replaces


def penalised(attrs: UpdateAttrs, w: Any, g: Any, decay: Any, l1: Sequence[Any]) -> Any:
    """g + decay w + l1 sign(w): the gradient of L2, L1 or both (elastic net). decay may be None.
    maximize turns g around, not the penalties (as torch)."""
    if attrs.maximize:
        g = -g
    if attrs.decay_mult:
        if decay is not None:
            g = g + decay * attrs.decay_mult * w
        if l1:
            g = g + l1[0] * attrs.decay_mult * torch.sign(w)
    return g


def times(text: str, factor: float) -> str:
    """Generated code: the product, without a factor of 1."""
    return text if factor == 1.0 else f"({text} * {factor!r})"


def emit_penalised(attrs: UpdateAttrs, w: str, g: str, decay: str | None, l1: Sequence[str]) -> str:
    """The same as generated code."""
    if attrs.maximize:
        g = f"(-{g})"
    if attrs.decay_mult:
        if decay is not None:
            g = f"({g} + {times(decay, attrs.decay_mult)} * {w})"
        if l1:
            sign = f"tl.where({w} > 0.0, 1.0, tl.where({w} < 0.0, -1.0, 0.0))"
            g = f"({g} + {times(l1[0], attrs.decay_mult)} * {sign})"
    return g


@dataclass(frozen=True)
class SGDAttrs(UpdateAttrs):
    """momentum: whether there is a buffer; form: how it is written (they differ after an lr
    change): "torch" v = mom v + g, w -= lr v; "classic" (Caffe) v = mom v - lr g, w += v;
    dampening: what g misses in the buffer from the second step on."""

    momentum: bool = False
    nesterov: bool = False
    form: str = "torch"
    dampening: float = 0.0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"momentum form {self.form!r}", help=f"use one of {FORMS}")


@register
class SGDUpdate(Update):
    """(w', v') from w, g, v, lr, momentum, weight_decay, l1 where it is one, and with dampening d
    whether a step was done before, s (0 or 1); without momentum w' from w, g, lr, weight_decay.

    g' = g + wd w + l1 sign(w). torch: v' = mom v + (1 - d s) g', w' = w - lr v' (Nesterov: w - lr
    (g' + mom v')). classic: v' = mom v - lr g', w' = w + v' (Nesterov: w - mom v + (1 + mom) v').
    """

    name = "sgd_update"
    attrs_type = SGDAttrs

    def slots(self, attrs: SGDAttrs) -> int:
        return int(attrs.momentum)

    def scalars(self, attrs: SGDAttrs) -> int:
        return 2 + attrs.momentum + attrs.l1 + (attrs.dampening != 0)

    def reference(self, attrs: SGDAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not attrs.momentum:
            w, g, lr, wd, *l1 = args
            return (w - lr * attrs.lr_mult * penalised(attrs, w, g, wd, l1),)
        w, g, v, lr, mom, wd, *rest = args
        g, lr = penalised(attrs, w, g, wd, rest[: attrs.l1]), lr * attrs.lr_mult
        if attrs.form == "torch":
            v1 = mom * v + (g * (1 - attrs.dampening * rest[-1]) if attrs.dampening else g)
            return (w - lr * (g + mom * v1 if attrs.nesterov else v1), v1)
        v1 = mom * v - lr * g
        return (w - mom * v + (1 + mom) * v1 if attrs.nesterov else w + v1, v1)

    def flops(
        self, attrs: SGDAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return ((6 if attrs.momentum else 4) + 2 * attrs.l1) * ins[0].numel

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        if not attrs.momentum:
            w, g, lr, wd, *l1 = expr
            return [f"({w} - {times(lr, attrs.lr_mult)} * {emit_penalised(attrs, w, g, wd, l1)})"]
        w, g, v, lr, mom, wd, *rest = expr
        g, lr = emit_penalised(attrs, w, g, wd, rest[: attrs.l1]), times(lr, attrs.lr_mult)
        if attrs.form == "torch":
            damped = f"{g} * (1.0 - {attrs.dampening!r} * {rest[-1]})" if attrs.dampening else g
            v1 = f"({mom} * {v} + {damped})"
            step = f"({g} + {mom} * {v1})" if attrs.nesterov else v1
            return [f"({w} - {lr} * {step})", v1]
        v1 = f"({mom} * {v} - {lr} * {g})"
        w1 = f"{w} - {mom} * {v} + (1.0 + {mom}) * {v1}" if attrs.nesterov else f"{w} + {v1}"
        w1 = f"({w1})"
        return [w1, v1]


@dataclass(frozen=True)
class RecordAttrs(Attrs):
    """sticky: a step that is not finite holds back itself and the steps behind it."""

    sticky: bool = False


@register
class RecordStep(Op):
    """(ring', step') from ring, loss, step and, where there is one, the norm of the gradients.

    The loss stands at ring[step mod its length], NaN where the norm is not finite; then the step
    counts on. A sticky record takes a count of the steps held back, `held`, before the norm, and
    gives (ring', step', held', go): the loss stands at ring[(step + held) mod its length]. `go` is
    what stands there, or inf where an earlier step was not finite; the updates look at it. Where it
    is not finite, held counts on in place of step.
    """

    name = "record_step"
    kernel = "record"
    attrs_type = RecordAttrs

    def infer(self, attrs: RecordAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        ring, loss, step, *more = ins
        if not attrs.sticky <= len(more) <= 1 + attrs.sticky or any(t.shape != () for t in more):
            takes = "held and one norm at most" if attrs.sticky else "one norm at most"
            raise ShapeError(f"record_step takes {takes}, scalars, got {more}")
        if len(ring.shape) != 1 or loss.shape != () or step.shape != ():
            raise ShapeError(f"record_step: {ring}, {loss}, {step} are no ring, scalar and counter")
        return (ring, step, more[0], TensorType(f32, ())) if attrs.sticky else (ring, step)

    def reference(self, attrs: RecordAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ring, loss, step, *more = args
        held = more.pop(0) if attrs.sticky else torch.zeros((), device=ring.device)
        value = loss if all(bool(torch.isfinite(n)) for n in more) else loss * float("nan")
        out = ring.clone()
        out[(int(step) + int(held)) % len(ring)] = value
        if not attrs.sticky:
            return (out, step + 1)
        go = value if not held else torch.full_like(value, float("inf"))
        fine = int(torch.isfinite(go))
        return (out, step + fine, held + (1 - fine), go)

    def flops(
        self, attrs: Attrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 0


class OptimizerSpec(ABC):
    """What a spec tells the compiler and the live view.

    op          the update
    slots       names of the per-parameter buffers, in operand order
    hypers      names of the device's scalars, in operand order
    knobs       arguments that may change between steps; `numbers` makes scalars of one
    structural  knobs whose 0 is another graph
    """

    op = ""
    structural: tuple[str, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if args and isinstance(args[0], Iterable) and not isinstance(args[0], str | torch.Tensor):
            raise ConfigError(
                f"{cls.__name__} is given a {type(args[0]).__name__} in the place of its learning "
                "rate",
                help=f"gn.{cls.__name__}(lr=0.01) holds settings alone: gn.compile(net, shape, "
                "loss=..., optimizer=...) knows the parameters; p.trainable = False leaves one out",
            )
        return super().__new__(cls)

    @property
    @abstractmethod
    def hypers(self) -> tuple[str, ...]:
        """Names of the device's scalars; every spec has its own."""

    @property
    def knobs(self) -> tuple[str, ...]:
        """Names of what may be set between steps."""
        return self.hypers

    def numbers(self, knob: str, value: Any) -> dict[str, float]:
        """Device scalar to number, for a new value of a knob; ConfigError for a bad one."""
        return {knob: number(type(self).__name__, knob, value)}

    def scalars(
        self, b: Builder, hypers: Mapping[str, Value]
    ) -> tuple[list[Value], list[tuple[Value, Value]]]:
        """The scalar operands of every update, and state of the optimizer's own to commit."""
        return list(hypers.values()), []


@dataclass(frozen=True)
class SGD(OptimizerSpec):
    """Stochastic gradient descent with torch's arguments, `form` and an L1 penalty.

    lr, momentum, weight_decay and l1 may change between steps; momentum or l1 0 against non-zero,
    dampening, `nesterov`, `form` and `maximize` are part of the compiled graph. The gradient of the
    penalties is weight_decay w + l1 sign(w): an elastic net lambda (beta sum w^2 + sum |w|) is
    weight_decay = 2 lambda beta, l1 = lambda.
    """

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    form: str = "torch"
    l1: float = 0.0
    maximize: bool = False
    op = "sgd_update"
    structural = ("momentum", "l1")

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "weight_decay", "l1"):
            number("SGD", name, getattr(self, name))
        if number("SGD", "dampening", self.dampening) and (
            not self.momentum or self.nesterov or self.form != "torch"
        ):
            raise ConfigError(
                f"SGD: dampening={self.dampening!r} is for torch's plain momentum", help="use 0"
            )
        if self.nesterov and not self.momentum:
            raise ConfigError("SGD: nesterov=True with momentum=0", help="set momentum, e.g. 0.9")
        self.attrs()

    def attrs(self, lr_mult: float = 1.0, decay_mult: float = 1.0) -> SGDAttrs:
        """Of a parameter with these multipliers."""
        return SGDAttrs(
            self.l1 != 0, lr_mult, decay_mult, self.maximize, self.momentum != 0, self.nesterov,
            self.form, float(self.dampening),
        )  # fmt: skip

    def scalars(
        self, b: Builder, hypers: Mapping[str, Value]
    ) -> tuple[list[Value], list[tuple[Value, Value]]]:
        if not self.dampening:
            return super().scalars(b, hypers)
        started = b.input("sgd.started", TensorType(f32, ()), "counter")
        one = get_op("full").attrs_type(value=1.0, shape=(), dtype="f32")  # type: ignore[call-arg]
        return [*hypers.values(), started], [(started, b.one("full", attrs=one))]

    @property
    def slots(self) -> tuple[str, ...]:
        # They differ in sign and scale: one form must not go on with the other's.
        name = "momentum_buffer" if self.form == "torch" else "velocity"
        return (name,) if self.momentum else ()

    @property
    def hypers(self) -> tuple[str, ...]:
        momentum = ("momentum",) if self.momentum else ()
        return ("lr", *momentum, "weight_decay", *(("l1",) if self.l1 else ()))
