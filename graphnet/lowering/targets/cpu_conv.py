"""Convolutions and max-pools of the cpu target: layouts, and the fusions that oneDNN leaves.

Measured on two cores, fp32, batch 128, and the reason for each rule here:
- A convolution is fastest channels-last. Its relu runs behind it, in place, or behind its pool: the
  primitive's own relu turns NaN into 0, and hides a net that has diverged.
- The input gradient of a convolution with few input channels is faster row-major (LeNet-5 conv2:
  0.56 against 0.85 ms) although its weight gradient is not, so the two are split there.
- With a dilation everything is row-major: channels-last, torch 2.13's convolution ends in a
  segmentation fault where a width of 1 meets stride, padding and dilation (found by random nets).
- A first layer with one to four input channels cannot fill vectors. `PhaseConv` gives it k*k times
  the output channels at a k*k coarser stride, so that each pixel of a pooling window is a channel
  group of its own: the product gets faster (0.53 to 0.37 ms), and the pool becomes a maximum over
  contiguous rows (0.68 to 0.04 ms).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.targets.cpu_fold import Folded
from graphnet.lowering.targets.cpu_task import Call, Env, Slot, Task, only_f32, symmetric
from graphnet.ops.conv2d import ConvAttrs, row_major
from graphnet.ops.pool import PoolAttrs

_FEW = 16  # input channels below which dgrad runs row-major
_THIN = 4  # input channels up to which a convolution is split into the phases of its pool
Form = Callable[[torch.Tensor], torch.Tensor]
_aten: Any = torch.ops.aten
_pointwise: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)


def channels_last(t: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] with channels innermost; the tensor itself where it already lies so."""
    return t.contiguous(memory_format=torch.channels_last)


def form_of(attrs: Any) -> Form:
    """The layout that a convolution's operands get."""
    return channels_last if attrs.dilation == (1, 1) else row_major


def relay(v: Value, to: Value, form: Form) -> Task:
    """`to` is `v` in another form, made once for all its readers."""

    def make(slot: Slot) -> Call:
        i, o = slot(v), slot(to)

        def call(env: Env) -> None:
            env[o] = form(env[i])

        return call

    return Task((v,), (to,), make)


def conv(eqn: Eqn, relu: Eqn | None, x: Value, folded: Folded | None = None) -> Task:
    """Convolution of `x`, the laid-out twin of its operand, with the normalization and the relu
    behind it."""
    attrs: ConvAttrs = eqn.attrs  # type: ignore[assignment]
    form = form_of(attrs)
    pad = [attrs.padding[0], attrs.padding[2]]
    stride, dilation, groups = list(attrs.stride), list(attrs.dilation), attrs.groups
    eqns = (eqn, *([folded.norm] if folded else []), *([relu] if relu else []))
    out = eqns[-1].out
    dtype = out.type.dtype.torch
    reads = (x, *eqn.inputs[1:], *(folded.norm.inputs[1:] if folded else ()))

    def make(slot: Slot) -> Call:
        ins, at = [slot(v) for v in reads], slot(out)

        def call(env: Env) -> None:
            x, *rest = (env[i] for i in ins)
            w, *bias = folded(rest) if folded else rest
            b, w = (bias[0].to(x.dtype) if bias else None), form(w)
            y = torch.conv2d(x, w, b, stride, pad, dilation, groups)
            env[at] = (y.relu_() if relu is not None else y).to(dtype)

        return call

    return Task(reads, (out,), make, eqns)


def _backward(attrs: Any, out_channels: int, mask: list[bool]) -> Callable[..., Any]:
    """aten's convolution gradients as f(dy, x, w)."""
    pad = [attrs.padding[0], attrs.padding[2]]
    rest = (list(attrs.stride), pad, list(attrs.dilation), False, [0, 0], attrs.groups, mask)
    return lambda dy, x, w: _aten.convolution_backward(dy, x, w, [out_channels], *rest)


