"""Batch normalization (Ioffe and Szegedy 2015), with torch's conventions.

batch_norm       by the statistics of the live rows, and the new running statistics
batch_norm_grad  its gradients
normalize        by given statistics: in inference, and in training where they are frozen
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from graphnet.errors import ShapeError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, get_op, register
from graphnet.ir.types import TensorType, f32, i32, i64
from graphnet.ops import norm_rows
from graphnet.ops.elementwise import floating

Tensors = tuple[torch.Tensor, ...]


def image_of(op: str, x: TensorType) -> int:
    """The channels of [N, C] or [N, C, H, W]."""
    floating(op, x)
    if len(x.shape) not in (2, 4):
        raise ShapeError(f"{op} takes [N, C] or [N, C, H, W], got {x}")
    return x.shape[1]


def vectors_of(op: str, channels: int, given: Sequence[TensorType]) -> None:
    for t in given:
        if t.shape != (channels,):
            raise ShapeError(f"{op}: {t} is not one value for each of {channels} channels")


def live_rows(op: str, t: TensorType) -> None:
    if t.shape != () or t.dtype != i32:
        raise ShapeError(f"{op} takes the number of live rows as i32[], got {t}")


def axes(x: torch.Tensor) -> list[int]:
    return [d for d in range(x.ndim) if d != 1]


def over(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A vector over the channels of x, to compute with it."""
    return v.reshape(1, -1, *[1] * (x.ndim - 2))


@dataclass(frozen=True)
class BatchNormAttrs(Attrs):
    """affine: weight and bias are operands; track: running mean, running variance and the number
    of batches are; momentum: the share of the new statistics in the running ones, or with
    `cumulative` one over the number of batches."""

    eps: float = 1e-5
    affine: bool = True
    track: bool = True
    momentum: float = 0.1
    cumulative: bool = False


