"""Rows of the table of cases: batch normalization."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from graphnet.ir.types import TensorType, i32, i64
from tests.case import Case, Tensors, attrs, f, fill, pulled_back

_LIVE, _COUNT = TensorType(i32, ()), TensorType(i64, ())


def _drawn(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    """Variances are positive, five batches were counted, of `dead` rows the last one is."""
    out = []
    for k, t in enumerate(c.ins):
        if t == _LIVE:
            live = 0 if c.note == "none" else c.ins[0].shape[0] - ("dead" in c.note)
            out.append(torch.tensor(live, dtype=torch.int32))
        elif t == _COUNT:
            out.append(torch.tensor(5))
        else:
            v = fill(t, g, dtype)
            positive = c.op == "normalize" and k == (2 if c.attrs.centred else 1)  # type: ignore[attr-defined]
            positive |= c.op in ("batch_norm", "batch_norm_gather_stats") and k == len(c.ins) - 2
            positive |= c.op == "batch_norm_elemt" and k == 2
            out.append(v.abs() + 0.3 if positive else v * 0.7 + 0.4)
    if c.op == "batch_norm_grad":
        live = int(out[4])
        out[0][live:] = 0
        axes = [d for d in range(out[1].ndim) if d != 1]
        out[2] = out[1][:live].mean(axes)
        out[3] = out[1][:live].var(axes, correction=0)
    if c.op == "batch_norm_gather_stats":
        ranks = c.ins[0].shape[0]
        out[0][:, 0] = torch.arange(ranks)[:, None] * 3  # the first rank has no rows
        out[0][0] = 0
        out[0][:, 2] = out[0][:, 2].abs()
    if c.op in ("batch_norm_grad_reduce", "batch_norm_grad_elemt"):
        live, axes = int(out[4]), [d for d in range(out[1].ndim) if d != 1]
        out[2] = out[1][:live].mean(axes)
        out[3] = out[1][:live].var(axes, correction=0)
    if c.op == "batch_norm_grad_elemt":
        dy, x = out[0][:live], out[1][:live]
        view = [1, -1] + [1] * (x.ndim - 2)
        xhat = (x - out[2].view(view)) / (out[3].view(view) + c.attrs.eps).sqrt()  # type: ignore[attr-defined]
        out[6], out[7] = (dy * xhat).sum(axes), dy.sum(axes)
    return out


def _forward(a: Any) -> Any:
    def run(x: torch.Tensor, live: torch.Tensor, *rest: torch.Tensor) -> Any:
        scale, shift, *running = rest if a.affine else (None, None, *rest)
        n = int(live)
        axes = [d for d in range(x.ndim) if d != 1]
        var, mean = torch.var_mean(x[:n], axes, correction=0)
        y = F.batch_norm(x[:n], None, None, scale, shift, True, 0.0, a.eps)
        if n < len(x):
            dead = F.batch_norm(x[n:], mean.detach(), var.detach(), scale, shift, False, 0.0, a.eps)
            y = torch.cat((y, dead.detach()))
        if not a.track:
            return y, mean, var
        old_mean, old_var = (v.detach().clone() for v in running[:2])
        share = 1 / (int(running[2]) + 1) if a.cumulative else a.momentum
        F.batch_norm(x[:n].detach(), old_mean, old_var, None, None, True, share, a.eps)
        return y, mean, var, old_mean, old_var, running[2] + 1

    return run


def norm_rows() -> list[Case]:
    rows = []
    for note, shape, kw in [
        ("", (3, 5, 4, 2), {}),
        ("plain", (3, 8, 5, 5), {"affine": False, "track": False}),
        ("dead", (4, 5, 3, 3), {"eps": 1e-3}),
        ("cumulative", (4, 16, 2, 3), {"cumulative": True}),
        ("matrix", (17, 9), {"momentum": 0.3}),
    ]:
        a: Any = attrs("batch_norm", **kw)
        vectors = (f(shape[1]),) * (2 * a.affine + 2 * a.track) + (_COUNT,) * a.track
        # Rows that are not live have no gradient in the oracle, and none is defined.
        wrt = None if note == "dead" else (0, 2, 3) if a.affine else (0,)
        rows.append(
            Case("batch_norm", (f(*shape), _LIVE, *vectors), _forward(a), a, note, _drawn, wrt=wrt)
        )
        b = attrs("batch_norm_grad", eps=a.eps, affine=a.affine)

        def grad(dy, x, mean, var, live, *weight, b=b):
            n = int(live)
            w = weight[0] if weight else torch.ones_like(mean)
            run = lambda x, w, s: F.batch_norm(x, None, None, w, s, True, 0.0, b.eps)
            dx, dw, ds = pulled_back(run, [x[:n], w, torch.zeros_like(w)], dy[:n])
            return torch.cat((dx, x.new_zeros(x[n:].shape))), dw, ds

        ins = (f(*shape), f(*shape), f(shape[1]), f(shape[1]), _LIVE, *(f(shape[1]),) * b.affine)
        rows.append(Case("batch_norm_grad", ins, grad, b, note, _drawn))
    for note, shape, kw in [
        ("", (3, 5, 4, 2), {}),
        ("plain", (3, 8, 5, 5), {"affine": False}),
        ("scale", (3, 8, 5, 5), {"centred": False}),
        ("matrix", (7, 9), {"eps": 1e-3}),
    ]:
        a = attrs("normalize", **kw)

        def run(x, *v, a=a):
            mean, var, *rest = v if a.centred else (torch.zeros_like(v[0]), *v)
            scale, shift = (*rest, None, None)[:2]
            return F.batch_norm(x, mean, var, scale, shift, False, 0.0, a.eps)

        ins = (f(*shape), *(f(shape[1]),) * ((1 + a.centred) * (1 + a.affine)))
        wrt = None if not a.centred else (0, 3, 4) if a.affine else (0,)
        rows.append(Case("normalize", ins, run, a, note, _drawn, wrt=wrt))
    return [*rows, *_sync_rows()]


def _whole_gradient(eps: float) -> Any:
    """torch's gradients of x, weight and bias, where the rows of one rank are all there are."""

    def run(dy, x, live, weight):
        n = int(live)
        w = torch.ones(x.shape[1], dtype=x.dtype) if weight is None else weight
        norm = lambda x, w, s: F.batch_norm(x, None, None, w, s, True, 0.0, eps)
        dx, *sums = pulled_back(norm, [x[:n], w, torch.zeros_like(w)], dy[:n])
        return torch.cat((dx, x.new_zeros(x[n:].shape))), *sums

    return run


