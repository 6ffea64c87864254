"""Rows of the pools and of local response normalization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from graphnet.ir.op import get_op
from graphnet.ir.types import TensorType, u8
from tests.case import Case, Tensors, attrs, f, fill, pulled_back

# ---- pooling --------------------------------------------------------------------------------


def _maxpool(a: Any) -> Callable[..., torch.Tensor]:
    t, b, le, r = a.padding

    def run(x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (le, r, t, b), value=float("-inf"))
        return F.max_pool2d(padded, a.kernel, a.stride, 0, a.dilation, a.ceil_mode)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, a.kernel, a.stride, (t, le), a.dilation, a.ceil_mode)

    return plain if a.torchs else run


def _avgpool(a: Any) -> Callable[..., torch.Tensor]:
    if not a.torchs:
        t, b, le, r = a.padding

        def run(x: torch.Tensor) -> torch.Tensor:
            inner = [F.pad(v, (le, r, t, b)) for v in (x, torch.ones_like(x))]
            total, count = (F.avg_pool2d(v, a.kernel, a.stride) for v in inner)
            return total if a.count_include_pad else total / count

        return run
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
    return fill(f(*head, *size), torch.Generator().manual_seed(7), dtype)


def pool_rows() -> list[Case]:
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
        ("far", (2, 2, 5, 6), {"kernel": 3, "stride": 1, "padding": 2}),
        ("farsided", (2, 9, 6, 5), {"kernel": (3, 2), "stride": 2, "padding": (2, 1, 0, 1)}),
    ]:
        a: Any = attrs("maxpool2d", **kw)
        fn, y = _maxpool(a), (*x[:2], *a.spatial(x[2:]))

        def grad(dy, idx, fn=fn, x=x):
            return pulled_back(fn, [_image(x[:2], x[2:], dy.dtype)], dy)[0]

        rows += [
            Case("maxpool2d", (f(*x),), lambda x, fn=fn: (fn(x), None), a, note, exact=True,
                 wrt=(0,)),
            Case("maxpool2d_grad", (f(*y), TensorType(u8, y)), grad,
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
        ("picks", (2, 3, 7, 8), {"kernel": 1, "stride": (2, 3)}),
        ("far", (2, 2, 5, 6), {"kernel": 3, "stride": 1, "padding": 2}),
        ("farsided", (2, 9, 6, 5), {"kernel": (3, 2), "stride": 2, "padding": (2, 1, 0, 1),
                                    "count_include_pad": False}),
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
        Case(op, (f(*x),), fn, a, note, wrt=(0,)),
        Case(
            f"{op}_grad", (f(*x[:2], *size),),
            lambda dy: pulled_back(fn, [dy.new_zeros(x)], dy)[0],
            attrs(f"{op}_grad", **fields, input_size=x[2:]), note,
        ),
    ]  # fmt: skip


# ---- local response normalization ------------------------------------------------------------


def _lrn(a: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    # torch always divides alpha by the size.
    alpha = a.alpha * (a.size if a.alpha_mode == "sum" else 1)
    norm = lambda x: F.local_response_norm(x, a.size, alpha, a.beta, a.k)
    return lambda x: torch.cat([norm(part) for part in x.chunk(a.groups, 1)], 1)


def lrn_rows() -> list[Case]:
    rows = []
    for note, x, kw in [
        ("alexnet", (2, 11, 3, 4), {"alpha": 0.3, "k": 2.0}),
        ("paper", (2, 8, 3, 3), {"alpha": 0.05, "k": 2.0, "alpha_mode": "sum"}),
        ("even", (2, 9, 2, 3), {"size": 4, "alpha": 0.4}),
        ("pair", (1, 5, 3, 2), {"size": 2, "alpha": 0.5, "beta": 1.0}),
        ("beta", (2, 7, 2, 2), {"size": 3, "alpha": 0.2, "beta": 0.6, "k": 1.5}),
        ("wide", (2, 4, 3, 3), {"size": 9, "alpha": 0.9, "beta": 0.5}),
        ("groups", (2, 12, 3, 3), {"alpha": 0.4, "groups": 2}),
        ("one", (2, 3, 2, 2), {"size": 1, "alpha": 0.3, "beta": 2.0}),
    ]:
        a = attrs("lrn", **kw)
        fn = _lrn(a)
        rows += [
            Case("lrn", (f(*x),), fn, a, note, wrt=(0,)),
            Case("lrn_grad", (f(*x),) * 2, lambda x, dy, fn=fn: pulled_back(fn, [x], dy)[0], a,
                 note),
        ]  # fmt: skip
    return rows
