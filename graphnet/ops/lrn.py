"""Local response normalization across channels (Krizhevsky et al. 2012, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from graphnet.errors import ConfigError, DTypeError, ShapeError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import TensorType

MODES = ("mean", "sum")


@dataclass(frozen=True)
class LrnAttrs(Attrs):
    """y_c = x_c s_c^-beta with s_c = k + a sum x_j^2 over j in [c - size//2, c + (size-1)//2].

    a is alpha / size in mode "mean" (torch, Caffe, ONNX) and alpha in mode "sum" (the paper,
    TensorFlow). The window of an even size reaches one channel further down, as torch's does. With
    several `groups` it ends at the borders of c's own group of channels.
    """

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0
    alpha_mode: str = "mean"
    groups: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise ConfigError(f"the size of a normalization window is positive, not {self.size!r}")
        if not isinstance(self.groups, int) or isinstance(self.groups, bool) or self.groups < 1:
            raise ConfigError(f"the groups of a normalization are positive, not {self.groups!r}")
        if self.alpha_mode not in MODES:
            raise ConfigError(
                f"unknown alpha_mode {self.alpha_mode!r}",
                help='"mean" divides alpha by the size (torch), "sum" does not (the paper)',
            )
        for name in ("alpha", "beta", "k"):
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def below(self) -> int:
        """Channels of the window below its centre."""
        return self.size // 2

    @property
    def above(self) -> int:
        return (self.size - 1) // 2

    @property
    def scale(self) -> float:
        """What the sum of squares is multiplied by."""
        return self.alpha / self.size if self.alpha_mode == "mean" else self.alpha


def _check(name: str, groups: int, *types: TensorType) -> TensorType:
    x = types[0]
    if len(x.shape) != 4:
        raise ShapeError(f"{name} takes a 4-d input, got {x}")
    if x.shape[1] % groups:
        raise ShapeError(
            f"{name}: {x.shape[1]} channels have no {groups} equal groups",
            help="groups divides the number of channels",
        )
    for t in types:
        if t.shape != x.shape:
            raise ShapeError(f"{name}: input {x} and gradient {t} differ in shape")
        if not t.dtype.is_float:
            raise DTypeError(f"{name} takes a floating-point operand, got {t}")
    return types[-1].with_shape(x.shape)


def _window_sum(v: torch.Tensor, below: int, above: int, groups: int) -> torch.Tensor:
    """Per channel the sum over those of channels c - below to c + above that its group has."""
    channels = v.shape[1]
    own, rows = channels // groups, []
    for k in range(channels):
        first = k - k % own
        rows.append(v[:, max(first, k - below) : min(first + own, k + above + 1)].sum(1))
    return torch.stack(rows, 1)


@lru_cache(maxsize=32)
def _band(
    channels: int, below: int, above: int, groups: int, dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    """[C, C] ones where column j is in the window of row i."""
    i = torch.arange(channels)
    distance = i[None, :] - i[:, None]
    group = i // (channels // groups)
    near = (distance >= -below) & (distance <= above) & (group[None, :] == group[:, None])
    return near.to(dtype)


def _banded_sum(v: torch.Tensor, below: int, above: int, groups: int) -> torch.Tensor:
    """`_window_sum` as a product: three times as fast as shifted adds on CPUs.

    A NaN or infinity reaches all channels of its pixel, not only those of its window.
    """
    n, c, h, w = v.shape
    dtype = v.dtype if v.dtype == torch.float64 else torch.float32
    band = _band(c, below, above, groups, dtype)
    if v.is_contiguous(memory_format=torch.channels_last):
        flat = v.permute(0, 2, 3, 1).reshape(-1, c).to(dtype)
        return (flat @ band.T).view(n, h, w, c).permute(0, 3, 1, 2)
    return torch.matmul(band, v.reshape(n, c, h * w).to(dtype)).view(n, c, h, w)


def _power(s: torch.Tensor, beta: float) -> torch.Tensor:
    """s^-beta; the common 0.75 by square roots, much cheaper than pow."""
    if beta == 0.75:
        root = s.rsqrt()
        return root.mul_(root.sqrt())
    return s.pow(-beta)


@register
class Lrn(Op):
    """y = x s^-beta: see `LrnAttrs`. The scale s is recomputed by the gradient, never stored."""

    name = "lrn"
    attrs_type = LrnAttrs
    kernel = "lrn"

    def infer(self, attrs: LrnAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        return (_check(self.name, attrs.groups, *ins),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        if dy is None or not needs[0]:
            return (None,)
        return (b.one("lrn_grad", eqn.inputs[0], dy, attrs=eqn.attrs),)

    def reference(self, attrs: LrnAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (x,) = args
        s = attrs.k + attrs.scale * _window_sum(x * x, attrs.below, attrs.above, attrs.groups)
        return (x * s**-attrs.beta,)

    def cpu(self, attrs: LrnAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (x,) = args
        s = _banded_sum(x * x, attrs.below, attrs.above, attrs.groups).mul_(attrs.scale)
        s.add_(attrs.k)
        return (_power(s, attrs.beta).mul_(x).to(x.dtype),)

    def flops(
        self, attrs: LrnAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        # A square and the adds of the window; scale, offset, power, product.
        return ins[0].numel * (attrs.size + 4)


@register
class LrnGrad(Op):
    """dx_c = dy_c s_c^-beta - 2 a beta x_c sum_j dy_j x_j s_j^(-beta - 1).

    The sum runs over the j whose window holds c, from c - (size-1)//2 to c + size//2; x_j s_j^-beta
    is y_j, so x and dy suffice.
    """

    name = "lrn_grad"
    attrs_type = LrnAttrs
    kernel = "lrn"

    def infer(self, attrs: LrnAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        return (_check(self.name, attrs.groups, *ins),)

    def reference(self, attrs: LrnAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, dy = args
        s = attrs.k + attrs.scale * _window_sum(x * x, attrs.below, attrs.above, attrs.groups)
        t = dy * x * s ** (-attrs.beta - 1)
        held = _window_sum(t, attrs.above, attrs.below, attrs.groups)
        return (dy * s**-attrs.beta - 2 * attrs.scale * attrs.beta * x * held,)

    def cpu(self, attrs: LrnAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, dy = args
        s = _banded_sum(x * x, attrs.below, attrs.above, attrs.groups).mul_(attrs.scale)
        s.add_(attrs.k)
        direct = _power(s, attrs.beta).mul_(dy)
        held = _banded_sum((direct * x).div_(s), attrs.above, attrs.below, attrs.groups)
        return (direct.addcmul_(held, x, value=-2 * attrs.scale * attrs.beta).to(dy.dtype),)

    def flops(
        self, attrs: LrnAttrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return ins[0].numel * (2 * attrs.size + 10)
