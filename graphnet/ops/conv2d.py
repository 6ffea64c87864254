"""2-d convolution and its two gradients. Sources: torch.nn.Conv2d; Dumoulin and Visin 2016."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.errors import ShapeError, UnsupportedOpError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, numel, register
from graphnet.ir.types import DTYPES, Shape, TensorType, f32
from graphnet.ops.elementwise import same_dtype

MATH = ("ieee", "tf32", "bf16")


def pair(value: Any) -> tuple[int, int]:
    """An int or a pair of ints as a pair."""
    out = (value, value) if isinstance(value, int) else tuple(value)
    if len(out) != 2 or not all(isinstance(v, int) for v in out):
        raise ShapeError(f"expected an int or a pair of ints, got {value!r}")
    return out  # type: ignore[return-value]


def four_sided(value: Any) -> tuple[int, int, int, int]:
    """Padding as (top, bottom, left, right), from an int, (height, width) or all four."""
    if isinstance(value, int):
        out = (value,) * 4
    elif len(value) == 2:
        out = (value[0], value[0], value[1], value[1])
    else:
        out = tuple(value)
    if len(out) != 4 or min(out) < 0:
        raise ShapeError(f"padding {value!r} is no non-negative int, pair or four of them")
    return out  # type: ignore[return-value]


def out_size(size: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> int:
    """floor((size + padding - dilation (kernel - 1) - 1) / stride) + 1."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


@dataclass(frozen=True)
class ConvAttrs(Attrs):
    """math: how products are formed; out: dtype of the result, "" for the first operand's."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    math: str = "ieee"
    out: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", pair(self.stride))
        object.__setattr__(self, "dilation", pair(self.dilation))
        object.__setattr__(self, "padding", four_sided(self.padding))
        if min(self.stride) < 1 or min(self.dilation) < 1 or self.groups < 1:
            raise ShapeError(
                f"stride {self.stride}, dilation {self.dilation} and groups {self.groups}"
                " must be positive"
            )
        if self.math not in MATH:
            raise UnsupportedOpError(f"math {self.math!r}", help=f"use one of {MATH}")

    def spatial(self, size: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """Output height and width."""
        t, b, le, r = self.padding
        return (
            out_size(size[0], kernel[0], self.stride[0], self.dilation[0], t, b),
            out_size(size[1], kernel[1], self.stride[1], self.dilation[1], le, r),
        )

    def base(self) -> dict[str, Any]:
        """The fields that forward and backward share."""
        names = ("stride", "padding", "dilation", "groups", "math")
        return {n: getattr(self, n) for n in names}


@dataclass(frozen=True)
class ConvDgradAttrs(ConvAttrs):
    input_size: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "input_size", pair(self.input_size))


@dataclass(frozen=True)
class ConvWgradAttrs(ConvAttrs):
    kernel: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "kernel", pair(self.kernel))


def _check(attrs: ConvAttrs, x: Shape, w: Shape) -> tuple[int, int]:
    """Output size; refuses operands that do not fit."""
    g = attrs.groups
    if len(x) != 4 or len(w) != 4:
        raise ShapeError(f"conv2d takes 4-d operands, got input {list(x)} and weight {list(w)}")
    if x[1] % g or w[0] % g:
        raise ShapeError(
            f"groups={g} must divide both the {x[1]} input channels and the {w[0]} outputs",
            help=f"choose groups that divides {x[1]} and {w[0]}",
        )
    if x[1] != w[1] * g:
        raise ShapeError(
            f"input {list(x)} has {x[1]} channels, weight {list(w)} with groups={g} expects"
            f" {w[1]} * {g} = {w[1] * g}",
            help=f"set in_channels={x[1]}",
        )
    size = attrs.spatial((x[2], x[3]), (w[2], w[3]))
    if min(size) < 1:
        t, b, le, r = attrs.padding
        raise ShapeError(
            f"input {x[2]}x{x[3]} with padding {t}+{b}, {le}+{r} is smaller than the"
            f" {w[2]}x{w[3]} kernel at dilation {attrs.dilation}: output would be"
            f" {size[0]}x{size[1]}",
            help="use a larger image, a smaller kernel or padding",
        )
    return size


def _patches(x: torch.Tensor, attrs: ConvAttrs, kernel: tuple[int, int]) -> torch.Tensor:
    """[N, groups, C/groups, R, S, OH, OW]: every input pixel that each output sees."""
    t, b, le, r = attrs.padding
    n, c, h, w = x.shape
    (kh, kw), (sh, sw), (dh, dw) = kernel, attrs.stride, attrs.dilation
    oh, ow = attrs.spatial((h, w), kernel)
    padded = x.new_zeros(n, c, h + t + b, w + le + r)
    padded[:, :, t : t + h, le : le + w] = x
    out = x.new_empty(n, c, kh, kw, oh, ow)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dh, i * dh + sh * (oh - 1) + 1, sh)
            cols = slice(j * dw, j * dw + sw * (ow - 1) + 1, sw)
            out[:, :, i, j] = padded[:, :, rows, cols]
    return out.reshape(n, attrs.groups, c // attrs.groups, kh, kw, oh, ow)


def row_major(t: torch.Tensor) -> torch.Tensor:
    """The tensor with the strides of a fresh one. `contiguous` leaves those of sizes of 1 as they
    are, by which torch would take [O, 1, R, S] with a stride of 1 in front for channels-last."""
    return t.contiguous().view(-1).view(t.shape)


def _plain(attrs: ConvAttrs, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Operands as torch's convolution can have them: with a dilation row-major, since
    channels-last it may end in a segmentation fault (torch 2.13)."""
    return tensors if attrs.dilation == (1, 1) else tuple(map(row_major, tensors))


