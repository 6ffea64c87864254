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
            live = c.ins[0].shape[0] - ("dead" in c.note)
            out.append(torch.tensor(live, dtype=torch.int32))
        elif t == _COUNT:
            out.append(torch.tensor(5))
        else:
            v = fill(t, g, dtype)
            positive = c.op == "normalize" and k == (2 if c.attrs.centred else 1)  # type: ignore[attr-defined]
            positive |= c.op == "batch_norm" and k == len(c.ins) - 2
            out.append(v.abs() + 0.3 if positive else v * 0.7 + 0.4)
    if c.op == "batch_norm_grad":
        live = int(out[4])
        out[0][live:] = 0
        axes = [d for d in range(out[1].ndim) if d != 1]
        out[2] = out[1][:live].mean(axes)
        out[3] = out[1][:live].var(axes, correction=0)
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
    return rows
