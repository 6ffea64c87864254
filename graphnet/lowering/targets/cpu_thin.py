"""Convolutions of few channels on the cpu target, as matrix products.

A convolution whose channels are fewer than the lanes of a vector leaves them empty. Here images lie
[H, C, W, N], batch innermost, and for each of the S columns of the kernel a copy of what it meets
stands beside the others: [H, C, S, columns of the result, N]. In that copy the patches of a row of
the result are a matrix without a copy of their own, since the rows of the kernel follow one
another. The three products of a convolution are products with these matrices.

`PooledConv` is a first layer with its max-pool: the k pixels of a pooling window become k groups of
output channels, so that the pool is a maximum over whole rows. `input_gradient` is the gradient of
a layer that has few input channels.

Measured on LeNet-5 at batch 128, two cores, fp32, against oneDNN's kernels (conv1's with the same
groups): conv1 forward 0.83 ms and 0.52 to 0.65 here, its gradient 1.09 and 0.71 to 0.76, conv2's
input gradient 1.10 and 0.69 to 0.89. One matrix of all patches in memory gained nothing: the
product takes 0.34 ms alone and 0.5 to 0.8 inside a step, since it does not fit the cache. Batches
of fewer than 16 images gain little (at 4 a tenth of the step, at 1 nothing).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.targets.cpu_task import Call, Env, Slot, Task, only_f32, symmetric
from graphnet.ops.pool import PoolAttrs

_THIN = 4  # input channels up to which a first layer runs here
_BATCH = 16  # images that make it worth while
_above = torch.ops.aten.threshold_backward.grad_input


@dataclass(frozen=True)
class PooledConv:
    """conv2d, perhaps relu, and a max-pool of disjoint windows, with the weight gradients.

    Its input needs no gradient. Where a shape is written with N last, the batch is innermost.
    """

    conv: Eqn
    relu: Eqn | None
    pool: Eqn
    grads: tuple[tuple[Eqn, Eqn], ...]  # (maxpool2d_grad, the conv2d_wgrad that reads it)

    @property
    def window(self) -> tuple[int, int]:
        return self.pool.attrs.kernel  # type: ignore[attr-defined, no-any-return]

    @property
    def phases(self) -> int:
        return self.window[0] * self.window[1]

    @property
    def hidden(self) -> Value:
        """The convolution by phase, without its bias: [PH, phases, O, PW, N]."""
        n, o, height, width = self.pool.out.type.shape
        shape = (height, self.phases, o, width, n)
        return Value(f".phases.{self.pool.out.name}", self.conv.out.type.with_shape(shape))

    @property
    def highest(self) -> Value:
        """Its maximum over phases, [PH, O, PW, N]."""
        n, o, height, width = self.pool.out.type.shape
        shape = (height, o, width, n)
        return Value(f".highest.{self.pool.out.name}", self.conv.out.type.with_shape(shape))

    @cached_property
    def kernel(self) -> tuple[int, int]:
        """Rows R' and columns S' of the larger kernel, which holds the weight in each phase."""
        a: Any = self.conv.attrs
        r, s = self.conv.inputs[1].type.shape[2:]
        kh, kw = self.window
        return r + (kh - 1) * a.stride[0], s + (kw - 1) * a.stride[1]

    @cached_property
    def bordered(self) -> torch.Tensor:
        """The images with their border of zeros: [H, C, W, N]."""
        top, bottom, left, right = self.conv.attrs.padding  # type: ignore[attr-defined]
        n, c, h, w = self.conv.inputs[0].type.shape
        return torch.zeros(h + top + bottom, c, w + left + right, n)

    @cached_property
    def columns(self) -> torch.Tensor:
        """What the S' columns of the kernel meet in each window: [H, C, S', PW, N].

        The rows of a window follow one another in it, so that they need no copy of their own.
        """
        h, c, _, n = self.bordered.shape
        return torch.empty(h, c, self.kernel[1], self.pool.out.type.shape[3], n)

    @property
    def matrices(self) -> torch.Tensor:
        """The patches of each row of windows, a view of `columns`: [PH, R' * C * S', PW * N]."""
        a: Any = self.conv.attrs
        _, c, cols, width, n = self.columns.shape
        step, line = a.stride[0] * self.window[0], width * n
        shape = (self.pool.out.type.shape[2], self.kernel[0] * c * cols, line)
        return self.columns.as_strided(shape, (step * c * cols * line, line, 1))

    def _places(self, big: torch.Tensor) -> torch.Tensor:
        """[kh, kw, O, C, R, S]: where the weight lies in a [phases * O, R' * C * S'] matrix."""
        a: Any = self.conv.attrs
        o, c, r, s = self.conv.inputs[1].type.shape
        kw, cols, line = self.window[1], self.kernel[1], big.shape[1]
        row = c * cols
        down, across = kw * o * line + a.stride[0] * row, o * line + a.stride[1]
        return big.as_strided((*self.window, o, c, r, s), (down, across, line, cols, row, 1))

    def _unfold(self, x: torch.Tensor) -> None:
        """Fills `columns` from images [N, C, H, W]."""
        a: Any = self.conv.attrs
        _, _, h, w = x.shape
        top, left = a.padding[0], a.padding[2]
        self.bordered[top : top + h, :, left : left + w].copy_(x.permute(2, 1, 3, 0))
        row, channel, col, _ = self.bordered.stride()
        apart = a.stride[1] * self.window[1] * col
        strides = (row, channel, col, apart, 1)
        self.columns.copy_(self.bordered.as_strided(self.columns.shape, strides))

    def forward(self) -> Task:
        """The product of weights and patches, then the maximum over phases."""
        relu, matrices = self.relu is not None, self.matrices
        hidden, highest, out, reads = self.hidden, self.highest, self.pool.out, self.conv.inputs
        height, k, o, *_ = hidden.type.shape
        big = torch.zeros(k * o, matrices.shape[1])
        places, weights = self._places(big), big.expand(height, *big.shape)

        def make(slot: Slot) -> Call:
            ins, ih, im, iy = [slot(v) for v in reads], slot(hidden), slot(highest), slot(out)

            def call(env: Env) -> None:
                x, w, *bias = (env[i] for i in ins)
                self._unfold(x)
                places.copy_(w)
                env[ih] = h = torch.bmm(weights, matrices).view(hidden.type.shape)
                env[im] = y = h.amax(1)
                # The bias and the relu of a maximum are those of its parts.
                y = y + bias[0].view(-1, 1, 1) if bias else y
                y = y.relu_() if relu and bias else y.relu() if relu else y
                env[iy] = y.permute(3, 1, 0, 2)

            return call

        eqns = tuple(e for e in (self.conv, self.relu, self.pool) if e is not None)
        return Task(reads, (hidden, highest, out), make, eqns)

    def backward(self, grad: Eqn, wgrad: Eqn) -> Task:
        """Routes the pooled gradient to the first phase that holds the maximum, then the weight's.

        Phase p's gradient is what it and later ones share less what later ones share. The
        subtraction runs on the products, which are small. Where the relu cut the maximum off, the
        gradient that comes in is 0 already. Masks of bytes take ten times as long as thresholds.
        """
        hidden, highest, patches = self.hidden, self.highest, self.matrices.transpose(1, 2)
        height, k, o, width, n = hidden.type.shape
        dy, (dw, db) = grad.inputs[0], wgrad.outputs

        def make(slot: Slot) -> Call:
            idy, ih, im = (slot(v) for v in (dy, hidden, highest))
            iw, ib = (None if v is None else slot(v) for v in (dw, db))

            def call(env: Env) -> None:
                shared = torch.empty(hidden.type.shape)  # by this phase and later ones
                lanes = shared.unbind(1)
                rest = lanes[0].copy_(env[idy].permute(2, 1, 3, 0))
                if ib is not None:  # each window's gradient goes to one of its pixels
                    env[ib] = rest.sum((0, 2, 3))
                if iw is None:
                    return
                torch.sub(env[im].unsqueeze(1), env[ih][:, :-1], out=shared[:, 1:])
                for lane in lanes[1:]:  # which holds by how much the phase before is below
                    rest = _above(rest, lane, 0, grad_input=lane)
                total = torch.bmm(shared.view(height, k * o, width * n), patches).sum(0)
                own = torch.cat((total[:-o] - total[o:], total[-o:]))
                env[iw] = self._places(own).sum((0, 1))

            return call

        results = tuple(v for v in (dw, db) if v is not None)
        return Task((dy, hidden, highest), results, make, (grad, wgrad))


def runs_input_gradient(dgrad: Eqn) -> bool:
    """Whether `input_gradient` does one that `cpu_conv.splits` off, whose channels are few."""
    a: Any = dgrad.attrs
    return a.groups == 1 and a.dilation == (1, 1) and dgrad.out.type.shape[0] >= _BATCH


def input_gradient(dgrad: Eqn) -> Task:
    """The input gradient of a convolution with few input channels.

    The gradients of the columns are summed in place. Rows of the result whose patches have no row
    in common are added in one call.
    """
    a: Any = dgrad.attrs
    dy, w = dgrad.inputs
    (n, c, h, width), (o, _, r, s), (_, _, rows, cols) = (
        v.type.shape for v in (dgrad.out, w, dy)
    )
    top, bottom, left, right = a.padding
    down, across = a.stride
    last = across * (cols - 1) + 1
    line, apart = cols * n, -(-r // down)  # rows of the result from one to the next without overlap

    def make(slot: Slot) -> Call:
        idy, iw, at = slot(dy), slot(w), slot(dgrad.out)

        def call(env: Env) -> None:
            g = env[idy].permute(2, 1, 3, 0).contiguous().view(rows, o, line)
            weight = env[iw].permute(2, 1, 3, 0).reshape(r * c * s, o)
            columns = torch.zeros(h + top + bottom, c, s, cols, n)
            row = columns.stride(0)
            for i in range(min(apart, rows)):
                some = g[i::apart]
                shape, strides = (len(some), r * c * s, line), (apart * down * row, line, 1)
                met = columns.as_strided(shape, strides, i * down * row)
                met.baddbmm_(weight.expand(len(some), -1, -1), some)
            bordered = torch.zeros(h + top + bottom, c, width + left + right, n)
            for k in range(s):
                bordered[:, :, k : k + last : across].add_(columns[:, :, k])
            env[at] = bordered[top : top + h, :, left : left + width].permute(3, 1, 0, 2)

        return call

    return Task((dy, w), (dgrad.out,), make, (dgrad,))


Reader = Callable[[Value], list[Eqn]]


def pooled_conv(eqn: Eqn, readers: Reader) -> PooledConv | None:
    """The pattern around a conv2d, if it stands there and pays."""
    a: Any = eqn.attrs
    if not symmetric(a) or a.groups != 1 or a.dilation != (1, 1):
        return None
    n, c = eqn.inputs[0].type.shape[:2]
    if n < _BATCH or c > _THIN or not only_f32(*eqn.inputs, eqn.out):
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
    return PooledConv(eqn, relu, pools[0], tuple(grads))


def _disjoint(pool: Eqn) -> bool:
    """Whether the windows are few, do not overlap and lie inside the image."""
    a: PoolAttrs = pool.attrs  # type: ignore[assignment]
    size = pool.inputs[0].type.shape[2:]
    inside = all(
        n * k <= s for n, k, s in zip(pool.out.type.shape[2:], a.kernel, size, strict=True)
    )
    plain = a.kernel == a.stride and a.dilation == (1, 1) and not any(a.padding)
    return plain and inside and 2 <= a.kernel[0] * a.kernel[1] <= 4