def splits(dgrad: Eqn) -> bool:
    """Whether the input gradient runs alone and row-major."""
    few = dgrad.out.type.shape[1] < _FEW and only_f32(*dgrad.inputs, dgrad.out)
    return few or dgrad.attrs.dilation != (1, 1)  # type: ignore[attr-defined]


def conv_dgrad(eqn: Eqn) -> Task:
    """The input gradient alone, row-major."""
    dy, w = eqn.inputs
    # Of the input only the shape counts; a tensor of stride 0 takes no memory.
    like = torch.empty((), dtype=dy.type.dtype.torch).expand(eqn.out.type.shape)
    backward = _backward(eqn.attrs, dy.type.shape[1], [True, False, False])
    dtype = eqn.out.type.dtype.torch

    def make(slot: Slot) -> Call:
        idy, iw, at = slot(dy), slot(w), slot(eqn.out)

        def call(env: Env) -> None:
            env[at] = backward(row_major(env[idy]), like, row_major(env[iw]))[0].to(dtype)

        return call

    return Task(eqn.inputs, (eqn.out,), make, (eqn,))


def conv_backward(wgrad: Eqn, dgrad: Eqn | None, x: Value, dy: Value) -> Task:
    """The weight's, bias's and, with `dgrad`, input's gradient in one call that shares dy.

    x and dy are the laid-out twins of the operands.
    """
    attrs: Any = wgrad.attrs
    form = form_of(attrs)
    w = dgrad.inputs[1] if dgrad is not None else None
    dw, db = wgrad.outputs
    dx = dgrad.out if dgrad is not None else None
    shape = (dy.type.shape[1], x.type.shape[1] // attrs.groups, *attrs.kernel)
    # Without a dgrad only the weight's shape matters.
    blank = form(torch.empty(shape, dtype=x.type.dtype.torch))
    backward = _backward(attrs, shape[0], [v is not None for v in (dx, dw, db)])
    results = [(k, v) for k, v in enumerate((dx, dw, db)) if v is not None]

    def make(slot: Slot) -> Call:
        ix, idy, iw = slot(x), slot(dy), None if w is None else slot(w)
        outs = [(k, slot(v), v.type.dtype.torch) for k, v in results]

        def call(env: Env) -> None:
            got = backward(env[idy], env[ix], blank if iw is None else form(env[iw]))
            for k, at, dtype in outs:
                env[at] = got[k].to(dtype)

        return call

    reads = (x, dy) if w is None else (x, dy, w)
    eqns = (wgrad,) if dgrad is None else (wgrad, dgrad)
    return Task(reads, tuple(v for _, v in results), make, eqns)


def maxpool(eqn: Eqn, wide: Value | None) -> Task:
    """torch's max-pool; `wide` is its int64 index, kept in place of the IR's byte."""
    a: Any = eqn.attrs
    args = (a.kernel, a.stride, (a.padding[0], a.padding[2]), a.dilation, a.ceil_mode)
    x = eqn.inputs[0]

    def make(slot: Slot) -> Call:
        ix, iy, ii = slot(x), slot(eqn.out), None if wide is None else slot(wide)

        def call(env: Env) -> None:
            env[iy], index = _aten.max_pool2d_with_indices(env[ix], *args)
            if ii is not None:
                env[ii] = index

        return call

    return Task((x,), (eqn.out,) if wide is None else (eqn.out, wide), make, (eqn,))


def maxpool_grad(eqn: Eqn, wide: Value) -> Task:
    """torch's max-pool gradient by the int64 index, in the index's memory format."""
    a: Any = eqn.attrs
    args = (a.kernel, a.stride, (a.padding[0], a.padding[2]), a.dilation, a.ceil_mode)
    dy, dtype = eqn.inputs[0], eqn.out.type.dtype.torch
    held: dict[Form, torch.Tensor] = {}  # a fresh result would cost its page faults at every step

    def make(slot: Slot) -> Call:
        idy, ii, at = slot(dy), slot(wide), slot(eqn.out)

        def call(env: Env) -> None:
            index = env[ii]
            form = torch.Tensor.contiguous if index.is_contiguous() else channels_last
            if form not in held:
                held[form] = form(torch.empty(eqn.out.type.shape, dtype=dtype))
            env[at] = _aten.max_pool2d_with_indices_backward.grad_input(
                form(env[idy]), held[form], *args, index, grad_input=held[form]
            )

        return call

    return Task((dy, wide), (eqn.out,), make, (eqn,))


@dataclass(frozen=True)
class PhaseConv:
    """conv2d, perhaps relu, and a max-pool of disjoint windows, with the weight gradients.

    The window's k pixels become k groups of output channels: output channel (phase, o) is the
    convolution at stride times window, with the weight shifted by the phase inside a larger
    kernel. Its input needs no gradient.
    """

    conv: Eqn
    relu: Eqn | None
    pool: Eqn
    grads: tuple[tuple[Eqn, Eqn], ...]  # (maxpool2d_grad, the conv2d_wgrad that reads it)

    @property
    def hidden(self) -> Value:
        """The convolution by phase, before the relu: [N, k * O, PH, PW]."""
        n, o = self.conv.out.type.shape[:2]
        shape = (n, o * self.phases, *self.pool.out.type.shape[2:])
        return Value(f".phase.{self.pool.out.name}", self.conv.out.type.with_shape(shape))

    @property
    def phases(self) -> int:
        kh, kw = self.pool.attrs.kernel  # type: ignore[attr-defined]
        return kh * kw

    def _spread(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A zero weight [k*O, C, R', S'], and the view of it that holds w once per phase."""
        a: Any = self.conv.attrs
        kh, kw = self.pool.attrs.kernel  # type: ignore[attr-defined]
        o, c, r, s = self.conv.inputs[1].type.shape
        rows, cols = r + (kh - 1) * a.stride[0], s + (kw - 1) * a.stride[1]
        big = torch.zeros(self.phases * o, c, rows, cols)
        return big, self._places(big)

    def _places(self, big: torch.Tensor) -> torch.Tensor:
        """[kh, kw, O, C, R, S]: where w lies in a weight (or its gradient) spread by phase."""
        a: Any = self.conv.attrs
        kh, kw = self.pool.attrs.kernel  # type: ignore[attr-defined]
        shape = self.conv.inputs[1].type.shape
        _, c, rows, cols = big.shape
        block = shape[0] * c * rows * cols
        across = block + a.stride[1]
        down = kw * block + a.stride[0] * cols
        strides = (down, across, c * rows * cols, rows * cols, cols, 1)
        return big.as_strided((kh, kw, *shape), strides)

    def _attrs(self) -> ConvAttrs:
        a: Any = self.conv.attrs
        kh, kw = self.pool.attrs.kernel  # type: ignore[attr-defined]
        return ConvAttrs((a.stride[0] * kh, a.stride[1] * kw), a.padding)

    def forward(self) -> Task:
        """The convolution by phase, then the maximum over phases."""
        big, places = self._spread()
        o, k = self.conv.inputs[1].type.shape[0], self.phases
        bias = torch.zeros(k, o)
        flat, attrs, relu = bias.view(-1), self._attrs(), self.relu is not None
        pad = [attrs.padding[0], attrs.padding[2]]
        hidden, out, reads = self.hidden, self.pool.out, self.conv.inputs
        stride, shape = list(attrs.stride), out.type.shape

        def make(slot: Slot) -> Call:
            ins, ih, iy = [slot(v) for v in reads], slot(hidden), slot(out)

            def call(env: Env) -> None:
                x, w, *rest = (env[i] for i in ins)
                places.copy_(w)
                if rest:
                    bias.copy_(rest[0])
                h = _pointwise(x, big, flat, pad, stride, [1, 1], 1, "none", [], "").contiguous()
                env[ih] = h
                y = h.view(shape[0], k, *shape[1:]).amax(1)
                env[iy] = y.relu_() if relu else y  # the relu of a maximum is that of its parts

            return call

        eqns = tuple(e for e in (self.conv, self.relu, self.pool) if e is not None)
        return Task(reads, (hidden, out), make, eqns)

    def backward(self, grad: Eqn, wgrad: Eqn) -> Task:
        """Routes the pooled gradient to the first phase that holds the maximum, then the weight's.

        Where the relu cut the maximum off, the gradient that comes in is 0 already. Two
        subtractions and one threshold per phase: masks of bytes take ten times as long.
        """
        k, (n, o, *size) = self.phases, self.pool.out.type.shape
        big, _ = self._spread()
        routed = torch.empty(n, k, o, *size)
        lanes = routed.unbind(1)
        gap, left = torch.empty(n, o, *size), [torch.empty(n, o, *size) for _ in range(k - 1)]
        left[-1] = lanes[-1]
        dy, x, hidden, y = grad.inputs[0], self.conv.inputs[0], self.hidden, self.pool.out
        dw, db = wgrad.outputs
        run = _backward(self._attrs(), k * o, [False, dw is not None, db is not None])
        whole = routed.view(n, k * o, *size)
        above = _aten.threshold_backward.grad_input

        def make(slot: Slot) -> Call:
            idy, ix, ih, iy = (slot(v) for v in (dy, x, hidden, y))
            iw, ib = (None if v is None else slot(v) for v in (dw, db))

            def call(env: Env) -> None:
                rest, best = env[idy].contiguous(), env[iy]
                for lane, rows, later in zip(lanes, env[ih].view_as(routed).unbind(1), left):  # noqa: B905  (the last phase gets the rest)
                    torch.sub(best, rows, out=gap)
                    above(rest, gap, 0, grad_input=later)  # what a later phase gets
                    torch.sub(rest, later, out=lane)
                    rest = later
                _, gw, gb = run(whole, env[ix], big)
                if iw is not None:
                    env[iw] = self._places(gw.contiguous()).sum((0, 1))
                if ib is not None:
                    env[ib] = gb.view(k, o).sum(0)

            return call

        results = tuple(v for v in (dw, db) if v is not None)
        return Task((dy, x, hidden, y), results, make, (grad, wgrad))


Reader = Callable[[Value], list[Eqn]]


def phase_conv(eqn: Eqn, readers: Reader) -> PhaseConv | None:
    """The pattern around a conv2d, if it stands there and pays."""
    a: Any = eqn.attrs
    if _pointwise is None or not symmetric(a) or a.groups != 1 or a.dilation != (1, 1):
        return None
    if eqn.inputs[1].type.shape[1] > _THIN or not only_f32(*eqn.inputs, eqn.out):
        return None
    following = readers(eqn.out)
    relu = following[0] if len(following) == 1 and following[0].op == "relu" else None
    pools = readers(relu.out) if relu is not None else following
    if len(pools) != 1 or pools[0].op != "maxpool2d" or not _disjoint(pools[0]):
        return None
    grads = []
    idx = pools[0].outputs[1]
    for g in [] if idx is None else readers(idx):
        behind = readers(g.out) if g.op == "maxpool2d_grad" else []
        if len(behind) != 1 or behind[0].op != "conv2d_wgrad":
            return None
        w = behind[0]
        if w.inputs != (eqn.inputs[0], g.out) or w.attrs.base() != a.base():  # type: ignore[attr-defined]
            return None
        grads.append((g, w))
    if idx is not None and not grads:  # it leaves the graph
        return None
    return PhaseConv(eqn, relu, pools[0], tuple(grads))


def _disjoint(pool: Eqn) -> bool:
    """Whether the windows are few, do not overlap and lie inside the image."""
    a: PoolAttrs = pool.attrs  # type: ignore[assignment]
    size = pool.inputs[0].type.shape[2:]
    inside = all(
        n * k <= s for n, k, s in zip(pool.out.type.shape[2:], a.kernel, size, strict=True)
    )
    plain = a.kernel == a.stride and a.dilation == (1, 1) and not any(a.padding)
    return plain and inside and 2 <= a.kernel[0] * a.kernel[1] <= 4
