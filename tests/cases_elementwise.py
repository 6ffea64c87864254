"""Rows of the table of cases: functions, arithmetic with broadcasting, casts, softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.case import Case, Tensors, attrs, f, fill, pulled_back

Function = Callable[[torch.Tensor], torch.Tensor]
# Each function: torch's, and where its gradient reads the output, an input that leads to one.
_UNARY: dict[str, tuple[Function, Function | None]] = {
    "relu": (torch.relu, lambda y: y),
    "tanh": (torch.tanh, torch.atanh),
    "sigmoid": (torch.sigmoid, torch.logit),
    "leaky_relu": (F.leaky_relu, lambda y: torch.where(y > 0, y, y * 100)),
    "relu6": (F.relu6, lambda y: y),
    "hardswish": (F.hardswish, None),
    "silu": (F.silu, None),
    "gelu": (F.gelu, None),
    "sqrt": (torch.sqrt, torch.square),
    "exp": (torch.exp, torch.log),
    "abs": (torch.abs, None),
    "clamp": (torch.clone, None),
}
# Further attributes of a function, with what they mean in torch.
_MORE: list[tuple[str, str, dict[str, Any], Function]] = [
    ("leaky_relu", "steep", {"slope": 0.3}, lambda x: F.leaky_relu(x, 0.3)),
    ("gelu", "tanh", {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    ("clamp", "both", {"low": -0.7, "high": 3.3}, lambda x: x.clamp(-0.7, 3.3)),
    ("clamp", "low", {"low": 0.4}, lambda x: x.clamp(min=0.4)),
]


def _draw_wide(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    """Values between -9.4 and 9.4, on all sides of the kinks; between 0 and 2.1 for the root."""
    x, *dy = (fill(t, g, dtype) for t in c.ins)
    return [x.abs() + 0.1 if c.op.startswith("sqrt") else x * 4.7, *dy]


def _draw_grad(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    x, dy = _draw_wide(c, g, dtype)
    name = c.op.removesuffix("_grad")
    fn, inverse = _UNARY[name]
    if name in ("tanh", "sigmoid"):
        x = x / 4.7
    if name == "leaky_relu" and c.note:
        return [_MORE[0][3](x), dy]
    return [x if inverse is None else fn(x), dy]


def _function_rows() -> list[Case]:
    shape = f(2, 3, 5, 7)
    rows = [(n, "", {}, fn, back) for n, (fn, back) in _UNARY.items()]
    rows += [(n, note, kw, fn, _UNARY[n][1]) for n, note, kw, fn in _MORE]
    out = []
    for n, note, kw, fn, back in rows:
        if note == "steep":
            back = lambda y: torch.where(y > 0, y, y / 0.3)

        def pulled(v, dy, fn=fn, back=back):
            return pulled_back(fn, [v if back is None else back(v)], dy)[0]

        exact = n in ("relu", "abs")
        out += [
            Case(n, (shape,), fn, attrs(n, **kw), note, _draw_wide, exact, (0,)),
            Case(f"{n}_grad", (shape,) * 2, pulled, attrs(n, **kw), note, _draw_grad, exact),
        ]
    return out


# The operands of add, sub, mul and div that differ in shape, both ways round.
_BROADCAST = {
    "pixels": ((2, 3, 4, 5), (3, 1, 1)), "whole": ((2, 3, 4, 5), (1, 3, 1, 1)),
    "gate": ((2, 3, 4, 5), (2, 3, 1, 1)), "rows": ((6, 5), (5,)), "one": ((2, 3, 4, 5), (1,)),
    "turned": ((3, 1, 1), (2, 3, 4, 5)), "turnedrows": ((5,), (6, 5)),
}  # fmt: skip


def _binary_rows() -> list[Case]:
    out = []
    for op in ("add", "sub", "mul", "div"):
        fn = getattr(torch, op)
        out += [
            Case(op, (f(2, 3, 4, 5),) * 2, fn, draw=_draw_binary, wrt=(0, 1)),
            Case(op, (f(6, 5), f()), fn, note="scalar", draw=_draw_binary, wrt=(0, 1)),
        ]
        out += [
            Case(op, (f(*a), f(*b)), fn, note=note, draw=_draw_binary, wrt=(0, 1))
            for note, (a, b) in _BROADCAST.items()
        ]
    return out


def _draw_binary(c: Case, g: torch.Generator, dtype: torch.dtype) -> Tensors:
    """A divisor is not near 0."""
    a, b = (fill(t, g, dtype) for t in c.ins)
    return [a, b.abs() + 0.6]


def _summed(*axes: int) -> Function:
    return lambda x: x.sum(axes)


def nearest_tf32(x: torch.Tensor) -> torch.Tensor:
    """11 significant bits, by arithmetic: halves go to the even neighbour."""
    mantissa, exponent = np.frexp(x.float().numpy().astype(np.float64))
    return torch.from_numpy(np.ldexp(np.rint(mantissa * 2048), exponent - 11)).to(x.dtype)


ELEMENTWISE = [
    *_function_rows(),
    *_binary_rows(),
    Case("neg", (f(2, 3, 4, 5),), torch.neg, exact=True, wrt=(0,)),
    Case("sum_to", (f(4, 5, 3, 7),), lambda x: x.sum((0, 2, 3), keepdim=True)[0],
         attrs("sum_to", shape=(5, 1, 1)), "channels"),
    Case("sum_to", (f(4, 5, 3, 7),), lambda x: x.sum((2, 3), keepdim=True),
         attrs("sum_to", shape=(4, 5, 1, 1)), "pixels"),
    Case("sum_to", (f(70, 90),), _summed(0), attrs("sum_to", shape=(90,)), "rows"),
    Case("sum_to", (f(3, 7, 40, 30),), torch.sum, attrs("sum_to", shape=()), "all",
         lambda c, g, dtype: [fill(c.ins[0], g, dtype).abs()]),
    Case("cast", (f(3, 5),), lambda x: x, attrs("cast", dtype="f32"), exact=True, wrt=(0,)),
    Case("round_tf32", (f(2, 3, 4, 5),), nearest_tf32, exact=True),
    Case(
        "full", (), lambda: torch.full((2, 3), 0.25),
        attrs("full", value=0.25, shape=(2, 3), dtype="f32"), exact=True,
    ),
]  # fmt: skip


def _softmax_rows() -> list[Case]:
    out = []
    for op, fn in (("softmax", F.softmax), ("log_softmax", F.log_softmax)):
        rows = (("", (7, 10), 1), ("channels", (2, 5, 3, 4), 1), ("rows", (2, 5, 3, 4), 2),
                ("columns", (2, 5, 3, 4), 3), ("last", (3, 4, 5), 2))  # fmt: skip
        for note, shape, axis in rows:
            whole, how = lambda x, fn=fn, axis=axis: fn(x, axis), attrs(op, axis=axis)

            def pulled(y, dy, op=op, whole=whole):
                return pulled_back(whole, [y.log() if op == "softmax" else y], dy)[0]

            def draw(c, g, dtype, whole=whole):
                return [whole(fill(c.ins[0], g, dtype)), fill(c.ins[0], g, dtype)]

            out += [
                Case(op, (f(*shape),), whole, how, note, wrt=(0,)),
                Case(f"{op}_grad", (f(*shape),) * 2, pulled, how, note, draw),
            ]
    return out


SOFTMAX = _softmax_rows()
