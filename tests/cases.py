"""One row (or more) per op: attributes, operands, and the torch.nn equivalent.

Everything that runs an op reads this table: the oracle against torch, the cpu twins, the kernels
under the interpreter and on the GPU. A registry test notices an op without a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import graphnet.ops  # noqa: F401  (fills the registry)
from graphnet.ir.op import NO_ATTRS, Attrs, get_op
from graphnet.ir.types import TensorType, f32, i32, i64, u8

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One row.

    ins    operand types; f32 stands for "floating point", tests run it in other precisions too
    torch  the equivalent on the same operands: a tensor, or one per result (None: not compared)
    draw   makes operands that depend on each other; else `operands` draws each from its type
    exact  results are moved or selected, never rounded: compared bit by bit
    wrt    operands that have a gradient, None for an op that has none
    """

    op: str
    ins: tuple[TensorType, ...]
    torch: Callable[..., Any]
    attrs: Attrs = NO_ATTRS
    note: str = ""
    draw: Callable[[Case, torch.Generator, torch.dtype], Tensors] | None = None
    exact: bool = False
    wrt: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.attrs is NO_ATTRS:  # the op's own defaults
            object.__setattr__(self, "attrs", get_op(self.op).attrs_type())

    @property
    def id(self) -> str:
        return f"{self.op}-{self.note}" if self.note else self.op

    def operands(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensors:
        """Operands, the floating-point ones in `dtype`; the same for the same seed."""
        g = torch.Generator().manual_seed(seed)
        if self.draw is not None:
            return self.draw(self, g, dtype)
        return [fill(t, g, dtype) for t in self.ins]

    def expected(self, args: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """What torch gives, one entry per result."""
        out = self.torch(*args)
        return out if isinstance(out, tuple) else (out,)


def fill(t: TensorType, g: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Values that are distinct and away from 0, so that no maximum ties and no kink is hit."""
    if not t.dtype.is_float:
        return torch.randint(0, 3, t.shape, generator=g).to(t.dtype.torch)
    n = t.numel
    spread = (torch.randperm(n, generator=g).double() + 0.5 - n / 2) * (4 / max(n, 8))
    return spread.reshape(t.shape).to(dtype)


def attrs(op: str, **fields: Any) -> Attrs:
    return get_op(op).attrs_type(**fields)


def _f(*shape: int) -> TensorType:
    return TensorType(f32, shape)


def pulled_back(fn: Callable[..., torch.Tensor], primal: Tensors, dy: torch.Tensor) -> Tensors:
    """torch's own gradients of `fn` at `primal`, for the gradient ops."""
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_() for p in primal]
        return list(torch.autograd.grad(fn(*leaves), leaves, dy))


# ---- activations, elementwise ---------------------------------------------------------------

_UNARY = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


def _from_output(name: str) -> Callable[..., torch.Tensor]:
    """Gradient by the output: what autograd gives for an input that leads to it."""
    inverse = {"relu": lambda y: y, "tanh": torch.atanh, "sigmoid": torch.logit}[name]
    return lambda y, dy: pulled_back(_UNARY[name], [inverse(y)], dy)[0]


def _draw_output(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    x, dy = (fill(t, g, dtype) for t in c.ins)
    return [_UNARY[c.op.removesuffix("_grad")](x), dy]


ELEMENTWISE = [
    *(Case(n, (_f(2, 3, 5, 7),), fn, wrt=(0,), exact=n == "relu") for n, fn in _UNARY.items()),
    *(
        Case(
            f"{n}_grad", (_f(2, 3, 5, 7),) * 2, _from_output(n), draw=_draw_output,
            exact=n == "relu",
        )
        for n in _UNARY
    ),
    Case("add", (_f(2, 3, 4, 5),) * 2, torch.add, wrt=(0, 1)),
    Case("add", (_f(6, 5), _f()), torch.add, note="scalar", wrt=(0,)),
    Case("mul", (_f(2, 3, 4, 5),) * 2, torch.mul, wrt=(0, 1)),
    Case("mul", (_f(6, 5), _f()), torch.mul, note="scalar", wrt=(0,)),
    Case("cast", (_f(3, 5),), lambda x: x, attrs("cast", dtype="f32"), exact=True, wrt=(0,)),
    Case(
        "full", (), lambda: torch.full((2, 3), 0.25),
        attrs("full", value=0.25, shape=(2, 3), dtype="f32"), exact=True,
    ),
]  # fmt: skip

# ---- convolution and linear -----------------------------------------------------------------


def _conv(a: Any) -> Callable[..., torch.Tensor]:
    t, b, le, r = a.padding

    def run(x: torch.Tensor, w: torch.Tensor, bias: Any = None) -> torch.Tensor:
        padded = F.pad(x, (le, r, t, b))
        return F.conv2d(padded, w, bias, a.stride, 0, a.dilation, a.groups)

    return run


def _conv_rows() -> list[Case]:
    table: list[tuple[str, tuple, tuple, dict]] = [
        ("lenet", (3, 1, 12, 12), (6, 1, 5, 5), {"padding": 2}),
        ("plain", (2, 3, 9, 8), (4, 3, 3, 3), {}),
        ("stride", (2, 3, 11, 12), (4, 3, 3, 3), {"stride": 2, "padding": 1}),
        ("rest", (2, 2, 12, 11), (3, 2, 3, 3), {"stride": 4}),
        ("dilated", (2, 3, 11, 11), (4, 3, 3, 3), {"dilation": 2, "padding": (2, 1)}),
        ("groups", (2, 4, 7, 7), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
        ("depthwise", (2, 4, 7, 7), (4, 1, 3, 3), {"groups": 4}),
        ("foursided", (2, 3, 6, 7), (4, 3, 3, 2), {"padding": (0, 1, 2, 1)}),
        ("pointwise", (2, 5, 4, 4), (7, 5, 1, 1), {}),
        ("wide", (2, 3, 4, 9), (2, 3, 1, 5), {"stride": (1, 2), "padding": (0, 2)}),
    ]
    rows = []
    for note, x, w, kw in table:
        base: Any = attrs("conv2d", **kw)
        size = base.spatial(x[2:], w[2:])
        dy = (x[0], w[0], *size)
        fwd = _conv(base)
        bias = (_f(w[0]),) if note != "plain" else ()
        rows.append(
            Case(
                "conv2d", (_f(*x), _f(*w), *bias), fwd, base, note=note,
                wrt=tuple(range(2 + len(bias))),
            )
        )  # fmt: skip

        def dgrad(dy, w, fwd=fwd, x=x):
            return pulled_back(lambda v: fwd(v, w), [dy.new_zeros(x)], dy)[0]

        def wgrad(x, dy, fwd=fwd, w=w):
            zero = [dy.new_zeros(w), dy.new_zeros(w[0])]
            return tuple(pulled_back(lambda v, b: fwd(x, v, b), zero, dy))

        rows += [
            Case("conv2d_dgrad", (_f(*dy), _f(*w)), dgrad,
                 attrs("conv2d_dgrad", **kw, input_size=x[2:]), note=note),
            Case("conv2d_wgrad", (_f(*x), _f(*dy)), wgrad,
                 attrs("conv2d_wgrad", **kw, kernel=w[2:]), note=note),
        ]  # fmt: skip
    return rows


PRODUCTS = [
    *_conv_rows(),
    Case("linear", (_f(4, 7), _f(5, 7), _f(5)), F.linear, wrt=(0, 1, 2)),
    Case("linear", (_f(4, 7), _f(5, 7)), F.linear, note="nobias", wrt=(0, 1)),
    Case("linear_dgrad", (_f(4, 5), _f(5, 7)), lambda dy, w: dy @ w),
    Case("linear_wgrad", (_f(4, 7), _f(4, 5)), lambda x, dy: (dy.T @ x, dy.sum(0))),
]

# ---- pooling --------------------------------------------------------------------------------


def _maxpool(a: Any) -> Callable[..., torch.Tensor]:
    t, b, le, r = a.padding

    def run(x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (le, r, t, b), value=float("-inf"))
        return F.max_pool2d(padded, a.kernel, a.stride, 0, a.dilation, a.ceil_mode)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, a.kernel, a.stride, (t, le), a.dilation, a.ceil_mode)

    return plain if (t, le) == (b, r) else run


def _avgpool(a: Any) -> Callable[..., torch.Tensor]:
    pad, override = (a.padding[0], a.padding[2]), a.divisor_override or None
    return lambda x: F.avg_pool2d(
        x, a.kernel, a.stride, pad, a.ceil_mode, a.count_include_pad, override
    )


def _draw_pool_grad(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    """A gradient, and the index of the pooled image that `_image` draws."""
    dy = fill(c.ins[0], g, dtype)
    size = c.attrs.input_size  # type: ignore[attr-defined]
    x = _image(dy.shape[:2], size, dtype)
    fields = {k: v for k, v in c.attrs.items() if k != "input_size"}
    return [dy, get_op("maxpool2d").reference(attrs("maxpool2d", **fields), x)[1]]


def _image(head: Sequence[int], size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return fill(_f(*head, *size), torch.Generator().manual_seed(7), dtype)


def _pool_rows() -> list[Case]:
    rows = []
    for note, x, kw in [
        ("lenet", (2, 3, 8, 8), {"kernel": 2}),
        ("alexnet", (2, 2, 13, 13), {"kernel": 3, "stride": 2}),
        ("rest", (2, 2, 7, 9), {"kernel": 2}),
        ("padded", (2, 2, 7, 8), {"kernel": 3, "stride": 2, "padding": 1}),
        ("ceil", (2, 2, 8, 7), {"kernel": 3, "stride": 2, "ceil_mode": True}),
        ("ceilpad", (2, 2, 8, 8), {"kernel": 3, "stride": 3, "padding": 1, "ceil_mode": True}),
        ("dilated", (2, 2, 9, 9), {"kernel": (2, 3), "stride": 1, "dilation": 2}),
        ("foursided", (2, 2, 6, 6), {"kernel": 3, "stride": 2, "padding": (0, 1, 0, 1)}),
    ]:
        a: Any = attrs("maxpool2d", **kw)
        fn, y = _maxpool(a), (*x[:2], *a.spatial(x[2:]))

        def grad(dy, idx, fn=fn, x=x):
            return pulled_back(fn, [_image(x[:2], x[2:], dy.dtype)], dy)[0]

        rows += [
            Case("maxpool2d", (_f(*x),), lambda x, fn=fn: (fn(x), None), a, note, exact=True,
                 wrt=(0,)),
            Case("maxpool2d_grad", (_f(*y), TensorType(u8, y)), grad,
                 attrs("maxpool2d_grad", **kw, input_size=x[2:]), note, _draw_pool_grad),
        ]  # fmt: skip
    for note, x, kw in [
        ("plain", (2, 3, 8, 8), {"kernel": 2}),
        ("overlap", (2, 2, 9, 9), {"kernel": 3, "stride": 2}),
        ("padded", (2, 2, 7, 7), {"kernel": 3, "stride": 2, "padding": 1}),
        ("nopad", (2, 2, 7, 7),
         {"kernel": 3, "stride": 2, "padding": 1, "count_include_pad": False}),
        ("ceil", (2, 2, 8, 8), {"kernel": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
        ("divisor", (2, 2, 6, 6), {"kernel": 2, "divisor_override": 3}),
    ]:  # fmt: skip
        a = attrs("avgpool2d", **kw)
        rows += _linear_pool("avgpool2d", a, note, x, _avgpool(a), a.spatial(x[2:]))
    for size, out in [((8, 8), (2, 2)), ((7, 9), (3, 4)), ((3, 3), (5, 6))]:
        note = "to".join("x".join(map(str, s)) for s in (size, out))
        a = attrs("adaptive_avgpool2d", output_size=out)
        fn = lambda x, out=out: F.adaptive_avg_pool2d(x, out)
        rows += _linear_pool("adaptive_avgpool2d", a, note, (2, 3, *size), fn, out)
    return rows


def _linear_pool(op: str, a: Any, note: str, x: tuple, fn: Any, size: tuple) -> list[Case]:
    """A pool whose gradient does not depend on the image, and that gradient."""
    fields = {} if op.startswith("adaptive") else dict(a.items())
    return [
        Case(op, (_f(*x),), fn, a, note, wrt=(0,)),
        Case(
            f"{op}_grad", (_f(*x[:2], *size),),
            lambda dy: pulled_back(fn, [dy.new_zeros(x)], dy)[0],
            attrs(f"{op}_grad", **fields, input_size=x[2:]), note,
        ),
    ]  # fmt: skip


# ---- movement, losses, dropout, updates -----------------------------------------------------


def _slice_grad(dy: torch.Tensor) -> torch.Tensor:
    return pulled_back(lambda x: x[:, 1:4], [dy.new_zeros(3, 6, 2)], dy)[0]


MOVES = [
    Case("reshape", (_f(2, 3, 4, 5),), lambda x: x.flatten(1), attrs("reshape", shape=(2, 60)),
         exact=True, wrt=(0,)),
    Case("slice", (_f(3, 6, 2),), lambda x: x[:, 1:4], attrs("slice", axis=1, start=1, stop=4),
         exact=True, wrt=(0,)),
    Case("slice_grad", (_f(3, 3, 2),), _slice_grad,
         attrs("slice_grad", axis=1, start=1, stop=4, size=6), exact=True),
    Case("concat", (_f(2, 3, 4), _f(2, 1, 4), _f(2, 2, 4)), lambda *x: torch.cat(x, 1),
         attrs("concat", axis=1), exact=True, wrt=(0, 1, 2)),
    Case("relayout", (_f(2, 3, 4, 5),), lambda x: x, attrs("relayout", layout="nhwc"),
         exact=True, wrt=(0,)),
]  # fmt: skip


def _draw_loss(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    logits = fill(c.ins[0], g, dtype)
    labels = torch.randint(0, logits.shape[1], logits.shape[:1], generator=g)
    live = 4 if c.note == "live" else logits.shape[0]
    labels[live:] = 0
    return [logits, labels, torch.tensor(live, dtype=torch.int32)]


def _loss_rows() -> list[Case]:
    rows = []
    for op, key, fn, values in [
        ("cross_entropy", "label_smoothing", F.cross_entropy, {"": 0.0, "smooth": 0.1}),
        ("multi_margin", "margin", F.multi_margin_loss, {"": 1.0, "wide": 2.5}),
    ]:
        for note, value in {**values, "live": next(iter(values.values()))}.items():

            def loss(z, y, live, fn=fn, kw={key: value}):  # noqa: B006  (bound per row)
                return fn(z[:live], y[:live], **kw)

            def grad(z, y, live, loss=loss):
                return pulled_back(lambda v: loss(v, y, live), [z], z.new_ones(()))[0]

            ins = (_f(7, 5), TensorType(i64, (7,)), TensorType(i32, ()))
            a = {key: value}
            rows += [
                Case(op, ins, loss, attrs(op, **a), note, _draw_loss, wrt=(0,)),
                Case(f"{op}_grad", ins, grad, attrs(f"{op}_grad", **a), note, _draw_loss),
            ]
    return rows


def philox_scalar(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 as the paper writes it, on Python ints: independent of `ops/philox.py`."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & 0xFFFFFFFF, (p >> 32) ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def _kept(shape: Sequence[int], seed: int, step: int, a: Any) -> torch.Tensor:
    rest = int(np.prod(shape[1:]))
    keep = []
    for row in range(shape[0]):
        sample = step * (a.global_batch or shape[0]) + row
        words = [sample & 0xFFFFFFFF, sample >> 32, a.stream]
        key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        keep += [philox_scalar([e, *words], key)[0] >= int(a.p * 2**32) for e in range(rest)]
    return torch.tensor(keep).reshape(tuple(shape))


def _dropout(a: Any) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, seed: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        if not a.training:
            return x if a.mode == "inverted" else x * (1 - a.p)
        kept = x * _kept(x.shape, int(seed), int(step), a)
        return kept / (1 - a.p) if a.mode == "inverted" else kept

    return run


def _draw_dropout(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    # Both words of the key and of the sample are in use.
    return [fill(c.ins[0], g, dtype), torch.tensor((5 << 32) + 11), torch.tensor((1 << 33) + 3)]


def _dropout_rows() -> list[Case]:
    scalar = TensorType(i64, ())
    rows = []
    for note, shape, kw in [
        ("", (3, 2, 3, 4), {"p": 0.5, "stream": 3735928559}),
        ("flat", (4, 9), {"p": 0.2, "stream": 1, "global_batch": 16}),
        ("vanilla", (3, 7), {"p": 0.5, "mode": "vanilla"}),
        ("infer", (3, 7), {"p": 0.5, "training": False}),
        ("vanillainfer", (3, 7), {"p": 0.25, "mode": "vanilla", "training": False}),
        ("none", (3, 7), {"p": 0.0}),
    ]:
        a = attrs("dropout", **kw)
        rows.append(
            Case("dropout", (_f(*shape), scalar, scalar), _dropout(a), a, note, _draw_dropout,
                 wrt=(0,))
        )  # fmt: skip
    return rows


def _draw_sgd(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    tensors = [fill(t, g, dtype) for t in c.ins if t.shape]
    hypers = [0.1, 0.9, 0.01] if len(tensors) == 3 else [0.1, 0.01]
    return tensors + [torch.tensor(h, dtype=dtype) for h in hypers]


def _torch_sgd(nesterov: bool) -> Callable[..., Any]:
    def run(w: torch.Tensor, g: torch.Tensor, *rest: torch.Tensor) -> Any:
        *m, lr, mom, wd = rest if len(rest) == 4 else (rest[0], torch.zeros(()), rest[1])
        p = torch.nn.Parameter(w.clone())
        opt = torch.optim.SGD([p], float(lr), float(mom), 0, float(wd), nesterov)
        if m:
            opt.state[p]["momentum_buffer"] = m[0].clone()
        p.grad = g.clone()
        opt.step()
        return (p.detach(), opt.state[p]["momentum_buffer"]) if m else p.detach()

    return run


def _classic(w, g, v, lr, mom, wd):
    """Caffe's: the rate is inside the buffer."""
    v1 = mom * v - lr * (g + wd * w)
    return w + v1, v1


def _classic_nesterov(w, g, v, lr, mom, wd):
    """Sutskever's look-ahead in Bengio's variables: the step is mom v1 + (v1 - mom v)."""
    v1 = mom * v - lr * (g + wd * w)
    return w + mom * v1 + (v1 - mom * v), v1


_W, _S = _f(4, 3), _f()
UPDATES = [
    Case("sgd_update", (_W, _W, _S, _S), _torch_sgd(False), draw=_draw_sgd),
    *(
        Case("sgd_update", (_W, _W, _W, _S, _S, _S), fn,
             attrs("sgd_update", momentum=True, nesterov=n, form=form), note, _draw_sgd)
        for note, n, form, fn in [
            ("momentum", False, "torch", _torch_sgd(False)),
            ("nesterov", True, "torch", _torch_sgd(True)),
            ("classic", False, "classic", _classic),
            ("classicnesterov", True, "classic", _classic_nesterov),
        ]
    ),
    Case("record_step", (_f(4096), _S, TensorType(i64, ())),
         lambda ring, loss, step: (ring.index_fill(0, step % 4096, float(loss)), step + 1),
         exact=True),
]  # fmt: skip

CASES = [
    *ELEMENTWISE, *PRODUCTS, *_pool_rows(), *MOVES, *_loss_rows(), *_dropout_rows(), *UPDATES,
]  # fmt: skip
