"""Building `fused` equations: two equations become one body. The rules stand in `fuse_*.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from graphnet.ir.graph import Eqn, Graph, Input, Value, Where, rename_body
from graphnet.ir.op import get_op
from graphnet.passes.rewrite import Match
from graphnet.passes.templates import refusal


def _inline(eqn: Eqn, prefix: str) -> list[Eqn]:
    """The equations of `eqn` under outer names: its results keep their outer values."""
    if eqn.body is None:
        return [eqn]
    env: dict[Value, Value] = dict(zip(eqn.body.input_values, eqn.inputs, strict=True))
    for inner, outer in zip(eqn.body.returns, eqn.results, strict=True):
        env[inner] = outer
    out = []
    for k, e in enumerate(eqn.body.eqns):
        for j, v in enumerate(e.outputs):
            if v is not None and v not in env:
                env[v] = Value(f"{prefix}{k}_{j}", v.type)
        outputs = tuple(None if v is None else env[v] for v in e.outputs)
        out.append(Eqn(e.op, tuple(env[v] for v in e.inputs), outputs, e.attrs, None, e.where))
    return out


def _read(eqn: Eqn, used: set[Value]) -> tuple[Value | None, ...]:
    optional = get_op(eqn.op).optional
    return tuple(v if v in used or k not in optional else None for k, v in enumerate(eqn.outputs))


def merge(producer: Eqn, consumer: Eqn, keep: set[Value]) -> Eqn:
    """One fused equation doing both. `keep` are the producer's results that are still read.

    The results are the kept ones, then the consumer's.
    """
    eqns = _inline(producer, "p.") + _inline(consumer, "c.")
    made = {v for e in eqns for v in e.results}
    operands = tuple(dict.fromkeys(v for e in eqns for v in e.inputs if v not in made))
    results = tuple(v for v in producer.results if v in keep) + consumer.results
    # An optional result that only the outside would read, and does not, is not written.
    used = {v for e in eqns for v in e.inputs} | set(results)
    eqns = [replace(e, outputs=_read(e, used)) for e in eqns]
    body = Graph("body", tuple(Input(v) for v in operands), tuple(eqns), results)
    where = Where()
    return Eqn("fused", operands, results, body=rename_body(body, operands), where=where)


def kept(m: Match) -> set[Value]:
    """Results of the inner equation that somebody besides the root reads."""
    escaping = m.graph.escaping
    return {
        v
        for v in m.inner.results
        if v in escaping or any(r is not m.root for r in m.readers.get(v, ()))
    }


def build_merge(m: Match, fresh: Callable[[], str]) -> list[Eqn]:
    """`build` of every rule that joins a producer with its consumer."""
    return [merge(m.inner, m.root, kept(m))]


def fits(m: Match) -> str | None:
    """`guard` of the same rules: a template must take the body."""
    body = merge(m.inner, m.root, kept(m)).body
    assert body is not None
    return refusal(body)
