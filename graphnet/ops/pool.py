"""Max, average and adaptive average pooling, with gathering gradients. Semantics are torch's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from graphnet.errors import ShapeError, UnsupportedOpError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import Shape, TensorType, u8
from graphnet.ops.conv2d import four_sided, pair


@dataclass(frozen=True)
class PoolAttrs(Attrs):
    """The window. `stride` (0, 0) means the kernel's size; sides beyond the input hold -inf for
    the maximum and 0 for the mean."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (0, 0)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", pair(self.kernel))
        stride = pair(self.stride)
        object.__setattr__(self, "stride", self.kernel if stride == (0, 0) else stride)
        object.__setattr__(self, "padding", four_sided(self.padding))
        object.__setattr__(self, "dilation", pair(self.dilation))
        t, b, le, r = self.padding
        if min(*self.kernel, *self.stride, *self.dilation) < 1:
            raise ShapeError(f"kernel {self.kernel}, stride {self.stride} must be positive")
        # Up to half of the window is torch's limit, up to all but its last element ONNX's.
        reach = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
        if min(self.padding) < 0 or max(t, b) > reach[0] or max(le, r) > reach[1]:
            raise ShapeError(
                f"padding {self.padding} is no part of the window {self.kernel}: some windows "
                "would lie beside the image"
            )

    def spatial(self, size: tuple[int, int]) -> tuple[int, int]:
        """Output height and width: floor, or ceil where no window starts in the padding."""
        t, b, le, r = self.padding
        out = []
        for k, before, after in ((0, t, b), (1, le, r)):
            span = size[k] + before + after - self.dilation[k] * (self.kernel[k] - 1) - 1
            n = (-(-span // self.stride[k]) if self.ceil_mode else span // self.stride[k]) + 1
            if self.ceil_mode and (n - 1) * self.stride[k] >= size[k] + before:
                n -= 1
            out.append(n)
        return out[0], out[1]

    @property
    def torchs(self) -> bool:
        """Whether torch has such padding: alike on both sides, at most half of the window."""
        t, b, le, r = self.padding
        return (t, le) == (b, r) and 2 * t <= self.kernel[0] and 2 * le <= self.kernel[1]

    def base(self) -> dict[str, Any]:
        names = ("kernel", "stride", "padding", "dilation", "ceil_mode")
        return {n: getattr(self, n) for n in names}


@dataclass(frozen=True)
class PoolGradAttrs(PoolAttrs):
    input_size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class AvgPoolAttrs(PoolAttrs):
    """divisor_override 0 means the window's size, with the padding counted or not."""

    count_include_pad: bool = True
    divisor_override: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dilation != (1, 1):
            raise UnsupportedOpError(f"an average pool has no dilation, not {self.dilation}")

    @property
    def picks(self) -> bool:
        """Whether it does no more than take every pixel that a stride meets (a view, for torch)."""
        return self.kernel == (1, 1) and self.divisor_override in (0, 1)


@dataclass(frozen=True)
class AvgPoolGradAttrs(AvgPoolAttrs):
    input_size: tuple[int, int] = (0, 0)


def _pooled(attrs: PoolAttrs, x: Shape) -> Shape:
    if len(x) != 4:
        raise ShapeError(f"pooling takes a 4-d input, got {list(x)}")
    size = attrs.spatial((x[2], x[3]))
    if min(size) < 1:
        raise ShapeError(
            f"input {x[2]}x{x[3]} is smaller than the {attrs.kernel[0]}x{attrs.kernel[1]} window:"
            f" output would be {size[0]}x{size[1]}",
            help="use a larger image, a smaller window or ceil_mode=True",
        )
    return (x[0], x[1], *size)


def _windows(
    x: torch.Tensor, attrs: PoolAttrs, fill: float
) -> tuple[torch.Tensor, list[tuple[slice, slice]], tuple[int, int, int, int]]:
    """[KH*KW, N, C, OH, OW] window elements, where each lies in the padded image, its sizes."""
    t, b, le, r = attrs.padding
    n, c, h, w = x.shape
    oh, ow = attrs.spatial((h, w))
    (kh, kw), (sh, sw), (dh, dw) = attrs.kernel, attrs.stride, attrs.dilation
    # ceil_mode windows may reach beyond the padding.
    ph = max(h + t + b, (oh - 1) * sh + dh * (kh - 1) + 1)
    pw = max(w + le + r, (ow - 1) * sw + dw * (kw - 1) + 1)
    padded = x.new_full((n, c, ph, pw), fill)
    padded[:, :, t : t + h, le : le + w] = x
    places = [
        (
            slice(i * dh, i * dh + sh * (oh - 1) + 1, sh),
            slice(j * dw, j * dw + sw * (ow - 1) + 1, sw),
        )
        for i in range(kh)
        for j in range(kw)
    ]
    stack = torch.stack([padded[:, :, a, b_] for a, b_ in places])
    return stack, places, (t, le, ph, pw)


def _spread(dy: torch.Tensor, attrs: PoolAttrs, size: tuple[int, int], share: Any) -> torch.Tensor:
    """dx with `share(k) * dy` added at the k-th element of each window."""
    n, c = dy.shape[:2]
    _, places, (t, le, ph, pw) = _windows(dy.new_zeros(n, c, *size), attrs, 0.0)
    padded = dy.new_zeros(n, c, ph, pw)
    for k, (a, b) in enumerate(places):
        padded[:, :, a, b] += dy * share(k)
    return padded[:, :, t : t + size[0], le : le + size[1]]


def _origins(attrs: PoolAttrs, oh: int, ow: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[OH, 1] and [1, OW]: image row and column where each window starts (negative in padding)."""
    rows = torch.arange(oh)[:, None] * attrs.stride[0] - attrs.padding[0]
    cols = torch.arange(ow)[None, :] * attrs.stride[1] - attrs.padding[2]
    return rows, cols


def in_window(flat: torch.Tensor, attrs: PoolAttrs, width: int) -> torch.Tensor:
    """torch's index into the image (row * width + column) as the position in the window, u8."""
    rows, cols = _origins(attrs, *flat.shape[2:])
    i = (flat // width - rows) // attrs.dilation[0]
    j = (flat % width - cols) // attrs.dilation[1]
    return (i * attrs.kernel[1] + j).to(torch.uint8)


def in_image(idx: torch.Tensor, attrs: PoolAttrs, width: int) -> torch.Tensor:
    """The inverse of `in_window`: int64 indices into the image."""
    rows, cols = _origins(attrs, *idx.shape[2:])
    at = idx.long()
    i = rows + at // attrs.kernel[1] * attrs.dilation[0]
    j = cols + at % attrs.kernel[1] * attrs.dilation[1]
    return i * width + j


class PoolGrad(Op):
    """Base of the gradients: `attrs.input_size` is the height and width of the result."""

    def infer(self, attrs: Any, *ins: TensorType) -> tuple[TensorType, ...]:
        dy = ins[0]
        x = (*dy.shape[:2], *attrs.input_size)
        if hasattr(attrs, "spatial") and _pooled(attrs, x) != dy.shape:
            raise ShapeError(f"gradient {dy} does not fit the pooled input {list(x)}")
        if len(ins) > 1 and ins[1].shape != dy.shape:
            raise ShapeError(f"index {ins[1]} does not fit the gradient {dy}")
        return (dy.with_shape(x),)


def like_gradient(dy: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """An empty input for a gradient, with channels innermost where they are in the gradient: other
    elementwise ops would have to walk the two in different orders."""
    innermost = dy.ndim == 4 and dy.stride(1) == 1 and dy.shape[1] > 1
    form = torch.channels_last if innermost else torch.contiguous_format
    shape = (*dy.shape[:2], *size)
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=form)


@register
class MaxPool2d(Op):
    """Maximum per window and, optionally, the row-major position of its first maximum (u8)."""

    name = "maxpool2d"
    attrs_type = PoolAttrs
    optional = (1,)
    kernel = "pool"

    def infer(self, attrs: PoolAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        if attrs.kernel[0] * attrs.kernel[1] > 256:
            raise ShapeError(
                f"window {attrs.kernel} has more than 256 elements, its index does not fit a byte"
            )
        shape = _pooled(attrs, ins[0].shape)
        return (ins[0].with_shape(shape), TensorType(u8, shape))

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        dy, idx = cotangents[0], eqn.outputs[1]
        if dy is None or idx is None or not needs[0]:
            return (None,)
        h, w = eqn.inputs[0].type.shape[2:]
        attrs = PoolGradAttrs(**eqn.attrs.base(), input_size=(h, w))  # type: ignore[attr-defined]
        return (b.one("maxpool2d_grad", dy, idx, attrs=attrs),)

    def reference(self, attrs: PoolAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (x,) = args
        stack, _, _ = _windows(x, attrs, float("-inf"))
        real, _, _ = _windows(torch.ones_like(x), attrs, 0.0)
        best, idx = torch.full_like(stack[0], float("-inf")), torch.zeros_like(stack[0]).byte()
        unset = torch.ones_like(idx, dtype=torch.bool)
        for k in range(len(stack)):
            inside = real[k] > 0
            # The first element of the image starts it, even at -inf. A NaN is taken when it
            # comes, as torch does, and then stays unless another comes.
            better = inside & (unset | (stack[k] > best) | torch.isnan(stack[k]))
            unset &= ~inside
            best = torch.where(better, stack[k], best)
            idx = torch.where(better, torch.full_like(idx, k), idx)
        return (best, idx)

    def cpu(self, attrs: PoolAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (x,) = args
        t, _, le, _ = attrs.padding
        if not attrs.torchs:
            return self.reference(attrs, x)
        y, flat = torch.ops.aten.max_pool2d_with_indices(
            x, attrs.kernel, attrs.stride, (t, le), attrs.dilation, attrs.ceil_mode
        )
        return (y, in_window(flat, attrs, x.shape[3]))

    def flops(
        self, attrs: PoolAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return outs[0].numel * attrs.kernel[0] * attrs.kernel[1]  # type: ignore[union-attr]


@register
class MaxPool2dGrad(PoolGrad):
    """dx: each dy goes to the position that its window's index names."""

    name = "maxpool2d_grad"
    attrs_type = PoolGradAttrs
    kernel = "pool"

    def reference(self, attrs: PoolGradAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dy, idx = args
        return (_spread(dy, attrs, attrs.input_size, lambda k: (idx == k).to(dy.dtype)),)

    def cpu(self, attrs: PoolGradAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dy, idx = args
        t, _, le, _ = attrs.padding
        if not attrs.torchs:
            return self.reference(attrs, *args)
        x = dy.new_empty(*dy.shape[:2], *attrs.input_size)
        flat = in_image(idx, attrs, attrs.input_size[1])
        return (
            torch.ops.aten.max_pool2d_with_indices_backward(
                dy, x, attrs.kernel, attrs.stride, (t, le), attrs.dilation, attrs.ceil_mode, flat
            ),
        )


def _divisors(attrs: AvgPoolAttrs, size: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """[OH, OW] what each window's sum is divided by."""
    t, b, le, r = attrs.padding
    oh, ow = attrs.spatial(size)
    out = like.new_empty(oh, ow)
    for i in range(oh):
        for j in range(ow):
            y0, x0 = i * attrs.stride[0] - t, j * attrs.stride[1] - le
            y1 = min(y0 + attrs.kernel[0], size[0] + b)
            x1 = min(x0 + attrs.kernel[1], size[1] + r)
            whole = (y1 - y0) * (x1 - x0)
            inside = (min(y1, size[0]) - max(y0, 0)) * (min(x1, size[1]) - max(x0, 0))
            count = whole if attrs.count_include_pad else inside
            out[i, j] = attrs.divisor_override or count
    return out


@register
class AvgPool2d(Op):
    """Mean per window."""

    name = "avgpool2d"
    attrs_type = AvgPoolAttrs
    kernel = "pool"

    def infer(self, attrs: AvgPoolAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        return (ins[0].with_shape(_pooled(attrs, ins[0].shape)),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        if dy is None or not needs[0]:
            return (None,)
        a, size = eqn.attrs, eqn.inputs[0].type.shape[2:]
        attrs = AvgPoolGradAttrs(
            **a.base(),  # type: ignore[attr-defined]
            count_include_pad=a.count_include_pad,  # type: ignore[attr-defined]
            divisor_override=a.divisor_override,  # type: ignore[attr-defined]
            input_size=size,  # type: ignore[arg-type]
        )
        return (b.one("avgpool2d_grad", dy, attrs=attrs),)

    def reference(self, attrs: AvgPoolAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (x,) = args
        stack, _, _ = _windows(x, attrs, 0.0)
        return (stack.sum(0) / _divisors(attrs, (x.shape[2], x.shape[3]), x),)

    def cpu(self, attrs: AvgPoolAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        t, _, le, _ = attrs.padding
        if not attrs.torchs:
            return self.reference(attrs, *args)
        if attrs.picks:
            return (args[0][:, :, :: attrs.stride[0], :: attrs.stride[1]].clone(),)
        return (
            F.avg_pool2d(
                args[0], attrs.kernel, attrs.stride, (t, le), attrs.ceil_mode,
                attrs.count_include_pad, attrs.divisor_override or None,
            ),
        )  # fmt: skip

    def flops(
        self, attrs: AvgPoolAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return outs[0].numel * attrs.kernel[0] * attrs.kernel[1]  # type: ignore[union-attr]


@register
class AvgPool2dGrad(PoolGrad):
    """dx: each dy, divided as the mean was, goes to every element of its window."""

    name = "avgpool2d_grad"
    attrs_type = AvgPoolGradAttrs
    kernel = "pool"

    def reference(self, attrs: AvgPoolGradAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (dy,) = args
        share = dy / _divisors(attrs, attrs.input_size, dy)
        return (_spread(share, attrs, attrs.input_size, lambda k: 1.0),)

    def cpu(self, attrs: AvgPoolGradAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (dy,) = args
        t, _, le, _ = attrs.padding
        if not attrs.torchs:
            return self.reference(attrs, dy)
        x = like_gradient(dy, attrs.input_size)
        if attrs.picks:
            x.zero_()[:, :, :: attrs.stride[0], :: attrs.stride[1]] = dy
            return (x,)
        return (
            torch.ops.aten.avg_pool2d_backward(
                dy, x, list(attrs.kernel), list(attrs.stride), [t, le], attrs.ceil_mode,
                attrs.count_include_pad, attrs.divisor_override or None,
            ),
        )  # fmt: skip
