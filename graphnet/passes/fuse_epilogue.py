"""Elementwise code moves into the kernel that makes its operand, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.op import get_op
from graphnet.passes.fuse import build_merge, fits
from graphnet.passes.rewrite import Match, P, Rule
from graphnet.passes.templates import anchor_of


def _joining(m: Match) -> str:
    """The name of a rule that joins two equations, with the ops that meet."""
    outer = next(e.op for e in m.root.plain if m.edges[0] in e.inputs)
    inner = anchor_of(m.inner) or m.inner.plain[-1].op
    return f"{outer}({inner}(...)) => fused"


def _join(outer: str, inner: str, said: str, keeps: bool = False) -> Rule:
    pattern = P((outer,), P((inner,)))
    return Rule(f"{said} => fused", pattern, build_merge, fits, keeps=keeps, told=_joining)


def _sink_reshape(m: Match, fresh: Callable[[], str]) -> list[Eqn]:
    """act_grad(y, reshape(d)) becomes reshape(act_grad(reshape(y), d)): d's kernel can take it."""
    y, view = m.root.inputs[0], m.inner
    d = view.inputs[0]
    shape = get_op("reshape").attrs_type(shape=d.type.shape)  # type: ignore[call-arg]
    y_view = Value(fresh(), y.type.with_shape(d.type.shape))
    masked = Value(fresh(), d.type)
    return [
        Eqn("reshape", (y,), (y_view,), shape),
        Eqn(m.root.op, (y_view, d), (masked,), m.root.attrs),
        Eqn("reshape", (masked,), m.root.outputs, view.attrs),
    ]


def _grad_of_view(m: Match) -> str | None:
    if m.root.inputs[1] is not m.edges[0] and m.root.inputs[1] != m.edges[0]:
        return "the view is not the incoming gradient"
    return None


def _pool_of(m: Match) -> Eqn | str:
    """The pool whose input is the activation that masks, or why there is none."""
    y, (_, idx) = m.root.inputs[0], m.inner.inputs
    pool = m.producers.get(idx)
    if m.root.inputs[1] != m.edges[0]:
        return "the pool's gradient is not the incoming gradient"
    if pool is None or pool.op != "maxpool2d" or pool.inputs[0] != y:
        return "the mask is not taken from the input of that pool"
    return pool


def _mask_pooled(m: Match, fresh: Callable[[], str]) -> list[Eqn]:
    """Where the gradient lands, the pool's input equals its output: mask the smaller tensor."""
    pool = _pool_of(m)
    assert isinstance(pool, Eqn)
    dy, idx = m.inner.inputs
    masked = Value(fresh(), dy.type)
    return [
        Eqn(m.root.op, (pool.out, dy), (masked,), m.root.attrs),
        Eqn(m.inner.op, (masked, idx), m.root.outputs, m.inner.attrs),
    ]


def _pool_guard(m: Match) -> str | None:
    pool = _pool_of(m)
    return pool if isinstance(pool, str) else None


def _dropped(m: Match) -> Eqn | str:
    """The forward dropout of what masks, with the mask of the incoming gradient's dropout."""
    y, back = m.root.inputs[0], m.inner
    if m.root.inputs[1] != m.edges[0]:
        return "the dropout is not the incoming gradient"
    for e in m.readers.get(y, ()):
        if e is not back and e.op == "dropout" and (e.inputs[1:], e.attrs) == (
            back.inputs[1:], back.attrs
        ):  # fmt: skip
            return e
    return "no dropout with the same mask reads the activation"


def _mask_dropped(m: Match, fresh: Callable[[], str]) -> list[Eqn]:
    """Where dropout keeps a gradient it keeps the activation, and its sign: read that instead."""
    forward = _dropped(m)
    assert isinstance(forward, Eqn)
    dy = Value(fresh(), m.inner.out.type)
    return [
        Eqn("dropout", m.inner.inputs, (dy,), m.inner.attrs),
        Eqn(m.root.op, (forward.out, dy), m.root.outputs, m.root.attrs),
    ]