@register
class BatchNorm(Op):
    """y = (x - mean) / sqrt(var + eps) weight + bias, mean and var over the live rows and pixels.

    Operands: x, live, [weight, bias], [running mean, running variance, batches]. Results: y, mean,
    var (biased, as it normalises), and the new running mean, running variance (unbiased) and
    number of batches. Statistics are fp32; y is as x.
    """

    name = "batch_norm"
    attrs_type = BatchNormAttrs
    optional = (3, 4, 5)
    low = (0,)
    over_batch = 1
    kernel = "batch_norm"

    def infer(self, attrs: BatchNormAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        x, live, *rest = ins
        channels = image_of(self.name, x)
        live_rows(self.name, live)
        if len(rest) != 2 * attrs.affine + 3 * attrs.track:
            raise ShapeError(f"{self.name}: {len(ins)} operands do not fit {attrs}")
        vectors_of(self.name, channels, rest[: 2 * attrs.affine + 2 * attrs.track])
        if attrs.track and (rest[-1].shape, rest[-1].dtype) != ((), i64):
            raise ShapeError(f"{self.name} counts batches as i64[], got {rest[-1]}")
        if prod(x.shape) == channels:
            raise ShapeError(
                f"{self.name}: more than one value for each channel is needed, {x} has one",
                help="a larger batch, or bn.frozen = True",
            )
        vector = TensorType(f32, (channels,))
        more = (vector, vector, TensorType(i64, ())) if attrs.track else ()
        return (x.with_shape(x.shape), vector, vector, *more)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        dy, a = cotangents[0], eqn.attrs
        assert isinstance(a, BatchNormAttrs)
        nothing: list[Value | None] = [None] * len(eqn.inputs)
        wanted = (needs[0], *needs[2:4]) if a.affine else (needs[0], False, False)
        if dy is None or not any(wanted):
            return nothing
        x, live, *rest = eqn.inputs
        operands = [dy, x, *eqn.outputs[1:3], live, *rest[: int(a.affine)]]
        outs = b.emit(
            "batch_norm_grad", operands, BatchNormGradAttrs(a.eps, a.affine),  # type: ignore[arg-type]
            unread=[k for k in range(3) if not wanted[k]],
        )  # fmt: skip
        nothing[0] = outs[0]
        if a.affine:
            nothing[2:4] = outs[1:]
        return nothing

    def reference(self, attrs: BatchNormAttrs, *args: torch.Tensor) -> Tensors:
        x, live, *rest = args
        scale, shift, running = _parted(attrs, rest)
        count, mean, squares = moments(x[: int(live)])
        var = squares / max(count, 1)
        y = (x - over(mean, x)) / torch.sqrt(over(var, x) + attrs.eps)
        if scale is not None and shift is not None:
            y = y * over(scale, x) + over(shift, x)
        return (y, mean, var, *moved(attrs, count, mean, var, running))

    def cpu(self, attrs: BatchNormAttrs, *args: torch.Tensor) -> Tensors:
        x, live, *rest = args
        scale, shift, running = _parted(attrs, rest)
        rows = x[: int(live)]
        count = rows.numel() // x.shape[1]
        if count and norm_rows.lies_in_rows(x):
            mean, var = norm_rows.statistics(rows)
            factor, bias = _line(mean, var, scale, shift, attrs.eps)
            y = norm_rows.multiplied(x, factor, bias)  # dead rows too
            return (y, mean, var, *moved(attrs, count, mean, var, running))
        kind = torch.promote_types(x.dtype, torch.float32)
        mean, var = torch.zeros(2, x.shape[1], dtype=kind)
        y = rows
        if count:  # a momentum of 1 hands out the variance itself, the unbiased one
            y, _, _ = torch.native_batch_norm(rows, scale, shift, mean, var, True, 1.0, attrs.eps)
            var *= (count - 1) / count
        if len(rows) < len(x):
            dead = normalised(x[int(live) :], mean, var, scale, shift, attrs.eps)
            y = torch.cat((y, dead))
        return (y, mean, var, *moved(attrs, count, mean, var, running))

    def flops(
        self, attrs: Any, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 7 * ins[0].numel


def _parted(a: BatchNormAttrs, rest: Sequence[torch.Tensor]) -> tuple[Any, Any, Tensors]:
    """(weight, bias, what runs) of the operands behind x and live."""
    if a.affine:
        return rest[0], rest[1], tuple(rest[2:])
    return None, None, tuple(rest)


def moments(rows: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(number, mean, sum of squares about it) of each channel; zeros where there are no rows."""
    if not len(rows):
        zeros = rows.new_zeros(rows.shape[1])
        return 0, zeros, zeros.clone()
    mean = rows.mean(axes(rows))
    return rows.numel() // rows.shape[1], mean, ((rows - over(mean, rows)) ** 2).sum(axes(rows))


def moved(
    a: Any, count: float, mean: torch.Tensor, var: torch.Tensor, running: Sequence[torch.Tensor]
) -> Tensors:
    """The new running statistics, where they are tracked; a batch without rows leaves them."""
    if not a.track:
        return ()
    if not count:
        return tuple(t.clone() for t in running)
    old_mean, old_var, batches = running
    share = 1.0 / (float(batches) + 1) if a.cumulative else a.momentum
    unbiased = var * (count / max(count - 1, 1))
    return (
        old_mean + share * (mean - old_mean), old_var + share * (unbiased - old_var), batches + 1
    )  # fmt: skip


def _line(
    mean: torch.Tensor, var: torch.Tensor, scale: Any, shift: Any, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor, bias): y is x factor + bias."""
    factor = (var + eps).rsqrt_()
    factor = factor if scale is None else factor.mul_(scale)
    return factor, -mean * factor if shift is None else torch.addcmul(shift, mean, factor, value=-1)


def normalised(
    x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, scale: Any, shift: Any, eps: float
) -> torch.Tensor:
    return torch.nn.functional.batch_norm(x, mean, var, scale, shift, False, 0.0, eps)


@dataclass(frozen=True)
class BatchNormGradAttrs(Attrs):
    eps: float = 1e-5
    affine: bool = True


@register
class BatchNormGrad(Op):
    """dx, dweight, dbias from dy, x, mean, var, live, [weight].

    With g = dy over the live rows, M the number of their values in a channel, and
    xhat = (x - mean) rstd: dbias = sum g, dweight = sum g xhat, and
    dx = weight rstd (g - dbias / M - xhat dweight / M), which is a g + b x + c for each channel.
    Rows that are not live get zeros: what the statistics cost there must reach no weight gradient.
    """

    name = "batch_norm_grad"
    attrs_type = BatchNormGradAttrs
    optional = (0, 1, 2)
    low = (0, 1)
    over_batch = 4
    kernel = "batch_norm"

    def infer(self, attrs: BatchNormGradAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        dy, x, mean, var, live, *rest = ins
        channels = image_of(self.name, x)
        if dy.shape != x.shape or len(rest) != int(attrs.affine):
            raise ShapeError(f"{self.name}: {', '.join(map(str, ins))} do not fit")
        vectors_of(self.name, channels, (mean, var, *rest))
        live_rows(self.name, live)
        vector = TensorType(f32, (channels,))
        return (dy.with_shape(dy.shape), vector, vector)

    def reference(self, attrs: BatchNormGradAttrs, *args: torch.Tensor) -> Tensors:
        dy, x, mean, var, live, *rest = args
        rows = int(live)
        count = max(x[:rows].numel() // x.shape[1], 1)
        g = dy.clone()
        g[rows:] = 0
        rstd = 1 / torch.sqrt(over(var, x) + attrs.eps)
        xhat = (x - over(mean, x)) * rstd
        dbias, dweight = g.sum(axes(x)), (g * xhat).sum(axes(x))
        dx = rstd * (g - over(dbias, x) / count - xhat * over(dweight, x) / count)
        dx[rows:] = 0
        return (dx * over(rest[0], x) if rest else dx, dweight, dbias)

    def cpu(self, attrs: BatchNormGradAttrs, *args: torch.Tensor) -> Tensors:
        dy, x, mean, var, live, *rest = args
        rows, scale = int(live), rest[0] if rest else None
        if not rows:
            return (torch.zeros_like(dy), torch.zeros_like(mean), torch.zeros_like(mean))
        if norm_rows.lies_in_rows(x):
            return _by_rows(attrs, *args)
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy[:rows], x[:rows], torch.ones_like(mean) if scale is None else scale, None, None,
            mean, torch.rsqrt(var + attrs.eps), True, attrs.eps, [True, True, True],
        )  # fmt: skip
        if rows < len(x):
            dx = torch.cat((dx, dx.new_zeros(len(x) - rows, *x.shape[1:])))
        return (dx, dweight, dbias)

    def flops(
        self, attrs: Any, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 9 * ins[0].numel


def _by_rows(attrs: BatchNormGradAttrs, *args: torch.Tensor) -> Tensors:
    """The gradients where x lies in rows and some rows live: dx is dy a + x b + c."""
    dy, x, mean, var, live, *rest = args
    rows, scale = int(live), rest[0] if rest else None
    if dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    rstd = (var + attrs.eps).rsqrt_()
    g, image = dy[:rows], x[:rows]
    dweight, dbias = norm_rows.sums(g, image, mean, rstd)
    count = image.numel() // x.shape[1]
    a = rstd if scale is None else rstd * scale
    part = a * (-1 / count)
    b = part * rstd * dweight
    c = torch.addcmul(part * dbias, b, mean, value=-1)
    dx = norm_rows.multiplied(image, b, c, g, a)
    if rows < len(x):
        dead = dx.new_zeros(len(x) - rows, *x.shape[1:])
        dx = torch.cat((dx, dead))
    return (dx, dweight, dbias)


@dataclass(frozen=True)
class NormalizeAttrs(Attrs):
    """centred: the mean is an operand and taken off; affine: weight is an operand and, with
    `centred`, bias."""

    eps: float = 1e-5
    affine: bool = True
    centred: bool = True


@register
class Normalize(Op):
    """y = (x - mean) / sqrt(var + eps) weight + bias, from x and vectors over the channels: [mean],
    var, [weight, [bias]]. It is elementwise, so it joins the convolution before it."""

    name = "normalize"
    attrs_type = NormalizeAttrs
    elementwise = joins = True
    low = (0,)
    over_channels = (1, 2, 3, 4)
    kernel = "elementwise"

    def infer(self, attrs: NormalizeAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        x, *vectors = ins
        channels = image_of(self.name, x)
        if len(vectors) != (1 + attrs.centred) * (1 + attrs.affine):
            raise ShapeError(f"{self.name}: {len(ins)} operands do not fit {attrs}")
        vectors_of(self.name, channels, vectors)
        return (x.with_shape(x.shape),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        dy, a = cotangents[0], eqn.attrs
        assert isinstance(a, NormalizeAttrs)
        nothing: list[Value | None] = [None] * len(eqn.inputs)
        if dy is None:
            return nothing
        if not a.centred or any(needs[1:3]):
            raise ShapeError("normalize has gradients of its image, weight and bias alone")
        x, mean, var, *rest = eqn.inputs
        channels = x.type.shape[1]

        def summed(g: Value) -> Value:
            shape = (channels, *[1] * (len(x.type.shape) - 2))
            total = b.one("sum_to", g, attrs=get_op("sum_to").attrs_type(shape=shape))  # type: ignore[call-arg]
            return b.one("reshape", total, attrs=get_op("reshape").attrs_type(shape=(channels,)))  # type: ignore[call-arg]

        if needs[0]:
            alone = NormalizeAttrs(a.eps, a.affine, centred=False)
            nothing[0] = b.one("normalize", dy, var, *rest[:1], attrs=alone)
        if a.affine and needs[3]:
            xhat = b.one("normalize", x, mean, var, attrs=NormalizeAttrs(a.eps, affine=False))
            nothing[3] = summed(b.one("mul", dy, xhat))
        if a.affine and needs[4]:
            nothing[4] = summed(dy)
        return nothing

    def reference(self, attrs: NormalizeAttrs, *args: torch.Tensor) -> Tensors:
        x, *vectors = (args[0], *(over(v, args[0]) for v in args[1:]))
        if attrs.centred:
            x, vectors = x - vectors[0], vectors[1:]
        y = x / torch.sqrt(vectors[0] + attrs.eps)
        y = y * vectors[1] if attrs.affine else y
        return (y + vectors[2] if attrs.affine and attrs.centred else y,)

    def cpu(self, attrs: NormalizeAttrs, *args: torch.Tensor) -> Tensors:
        x, *vectors = args
        mean, var, *rest = vectors if attrs.centred else (torch.zeros_like(args[1]), *vectors)
        scale, shift = (*rest, None, None)[:2]
        return (normalised(x, mean, var, scale, shift, attrs.eps),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        x, *vectors = expr
        if attrs.centred:
            x, vectors = f"({x} - {vectors[0]})", vectors[1:]
        scale = f"(1.0 / tl.sqrt_rn({vectors[0]} + {attrs.eps!r}))"
        if attrs.affine:
            scale = f"({scale} * {vectors[1]})"
        shift = f" + {vectors[2]}" if attrs.affine and attrs.centred else ""
        return [f"({x} * {scale}{shift})"]