def _joined(known, *running):
    """By the sum and the sum of squares of all."""
    n, mean, squares = known.unbind(1)
    count = float(n[:, 0].sum())
    total, power = (n * mean).sum(0), (squares + n * mean**2).sum(0)
    whole, var = total / count, power / count - (total / count) ** 2
    if not running:
        return whole, var
    unbiased = var * count / (count - 1)
    return whole, var, 0.9 * running[0] + 0.1 * whole, 0.9 * running[1] + 0.1 * unbiased, (
        running[2] + 1
    )  # fmt: skip


def _told(x, live):
    rows = x[: int(live)].transpose(0, 1).flatten(1)
    if not rows.shape[1]:
        return x.new_zeros(1, 3, x.shape[1])
    var, mean = torch.var_mean(rows, 1, correction=0)
    n = rows.shape[1]
    return torch.stack((torch.full_like(mean, n), mean, var * n))[None]


def _sync_rows() -> list[Case]:
    rows = []
    for note, shape in [("", (3, 5, 4, 2)), ("dead", (4, 8, 3, 3)), ("none", (3, 5, 2, 2)),
                        ("matrix", (17, 9))]:  # fmt: skip
        c, image = f(shape[1]), f(*shape)
        rows.append(Case("batch_norm_stats", (image, _LIVE), _told, note=note, draw=_drawn))
        if note == "none":
            continue
        a: Any = attrs("batch_norm_elemt", affine=note != "dead", eps=1e-3)

        def run(x, mean, var, live, all_, *v, a=a):
            return F.batch_norm(x, mean, var, *(v or (None, None)), False, 0.0, a.eps)

        ins = (image, c, c, _LIVE, _LIVE, *(c, c) * a.affine)
        rows.append(Case("batch_norm_elemt", ins, run, a, note, _drawn))
        whole = _whole_gradient(a.eps)
        reduce = lambda dy, x, mean, var, live, whole=whole: whole(dy, x, live, None)[1:]
        rows.append(
            Case("batch_norm_grad_reduce", (image, image, c, c, _LIVE), reduce,
                 attrs("batch_norm_grad_reduce", eps=a.eps), note, _drawn)
        )  # fmt: skip

        def grad(dy, x, mean, var, live, all_, p, s, *w, whole=whole):
            return whole(dy, x, live, w[0] if w else None)[0]

        ins = (image, image, c, c, _LIVE, _LIVE, c, c, *(c,) * a.affine)
        b = attrs("batch_norm_grad_elemt", eps=a.eps, affine=a.affine)
        rows.append(Case("batch_norm_grad_elemt", ins, grad, b, note, _drawn))
    for note, ranks, channels, kw in [
        ("", 3, 5, {}), ("many", 35, 40, {}), ("plain", 2, 9, {"track": False})
    ]:
        a = attrs("batch_norm_gather_stats", **kw)
        c = f(channels)
        ins = (f(ranks, 3, channels), *(c, c, _COUNT) * a.track)
        rows.append(Case("batch_norm_gather_stats", ins, _joined, a, note, _drawn))
    return rows
