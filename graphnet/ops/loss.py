"""Losses over logits [N, C] and labels i64 [N], averaged over the first `live` rows.

Rows from `live` on are padding of a smaller batch: they add nothing and get zero gradients. Of a
step over several ranks a fourth operand, `live_all`, says how many rows are live on all of them:
the loss is then this rank's share of the mean over all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from graphnet.errors import ConfigError, ShapeError, UnsupportedOpError, number
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import TensorType, f32


@dataclass(frozen=True)
class CrossEntropyAttrs(Attrs):
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ConfigError(f"label_smoothing={self.label_smoothing} is not in [0, 1]")


@dataclass(frozen=True)
class MultiMarginAttrs(Attrs):
    """mean: divided by the number of classes, as torch does."""

    margin: float = 1.0
    mean: bool = True


class _Loss(Op):
    kernel = "loss"
    over_batch = 2

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        if len(ins) not in (3, 4):
            raise ShapeError(f"{self.name} takes logits, labels, live and live_all, got {len(ins)}")
        logits, labels, *live = ins
        if len(logits.shape) != 2:
            raise ShapeError(f"the loss takes logits [N, C], got {logits}", help="add a Flatten")
        if labels.shape != logits.shape[:1] or labels.dtype.name != "i64":
            raise ShapeError(f"labels {labels} do not fit logits {logits}: want i64[N]")
        for t in live:
            if t.shape != () or t.dtype.name != "i32":
                raise ShapeError(f"the live batch count is i32[], got {t}")
        return self.result(logits)

    def result(self, logits: TensorType) -> tuple[TensorType, ...]:
        return (TensorType(f32, ()),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dloss,) = cotangents
        if dloss is None or not needs[0]:
            return (None,) * len(eqn.inputs)
        grad = b.one(f"{self.name}_grad", *eqn.inputs, attrs=eqn.attrs)
        return (b.one("mul", grad, dloss), *(None,) * (len(eqn.inputs) - 1))

    def flops(
        self, attrs: Attrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 5 * ins[0].numel


class _LossGrad(_Loss):
    def result(self, logits: TensorType) -> tuple[TensorType, ...]:
        return (logits.with_shape(logits.shape),)


def _rows(logits: torch.Tensor, live: Sequence[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """[N] 1 for live rows, and the count that the mean divides by: the live rows of all ranks."""
    alive = (torch.arange(logits.shape[0], device=logits.device) < int(live[0])).to(logits.dtype)
    return alive, float(max(int(live[-1]), 1))


def _target(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """[N, C] the distribution aimed at."""
    classes = logits.shape[1]
    out = torch.full_like(logits, smoothing / classes)
    return out.scatter_add(1, labels[:, None], torch.full_like(logits[:, :1], 1.0 - smoothing))


@register
class CrossEntropy(_Loss):
    """-(1/live) sum over live rows of sum_j t_j log softmax(z)_j, t = onehot (1-e) + e/C."""

    name = "cross_entropy"
    attrs_type = CrossEntropyAttrs

    def reference(self, attrs: CrossEntropyAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z, labels, *live = args
        alive, count = _rows(z, live)
        shifted = z - z.amax(1, keepdim=True)
        logp = shifted - shifted.exp().sum(1, keepdim=True).log()
        # The label's term is gathered: a logit of -inf elsewhere must not become 0 * inf.
        e = attrs.label_smoothing
        rows = -(1 - e) * logp.gather(1, labels[:, None])[:, 0]
        if e:
            rows = rows - e * logp.mean(1)
        return ((torch.where(alive > 0, rows, torch.zeros_like(rows))).sum() / count,)


@register
class CrossEntropyGrad(_LossGrad):
    """(softmax(z) - t) / live on live rows, 0 elsewhere."""

    name = "cross_entropy_grad"
    attrs_type = CrossEntropyAttrs

    def reference(self, attrs: CrossEntropyAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z, labels, *live = args
        alive, count = _rows(z, live)
        e = (z - z.amax(1, keepdim=True)).exp()
        grad = e / e.sum(1, keepdim=True) - _target(z, labels, attrs.label_smoothing)
        return (torch.where(alive[:, None] > 0, grad / count, torch.zeros_like(grad)),)


def _margins(
    z: torch.Tensor, labels: torch.Tensor, margin: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, C] z_j - z_y + margin, and 1 where j is not the label."""
    right = z.gather(1, labels[:, None])
    others = torch.ones_like(z).scatter(1, labels[:, None], 0.0)
    return z - right + margin, others


