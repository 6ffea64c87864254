"""One row (or more) per op: attributes, operands, and the torch.nn equivalent.

Everything that runs an op reads this table: the oracle against torch, the cpu twins, the kernels
under the interpreter and on the GPU. A registry test notices an op without a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from graphnet.ir.types import TensorType, i32, i64
from tests.case import Case, Tensors, attrs, f, fill, pulled_back
from tests.cases_augment import augment_rows
from tests.cases_elementwise import ELEMENTWISE, SOFTMAX
from tests.cases_norm import norm_rows
from tests.cases_pool import lrn_rows, pool_rows
from tests.cases_take import take_rows
from tests.philox import philox_scalar

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
        bias = (f(w[0]),) if note != "plain" else ()
        rows.append(
            Case(
                "conv2d", (f(*x), f(*w), *bias), fwd, base, note=note,
                wrt=tuple(range(2 + len(bias))),
            )
        )  # fmt: skip

        def dgrad(dy, w, fwd=fwd, x=x):
            return pulled_back(lambda v: fwd(v, w), [dy.new_zeros(x)], dy)[0]

        def wgrad(x, dy, fwd=fwd, w=w):
            zero = [dy.new_zeros(w), dy.new_zeros(w[0])]
            return tuple(pulled_back(lambda v, b: fwd(x, v, b), zero, dy))

        rows += [
            Case("conv2d_dgrad", (f(*dy), f(*w)), dgrad,
                 attrs("conv2d_dgrad", **kw, input_size=x[2:]), note=note),
            Case("conv2d_wgrad", (f(*x), f(*dy)), wgrad,
                 attrs("conv2d_wgrad", **kw, kernel=w[2:]), note=note),
        ]  # fmt: skip
    return rows


PRODUCTS = [
    *_conv_rows(),
    Case("linear", (f(4, 7), f(5, 7), f(5)), F.linear, wrt=(0, 1, 2)),
    Case("linear", (f(4, 7), f(5, 7)), F.linear, note="nobias", wrt=(0, 1)),
    Case("linear_dgrad", (f(4, 5), f(5, 7)), lambda dy, w: dy @ w),
    Case("linear_wgrad", (f(4, 7), f(4, 5)), lambda x, dy: (dy.T @ x, dy.sum(0))),
]

# ---- movement, losses, dropout, updates -----------------------------------------------------


def _slice_grad(dy: torch.Tensor) -> torch.Tensor:
    return pulled_back(lambda x: x[:, 1:4], [dy.new_zeros(3, 6, 2)], dy)[0]


MOVES = [
    Case("reshape", (f(2, 3, 4, 5),), lambda x: x.flatten(1), attrs("reshape", shape=(2, 60)),
         exact=True, wrt=(0,)),
    Case("slice", (f(3, 6, 2),), lambda x: x[:, 1:4], attrs("slice", axis=1, start=1, stop=4),
         exact=True, wrt=(0,)),
    Case("slice_grad", (f(3, 3, 2),), _slice_grad,
         attrs("slice_grad", axis=1, start=1, stop=4, size=6), exact=True),
    Case("concat", (f(2, 3, 4), f(2, 1, 4), f(2, 2, 4)), lambda *x: torch.cat(x, 1),
         attrs("concat", axis=1), exact=True, wrt=(0, 1, 2)),
    Case("pad", (f(2, 3, 4, 5),), lambda x: F.pad(x, (1, 0, 2, 3, 0, 1), value=1.5),
         attrs("pad", before=(0, 0, 2, 1), after=(0, 1, 3, 0), value=1.5), exact=True, wrt=(0,)),
    Case("pad", (f(3, 5),), lambda x: F.pad(x, (2, 1)), attrs("pad", before=(0, 2), after=(0, 1)),
         "rows", exact=True, wrt=(0,)),
    Case("relayout", (f(2, 3, 4, 5),), lambda x: x, attrs("relayout", layout="nhwc"),
         exact=True, wrt=(0,)),
]  # fmt: skip


def _draw_loss(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    logits = fill(c.ins[0], g, dtype)
    labels = torch.randint(0, logits.shape[1], logits.shape[:1], generator=g)
    live = 4 if c.note.startswith("live") else logits.shape[0]
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

            ins = (f(7, 5), TensorType(i64, (7,)), TensorType(i32, ()))
            a = {key: value}
            rows += [
                Case(op, ins, loss, attrs(op, **a), note, _draw_loss, wrt=(0,)),
                Case(f"{op}_grad", ins, grad, attrs(f"{op}_grad", **a), note, _draw_loss),
            ]

    def lecture(z, y, live):
        """1/N sum_i sum_{j != y_i} max(0, f_j - f_{y_i} + 1), term by term."""
        terms = [
            torch.clamp(z[i, j] - z[i, y[i]] + 1, min=0)
            for i in range(int(live)) for j in range(z.shape[1]) if j != y[i]
        ]  # fmt: skip
        return torch.stack(terms).sum() / live

    def lecture_grad(z, y, live):
        return pulled_back(lambda v: lecture(v, y, live), [z], z.new_ones(()))[0]

    for op, fn, wrt in (("multi_margin", lecture, (0,)), ("multi_margin_grad", lecture_grad, None)):
        ins = (f(7, 5), TensorType(i64, (7,)), TensorType(i32, ()))
        for note in ("lecture", "live"):
            a = attrs(op, mean=False)
            rows.append(Case(op, ins, fn, a, f"{note}-sum" if note == "live" else note, _draw_loss,
                             wrt=wrt))  # fmt: skip
    return rows


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
            Case("dropout", (f(*shape), scalar, scalar), _dropout(a), a, note, _draw_dropout,
                 wrt=(0,))
        )  # fmt: skip
    return rows


def _draw_sgd(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    tensors = [fill(t, g, dtype) for t in c.ins if t.shape]
    hypers = [0.1, 0.9, 0.01] if len(tensors) == 3 else [0.1, 0.01]
    hypers += {"scaled": [0.03], "first": [0.0], "dampened": [1.0]}.get(c.note, [])
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


def _draw_adam(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    """Operands as they are before the third step: lr, gains, decay, corrections (and l1)."""
    w, grad, m, *squares = (fill(t, g, dtype) for t in c.ins if t.shape)
    hypers = [0.1, 0.1, 0.001, 0.01, 1 - 0.9**3, 1 - 0.999**3]
    hypers = hypers if c.note != "l1" else [*hypers, 0.03]
    scalars = (torch.tensor(h, dtype=dtype) for h in hypers)
    return [w, grad, m, *(v.abs() for v in squares), *scalars]


def _torch_adam(
    kind: Any, lr_mult: float = 1.0, decay_mult: float = 1.0, **kw: bool
) -> Callable[..., Any]:
    slots = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if kw.get("amsgrad") else []))

    def run(w, g, *rest):
        lr, gain1, gain2, wd, _, _, *l1 = rest[len(slots) :]
        p = torch.nn.Parameter(w.clone())
        betas = (float(1 - gain1), float(1 - gain2))
        opt = kind(
            [p], float(lr) * lr_mult, betas, 1e-8, float(wd) * decay_mult, foreach=False, **kw
        )
        opt.state[p] = {n: t.clone() for n, t in zip(slots, rest, strict=False)}
        opt.state[p]["step"] = torch.tensor(2.0, dtype=torch.float64)
        p.grad = g + l1[0] * w.sign() if l1 else g.clone()
        opt.step()
        return p.detach(), *(opt.state[p][n] for n in slots)

    return run


def _torch_dampened(w, g, v, lr, mom, wd, started):
    p = torch.nn.Parameter(w.clone())
    opt = torch.optim.SGD([p], float(lr), float(mom), 0.4, float(wd))
    # torch's first step takes the gradient whole; here it meets a buffer that need not be 0.
    grad = g if started else g + mom * v
    opt.state[p]["momentum_buffer"] = v.clone() if started else None
    p.grad = grad.clone()
    opt.step()
    return p.detach(), opt.state[p]["momentum_buffer"]


def _scaled_sgd(w, g, lr, wd, l1):
    """Rate doubled, penalties at half."""
    return w - 2 * lr * (g + 0.5 * wd * w + 0.5 * l1 * w.sign())


def _draw_rows(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    rows = [torch.tensor(29, dtype=dtype)] if c.note == "mean" else []
    return [*(fill(t, g, dtype) for t in c.ins[:2]), torch.tensor(7, dtype=torch.int32), *rows]


def _draw_clip(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    w = fill(c.ins[0], g, dtype)
    limit = 3.0 if c.note == "within" else 0.5
    return [w, torch.tensor(2.0, dtype=dtype), torch.tensor(limit, dtype=dtype)]


def _torch_clip(w, norm, limit):
    """torch on a gradient of that norm of which w is a part."""
    p, rest = torch.nn.Parameter(w.clone()), torch.nn.Parameter(w.new_zeros(1))
    p.grad = w * (norm / 2 / w.norm())
    rest.grad = (norm**2 - p.grad.norm() ** 2).sqrt()[None]
    torch.nn.utils.clip_grad_norm_([p, rest], float(limit))
    return p.grad * (2 * w.norm() / norm)


def _draw_flags(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    flags = {"one": [-3.5], "fine": [1e30, -2.0], "inf": [1.0, -math.inf]}
    scalars = [torch.tensor(v, dtype=dtype) for v in flags[c.note]]
    return [*(fill(t, g, dtype) for t in c.ins[:2]), *scalars]


def _draw_record(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    numbers = {"held": [2.5, 3.0], "inf": [math.inf, 0.0], "sticky norm": [2.5, 0.0, 7.0]}
    loss, *rest = (torch.tensor(v, dtype=dtype) for v in numbers.get(c.note, [2.5, 0.0]))
    return [fill(c.ins[0], g, dtype), loss, torch.tensor(4095), *rest]


def _sticky_record(ring, loss, step, held, *norm):
    """Behind 4,095 steps: the place of this one is the last, those held back begin at the first."""
    ring = ring.index_fill(0, (step + held.long()) % 4096, float(loss))
    if float(held) or not torch.isfinite(loss):
        return ring, step, held + 1, torch.full_like(loss, math.inf) if float(held) else loss
    return ring, step + 1, held, loss


_W, _S = f(4, 3), f()
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
    *(
        Case("sgd_update", (_W, _W, _W, *(_S,) * 4), _torch_dampened,
             attrs("sgd_update", momentum=True, dampening=0.4), note, _draw_sgd)
        for note in ("first", "dampened")
    ),
    Case("sgd_update", (_W, _W, _S, _S, _S), _scaled_sgd,
         attrs("sgd_update", l1=True, lr_mult=2.0, decay_mult=0.5), "scaled", _draw_sgd),
    *(
        Case("adam_update", (_W,) * 4 + (_S,) * (7 if note == "l1" else 6),
             _torch_adam(kind, *scale), attrs("adam_update", **kw), note, _draw_adam)
        for note, kind, scale, kw in [
            ("", torch.optim.Adam, (), {}),
            ("l1", torch.optim.Adam, (), {"l1": True}),
            ("decoupled", torch.optim.AdamW, (), {"decoupled": True}),
            ("scaled", torch.optim.AdamW, (2.0, 3.0),
             {"decoupled": True, "lr_mult": 2.0, "decay_mult": 3.0}),
            ("plain", torch.optim.Adam, (2.0, 0.0), {"lr_mult": 2.0, "decay_mult": 0.0}),
        ]
    ),
    *(
        Case("adam_update", (_W,) * 5 + (_S,) * 6, _torch_adam(kind, amsgrad=True, maximize=up),
             attrs("adam_update", amsgrad=True, decoupled=decoupled, maximize=up), note, _draw_adam)
        for note, kind, decoupled, up in [
            ("amsgrad", torch.optim.Adam, False, False),
            ("amsgradw", torch.optim.AdamW, True, False),
            ("maximize", torch.optim.Adam, False, True),
        ]
    ),
    Case("adam_debias", (_S,) * 4,
         lambda c1, c2, g1, g2: (1 - (1 - c1) * (1 - g1), 1 - (1 - c2) * (1 - g2))),
    Case("accumulate", (_W, _W, TensorType(i32, ())), lambda a, g, n: a + n * g, draw=_draw_rows),
    Case("accumulate", (_W, _W, TensorType(i32, ()), _S), lambda a, g, n, rows: (a + n * g) / rows,
         note="mean", draw=_draw_rows),
    Case("global_norm", (_W, f(5), f(70, 31)),
         lambda *g: torch.cat([x.flatten() for x in g]).norm()),
    *(
        Case("clip", (_W, _S, _S), _torch_clip, note=note, draw=_draw_clip)
        for note in ("", "within")
    ),
    *(
        Case("if_finite", (_W, _W, *(_S,) * (1 + (note != "one"))),
             lambda new, old, *s: new if all(map(torch.isfinite, s)) else old, note=note,
             draw=_draw_flags, exact=True)
        for note in ("one", "fine", "inf")
    ),
    Case("record_step", (f(4096), _S, TensorType(i64, ()), _S),
         lambda ring, loss, step, norm: (ring.index_fill(0, step % 4096, float(loss)), step + 1),
         note="norm", exact=True),
    Case("record_step", (f(4096), _S, TensorType(i64, ())),
         lambda ring, loss, step: (ring.index_fill(0, step % 4096, float(loss)), step + 1),
         exact=True),
    *(
        Case("record_step", (f(4096), _S, TensorType(i64, ()), *scalars), _sticky_record,
             attrs("record_step", sticky=True), note, _draw_record, exact=True)
        for note, *scalars in [
            ("sticky", _S), ("sticky norm", _S, _S), ("held", _S), ("inf", _S)
        ]
    ),
]  # fmt: skip

def _collective_rows() -> list[Case]:
    """Of one rank, for which each is the identity; several are in tests/null/test_ranks.py."""
    return [
        Case("all_reduce", (f(2, 3), f(4)), lambda a, b: (a, b), exact=True),
        Case("all_gather", (f(2, 3),), lambda a: a, attrs("all_gather", axis=1), exact=True),
        Case("reduce_scatter", (f(2, 3),), lambda a: a, attrs("reduce_scatter", axis=1),
             exact=True),
        Case("own_part", (f(2, 3),), lambda a: a, attrs("own_part", axis=1), exact=True),
    ]  # fmt: skip


CASES = [
    *_collective_rows(),
    *ELEMENTWISE, *SOFTMAX, *PRODUCTS, *norm_rows(), *pool_rows(), *lrn_rows(), *MOVES,
    *_loss_rows(), *_dropout_rows(), *augment_rows(), *take_rows(), *UPDATES,
]  # fmt: skip