def _backward(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, attrs: ConvAttrs, mask: list[bool]
) -> tuple[torch.Tensor, ...]:
    """torch's own convolution gradients; asymmetric padding is padded by hand first."""
    t, b, le, r = attrs.padding
    pad = [t, le]
    dy, x, w = _plain(attrs, dy, x, w)
    if (t, le) != (b, r):
        x, pad = torch.nn.functional.pad(x, (le, r, t, b)), [0, 0]
    return torch.ops.aten.convolution_backward(
        dy, x, w, [w.shape[0]], list(attrs.stride), pad, list(attrs.dilation), False, [0, 0],
        attrs.groups, mask,
    )  # fmt: skip


def _out(attrs: ConvAttrs, first: TensorType, shape: Shape) -> TensorType:
    return TensorType(DTYPES[attrs.out] if attrs.out else first.dtype, shape)


@register
class Conv2d(Op):
    """y[n,k] = b[k] + sum over c, r, s of w[k,c,r,s] x[n,c, h*stride + r*dilation - pad, ...]."""

    name = "conv2d"
    attrs_type = ConvAttrs
    kernel = "conv"

    def infer(self, attrs: ConvAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        x, w = ins[:2]
        same_dtype("conv2d", x, w)
        size = _check(attrs, x.shape, w.shape)
        if len(ins) > 2 and ins[2].shape != (w.shape[0],):
            raise ShapeError(f"bias {ins[2]} does not fit {w.shape[0]} output channels")
        return (_out(attrs, x, (x.shape[0], w.shape[0], *size)),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        if dy is None:
            return (None,) * len(eqn.inputs)
        x, w = eqn.inputs[:2]
        base = eqn.attrs.base()  # type: ignore[attr-defined]
        dx = dw = db = None
        if any(needs[1:]):
            attrs = ConvWgradAttrs(**base, kernel=w.type.shape[2:])  # type: ignore[arg-type]
            unread = [] if len(needs) > 2 and needs[2] else [1]
            dw, db = b.emit("conv2d_wgrad", [x, dy], attrs, unread=unread)
        if needs[0]:
            size = x.type.shape[2:]
            dx = b.one("conv2d_dgrad", dy, w, attrs=ConvDgradAttrs(**base, input_size=size))  # type: ignore[arg-type]
        return (dx, dw if needs[1] else None, db)[: len(eqn.inputs)]

    def reference(self, attrs: ConvAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, w = args[:2]
        g, k = attrs.groups, w.shape[0]
        weight = w.reshape(g, k // g, *w.shape[1:])
        cols = _patches(x, attrs, (w.shape[2], w.shape[3]))
        y = torch.einsum("ngcrshw,gkcrs->ngkhw", cols, weight)
        y = y.reshape(x.shape[0], k, *y.shape[3:])
        return (y + args[2].reshape(1, -1, 1, 1) if len(args) > 2 else y,)

    def cpu(self, attrs: ConvAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, w = _plain(attrs, *args[:2])
        bias = args[2].to(x.dtype) if len(args) > 2 else None
        t, b, le, r = attrs.padding
        pad = (t, le)
        if (t, le) != (b, r):
            x, pad = torch.nn.functional.pad(x, (le, r, t, b)), (0, 0)
        y = torch.conv2d(x, w, bias, attrs.stride, pad, attrs.dilation, attrs.groups)
        return (y.to(DTYPES[attrs.out].torch) if attrs.out else y,)

    def flops(
        self, attrs: ConvAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        n, k, oh, ow = outs[0].shape  # type: ignore[union-attr]
        return 2 * n * k * oh * ow * numel(ins[1].shape[1:])


@register
class Conv2dDgrad(Op):
    """Gradient of conv2d by its input."""

    name = "conv2d_dgrad"
    attrs_type = ConvDgradAttrs
    kernel = "conv"

    def infer(self, attrs: ConvDgradAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        dy, w = ins
        same_dtype("conv2d_dgrad", dy, w)
        x = (dy.shape[0], w.shape[1] * attrs.groups, *attrs.input_size)
        size = _check(attrs, x, w.shape)
        if dy.shape != (x[0], w.shape[0], *size):
            raise ShapeError(f"gradient {dy} does not fit input {list(x)} and weight {w}")
        return (_out(attrs, dy, x),)

    def reference(self, attrs: ConvDgradAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dy, w = args
        g, k = attrs.groups, w.shape[0]
        n, (h, wd) = dy.shape[0], attrs.input_size
        t, b, le, r = attrs.padding
        (sh, sw), (dh, dw) = attrs.stride, attrs.dilation
        oh, ow = dy.shape[2:]
        cols = torch.einsum(
            "ngkhw,gkcrs->ngcrshw",
            dy.reshape(n, g, k // g, oh, ow), w.reshape(g, k // g, *w.shape[1:]),
        )  # fmt: skip
        cols = cols.reshape(n, g * w.shape[1], *w.shape[2:], oh, ow)
        padded = dy.new_zeros(n, g * w.shape[1], h + t + b, wd + le + r)
        for i in range(w.shape[2]):
            for j in range(w.shape[3]):
                rows = slice(i * dh, i * dh + sh * (oh - 1) + 1, sh)
                cols_at = slice(j * dw, j * dw + sw * (ow - 1) + 1, sw)
                padded[:, :, rows, cols_at] += cols[:, :, i, j]
        return (padded[:, :, t : t + h, le : le + wd],)

    def cpu(self, attrs: ConvDgradAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dy, w = args
        x = dy.new_empty(dy.shape[0], w.shape[1] * attrs.groups, *attrs.input_size)
        dx = _backward(dy, x, w, attrs, [True, False, False])[0]
        t, b, le, r = attrs.padding
        if (t, le) != (b, r):
            dx = dx[:, :, t : dx.shape[2] - b, le : dx.shape[3] - r]
        return (dx.to(DTYPES[attrs.out].torch) if attrs.out else dx,)

    def flops(
        self, attrs: ConvDgradAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 2 * ins[0].numel * numel(ins[1].shape[1:])


@register
class Conv2dWgrad(Op):
    """Gradients of conv2d by its weight and its bias; always fp32. Either may be left out."""

    name = "conv2d_wgrad"
    attrs_type = ConvWgradAttrs
    optional = (0, 1)
    kernel = "conv"

    def infer(self, attrs: ConvWgradAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        x, dy = ins
        same_dtype("conv2d_wgrad", x, dy)
        w = (dy.shape[1], x.shape[1] // attrs.groups, *attrs.kernel)
        if dy.shape[2:] != _check(attrs, x.shape, w) or dy.shape[0] != x.shape[0]:
            raise ShapeError(f"gradient {dy} does not fit input {x} and kernel {attrs.kernel}")
        return (TensorType(f32, w), TensorType(f32, (dy.shape[1],)))

    def reference(self, attrs: ConvWgradAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, dy = args
        g, k = attrs.groups, dy.shape[1]
        cols = _patches(x, attrs, attrs.kernel)
        grad = dy.reshape(dy.shape[0], g, k // g, *dy.shape[2:])
        dw = torch.einsum("ngcrshw,ngkhw->gkcrs", cols, grad)
        return (dw.reshape(k, *dw.shape[2:]), dy.sum((0, 2, 3)))

    def cpu(self, attrs: ConvWgradAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, dy = args
        w = x.new_empty(dy.shape[1], x.shape[1] // attrs.groups, *attrs.kernel)
        _, dw, db = _backward(dy, x, w, attrs, [False, True, True])
        return (dw.float(), db.float())

    def flops(
        self, attrs: ConvWgradAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        if outs and outs[0] is None:
            return ins[1].numel
        return 2 * ins[1].numel * ins[0].shape[1] // attrs.groups * numel(attrs.kernel)