@register
class MultiMargin(_Loss):
    """Multiclass hinge: (1/live) sum over rows of (1/C) sum_{j != y} max(0, z_j - z_y + margin);
    without `mean` no 1/C."""

    name = "multi_margin"
    attrs_type = MultiMarginAttrs

    def reference(self, attrs: MultiMarginAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z, labels, *live = args
        alive, count = _rows(z, live)
        m, others = _margins(z, labels, attrs.margin)
        rows = (m.clamp(min=0) * others).sum(1) / (z.shape[1] if attrs.mean else 1)
        return ((rows * alive).sum() / count,)


@register
class MultiMarginGrad(_LossGrad):
    """1/(C live) where the margin is broken, minus their number at the label; without `mean` no
    1/C."""

    name = "multi_margin_grad"
    attrs_type = MultiMarginAttrs

    def reference(self, attrs: MultiMarginAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z, labels, *live = args
        alive, count = _rows(z, live)
        m, others = _margins(z, labels, attrs.margin)
        broken = (m > 0).to(z.dtype) * others
        grad = broken.scatter_add(1, labels[:, None], -broken.sum(1, keepdim=True))
        return (grad * alive[:, None] / (count * (z.shape[1] if attrs.mean else 1)),)


def _only(default: Any) -> Any:
    """A field for an argument of torch's that has one value here."""
    return field(default=default, repr=False, metadata={"only": True})


class _Spec(ABC):
    """Base: a loss as people write it, with torch's arguments in torch's order."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if not f.metadata.get("only"):
                number(type(self).__name__, f.name, value, -math.inf)
            elif value is not f.default and (f.default is None or value != f.default):
                raise UnsupportedOpError(
                    f"{type(self).__name__}: {f.name} is not implemented but for {f.default!r}",
                    help="losses are means over the rows of a batch, all classes weighing the same",
                )
        self.attrs()

    @abstractmethod
    def attrs(self) -> Attrs:
        """Those of the op."""


@dataclass(frozen=True)
class CrossEntropyLoss(_Spec):
    """Softmax cross-entropy. Class weights and other reductions are refused, and so is every label
    that is no class: there is none to ignore."""

    weight: None = _only(None)
    size_average: None = _only(None)
    ignore_index: int = _only(-100)
    reduce: None = _only(None)
    reduction: str = _only("mean")
    label_smoothing: float = 0.0
    op = "cross_entropy"

    def attrs(self) -> CrossEntropyAttrs:
        return CrossEntropyAttrs(float(self.label_smoothing))


@dataclass(frozen=True)
class MultiMarginLoss(_Spec):
    """The multiclass hinge loss, p = 1, with torch's mean over classes."""

    p: int = _only(1)
    margin: float = 1.0
    weight: None = _only(None)
    size_average: None = _only(None)
    reduce: None = _only(None)
    reduction: str = _only("mean")
    op = "multi_margin"

    def attrs(self) -> MultiMarginAttrs:
        return MultiMarginAttrs(float(self.margin))


@dataclass(frozen=True)
class MulticlassHingeLoss(_Spec):
    """The lecture's hinge: (1/N) sum_i sum_{j != y_i} max(0, f_j - f_{y_i} + margin).

    `MultiMarginLoss` times the number of classes. Its lambda R(W) is the optimizer's: weight_decay
    for L2, l1 for L1.
    """

    margin: float = 1.0
    op = "multi_margin"

    def attrs(self) -> MultiMarginAttrs:
        return MultiMarginAttrs(float(self.margin), mean=False)
