"""Convolutions and max-pools of the cpu target: layouts, and the fusions that oneDNN leaves.

Measured on two cores, fp32, batch 128, and the reason for each rule here:
- A convolution is fastest channels-last. Its relu runs behind it, in place, or behind its pool: the
  primitive's own relu turns NaN into 0, and hides a net that has diverged.
- The input gradient of a convolution with few input channels is faster row-major (LeNet-5 conv2:
  0.56 against 0.85 ms) although its weight gradient is not, so the two are split there.
- With a dilation everything is row-major: channels-last, torch 2.13's convolution ends in a
  segmentation fault where a width of 1 meets stride, padding and dilation (found by random nets).
- Where channels are too few to fill vectors, `cpu_thin` does better than any of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.targets.cpu_fold import Folded
from graphnet.lowering.targets.cpu_task import Call, Env, Slot, Task, only_f32
from graphnet.ops.conv2d import ConvAttrs, row_major

_FEW = 16  # input channels below which dgrad runs row-major
Form = Callable[[torch.Tensor], torch.Tensor]
_aten: Any = torch.ops.aten


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
                form(env[idy].to(dtype)), held[form], *args, index, grad_input=held[form]
            )

        return call

    return Task((dy, wide), (eqn.out,), make, (eqn,))
