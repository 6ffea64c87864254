"""Batch normalization by the statistics of the rows of all ranks, in parts that the ranks exchange
(named as those of torch.nn.SyncBatchNorm).

batch_norm_stats         what a rank knows of each channel: number, mean, squares about the mean
batch_norm_gather_stats  mean and variance of all from what every rank knows
batch_norm_elemt         normalizes the rows of a rank by them
batch_norm_grad_reduce   the sums over the rows of a rank that the gradients are made of
batch_norm_grad_elemt    the gradient of the rows of a rank, from the sums of all

An all_gather stands between the first two, an all_reduce between the last two. Moments are joined
by Chan, Golub and LeVeque's formula (1979): squares about a rank's own mean do not cancel. A rank
without rows joins with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.errors import ShapeError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, get_op, register
from graphnet.ir.types import TensorType, f32, i64
from graphnet.ops import norm_rows
from graphnet.ops.batch_norm import (
    axes,
    image_of,
    live_rows,
    moments,
    moved,
    normalised,
    over,
    vectors_of,
)

Tensors = tuple[torch.Tensor, ...]
KNOWN = 3  # number, mean and squares about the mean


@register
class BatchNormStats(Op):
    """f32[1, 3, C] of x and live: number, mean and sum of squares about the mean of each channel
    over the live rows, zeros where none is live."""

    name = "batch_norm_stats"
    low = (0,)
    over_batch = 1
    kernel = "batch_norm"

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        x, live = ins
        channels = image_of(self.name, x)
        live_rows(self.name, live)
        return (TensorType(f32, (1, KNOWN, channels)),)

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> Tensors:
        x, live = args
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count, mean, squares = moments(wide[: int(live)])
        return (torch.stack((torch.full_like(mean, count), mean, squares))[None],)

    def cpu(self, attrs: Attrs, *args: torch.Tensor) -> Tensors:
        x, live = args
        if not int(live) or not norm_rows.lies_in_rows(x):
            return self.reference(attrs, *args)
        mean, var = norm_rows.statistics(x[: int(live)])
        count = x[: int(live)].numel() // x.shape[1]
        return (torch.stack((torch.full_like(mean, count), mean, var * count))[None],)

    def flops(
        self, attrs: Any, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 5 * ins[0].numel


@dataclass(frozen=True)
class GatherStatsAttrs(Attrs):
    """As those of `batch_norm`."""

    track: bool = True
    momentum: float = 0.1
    cumulative: bool = False


@register
class BatchNormGatherStats(Op):
    """mean, var (biased) and the new running mean, running variance (unbiased) and number of
    batches, from f32[ranks, 3, C] and [running mean, running variance, batches]."""

    name = "batch_norm_gather_stats"
    attrs_type = GatherStatsAttrs
    optional = (2, 3, 4)
    low = ()
    kernel = "sync_batch_norm"

    def infer(self, attrs: GatherStatsAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        known, *running = ins
        if len(known.shape) != 3 or known.shape[1] != KNOWN or known.dtype != f32:
            raise ShapeError(f"{self.name} takes f32[ranks, {KNOWN}, C], got {known}")
        if len(running) != 3 * attrs.track:
            raise ShapeError(f"{self.name}: {len(ins)} operands do not fit {attrs}")
        channels = known.shape[2]
        vectors_of(self.name, channels, running[:2])
        if attrs.track and (running[2].shape, running[2].dtype) != ((), i64):
            raise ShapeError(f"{self.name} counts batches as i64[], got {running[2]}")
        vector = TensorType(f32, (channels,))
        return (vector, vector, *((vector, vector, TensorType(i64, ())) if attrs.track else ()))

    def reference(self, attrs: GatherStatsAttrs, *args: torch.Tensor) -> Tensors:
        (number, means, squares), running = args[0].unbind(1), args[1:]
        count = float(number[:, 0].sum())
        mean = (number * means).sum(0) / max(count, 1.0)
        about = (squares + number * (means - mean) ** 2).sum(0)
        var = about / max(count, 1.0)
        return (mean, var, *moved(attrs, count, mean, var, running))

    def flops(
        self, attrs: Any, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 4 * ins[0].numel


@dataclass(frozen=True)
class ElemtAttrs(Attrs):
    """affine: weight and bias are operands; ranks: over which mean and var were joined."""

    eps: float = 1e-5
    affine: bool = True
    ranks: int = 1


@register
class BatchNormElemt(Op):
    """y = (x - mean) / sqrt(var + eps) weight + bias from x, mean, var, live, live_all, [weight,
    bias].

    mean and var are the moments of x over the rows of all ranks: the gradient of x includes what x
    does to them, so they have none of their own.
    """

    name = "batch_norm_elemt"
    attrs_type = ElemtAttrs
    low = (0,)
    kernel = "batch_norm"

    def infer(self, attrs: ElemtAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        x, mean, var, live, live_all, *rest = ins
        channels = image_of(self.name, x)
        if len(rest) != 2 * attrs.affine:
            raise ShapeError(f"{self.name}: {len(ins)} operands do not fit {attrs}")
        vectors_of(self.name, channels, (mean, var, *rest))
        live_rows(self.name, live)
        live_rows(self.name, live_all)
        return (x.with_shape(x.shape),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        dy, a = cotangents[0], eqn.attrs
        assert isinstance(a, ElemtAttrs)
        nothing: list[Value | None] = [None] * len(eqn.inputs)
        wanted = [needs[0], *(needs[5:] if a.affine else (False, False))]
        if dy is None or not any(wanted):
            return nothing
        x, mean, var, live, live_all, *rest = eqn.inputs
        unread = [] if needs[0] else [k for k in range(2) if not wanted[1 + k]]
        own = b.emit(
            "batch_norm_grad_reduce", [dy, x, mean, var, live], ReduceAttrs(a.eps), unread=unread
        )
        if needs[0]:
            ranks = get_op("all_reduce").attrs_type(ranks=a.ranks)  # type: ignore[call-arg]
            sums = b.emit("all_reduce", own, ranks)  # type: ignore[arg-type]
            operands = [dy, x, mean, var, live, live_all, *sums, *rest[:1]]
            nothing[0] = b.one(
                "batch_norm_grad_elemt", *operands, attrs=GradElemtAttrs(a.eps, a.affine)  # type: ignore[arg-type]
            )
        if a.affine:
            nothing[5:] = [v if need else None for v, need in zip(own, wanted[1:], strict=True)]
        return nothing

    def reference(self, attrs: ElemtAttrs, *args: torch.Tensor) -> Tensors:
        x, mean, var, _, _, *rest = args
        y = (x - over(mean, x)) / torch.sqrt(over(var, x) + attrs.eps)
        return (y * over(rest[0], x) + over(rest[1], x) if rest else y,)

    def cpu(self, attrs: ElemtAttrs, *args: torch.Tensor) -> Tensors:
        x, mean, var, _, _, *rest = args
        scale, shift = (*rest, None, None)[:2]
        return (normalised(x, mean, var, scale, shift, attrs.eps),)

    def flops(
        self, attrs: Any, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 2 * ins[0].numel


@dataclass(frozen=True)
class ReduceAttrs(Attrs):
    eps: float = 1e-5


@register
class BatchNormGradReduce(Op):
    """sum of dy xhat and sum of dy in each channel over the live rows, from dy, x, mean, var, live:
    this rank's part of the gradients of weight and bias."""

    name = "batch_norm_grad_reduce"
    attrs_type = ReduceAttrs
    optional = (0, 1)
    low = (0, 1)
    over_batch = 4
    kernel = "batch_norm"

    def infer(self, attrs: ReduceAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        dy, x, mean, var, live = ins
        channels = image_of(self.name, x)
        if dy.shape != x.shape:
            raise ShapeError(f"{self.name}: {dy} is no gradient of {x}")
        vectors_of(self.name, channels, (mean, var))
        live_rows(self.name, live)
        vector = TensorType(f32, (channels,))
        return (vector, vector)

    def reference(self, attrs: ReduceAttrs, *args: torch.Tensor) -> Tensors:
        dy, x, mean, var, live = args
        g = dy[: int(live)].to(mean.dtype)
        rstd = 1 / torch.sqrt(var + attrs.eps)
        return (
            (g * (x[: int(live)] - over(mean, x))).sum(axes(x)) * rstd, g.sum(axes(x))
        )  # fmt: skip

    def cpu(self, attrs: ReduceAttrs, *args: torch.Tensor) -> Tensors:
        dy, x, mean, var, live = args
        if not int(live) or not norm_rows.lies_in_rows(x):
            return self.reference(attrs, *args)
        dy = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
        rstd = 1 / torch.sqrt(var + attrs.eps)
        return norm_rows.sums(dy[: int(live)], x[: int(live)], mean, rstd)

    def flops(
        self, attrs: Any, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 4 * ins[0].numel


@dataclass(frozen=True)
class GradElemtAttrs(Attrs):
    eps: float = 1e-5
    affine: bool = True


@register
class BatchNormGradElemt(Op):
    """dx = weight rstd (dy - s / M - xhat p / M) from dy, x, mean, var, live, live_all, p, s,
    [weight]: p and s are the sums of dy xhat and of dy over all ranks, M counts their pixels. Rows
    that are not live get zeros."""

    name = "batch_norm_grad_elemt"
    attrs_type = GradElemtAttrs
    low = (0, 1)
    over_batch = 4
    kernel = "batch_norm"

    def infer(self, attrs: GradElemtAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        dy, x, mean, var, live, live_all, *rest = ins
        channels = image_of(self.name, x)
        if dy.shape != x.shape or len(rest) != 2 + attrs.affine:
            raise ShapeError(f"{self.name}: {', '.join(map(str, ins))} do not fit")
        vectors_of(self.name, channels, (mean, var, *rest))
        live_rows(self.name, live)
        live_rows(self.name, live_all)
        return (dy.with_shape(dy.shape),)

    def reference(self, attrs: GradElemtAttrs, *args: torch.Tensor) -> Tensors:
        dy, x, mean, var, live, live_all, products, sums, *weight = args
        count = max(x[:1].numel() // x.shape[1] * int(live_all), 1)
        rstd = 1 / torch.sqrt(var + attrs.eps)
        tilt, level = products * rstd / count, sums / count
        dx = dy - over(level, x) - (x - over(mean, x)) * over(tilt, x)
        dx = dx * over(rstd * weight[0] if weight else rstd, x)
        dx[int(live) :] = 0
        return (dx.to(dy.dtype),)

    def flops(
        self, attrs: Any, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 5 * ins[0].numel