def _dropped_guard(m: Match) -> str | None:
    found = _dropped(m)
    return found if isinstance(found, str) else None


def _rounded(m: Match) -> Eqn | str:
    """The rounding of what masks, or of the value that it is a view of."""
    y = m.root.inputs[0]
    view = m.producers.get(y)
    for v in (y, view.inputs[0]) if view is not None and view.op == "reshape" else (y,):
        for e in m.readers.get(v, ()):
            if e.op == "round_tf32":
                return e
    return "no product reads what masks, so nobody rounds it"


def _rounded_guard(m: Match) -> str | None:
    found = _rounded(m)
    return found if isinstance(found, str) else None


def _mask_rounded(m: Match, fresh: Callable[[], str]) -> list[Eqn]:
    """Rounding keeps the sign: where a product reads the activation rounded, the mask can."""
    round = _rounded(m)
    assert isinstance(round, Eqn)
    y, views = m.root.inputs[0], []
    if round.inputs[0] == y:
        y = round.out
    else:
        view, y = m.producers[y], Value(fresh(), y.type)
        views = [Eqn("reshape", (round.out,), (y,), view.attrs)]
    return [*views, Eqn(m.root.op, (y, m.root.inputs[1]), m.root.outputs, m.root.attrs)]


def _moving(m: Match) -> str:
    """The name of a rule about the gradient of a function, with the function's own."""
    return m.rule.replace("f_grad", m.root.op)


def _is_one(m: Match) -> str | None:
    one = getattr(m.inner.attrs, "value", None) == 1.0 and m.edges[0] == m.root.inputs[1]
    return None if one else "the factor is not the constant 1"


def _drop_factor(m: Match, fresh: Callable[[], str]) -> list[Eqn]:
    """A view of the same shape, which cleaning removes."""
    x = m.root.inputs[0]
    shape = get_op("reshape").attrs_type(shape=x.type.shape)  # type: ignore[call-arg]
    return [Eqn("reshape", (x,), m.root.outputs, shape)]


# Rewrites that only move things, run before fusing. `f_grad` stands for the gradient of a function.
MOVES = [
    Rule(
        "f_grad(y, dropout(d)) => f_grad(dropout(y), dropout(d))",
        P(("is:sign",), P(("dropout",)), at=1),
        _mask_dropped,
        _dropped_guard,
        told=_moving,
    ),
    Rule(
        "f_grad(y, d) => f_grad(round_tf32(y), d)",
        P(("is:sign",)),
        _mask_rounded,
        _rounded_guard,
        told=_moving,
    ),
    Rule("mul(x, full(1)) => x", P(("mul",), P(("full",))), _drop_factor, _is_one, keeps=True),
    Rule(
        "f_grad(y, maxpool2d_grad(dp, i)) => maxpool2d_grad(f_grad(p, dp), i)",
        P(("is:mask",), P(("maxpool2d_grad",)), at=1),
        _mask_pooled,
        _pool_guard,
        told=_moving,
    ),
    Rule(
        "f_grad(y, reshape(d)) => reshape(f_grad(reshape(y), d))",
        P(("is:mask",), P(("reshape",)), at=1),
        _sink_reshape,
        _grad_of_view,
        told=_moving,
    ),
]

EPILOGUES = [
    _join("is:pointwise", "takes:is:pointwise", "pointwise(kernel(...))"),
    _join("is:rounding", "takes:is:rounding", "rounding(kernel(...))", keeps=True),
    _join("cast", "takes:cast", "cast(augment(...))"),
]
# What has no anchor above it at least shares one kernel.
CHAINS = [
    _join("is:pointwise", "is:pointwise", "pointwise(pointwise(...))"),
    _join("is:rounding", "is:pointwise", "rounding(pointwise(...))", keeps=True),
]
