"""Cleaning: common subexpressions, dead equations, unread optional results, unread inputs."""

from __future__ import annotations

from dataclasses import replace

from graphnet.ir.graph import Eqn, Graph, Value, substitute
from graphnet.ir.op import get_op

# Pure ops that independent rules write more than once; sharing them is cheap.
_SHARED = ("reshape", "cast", "round_tf32", "full", "relayout")


def cse(graph: Graph) -> Graph:
    """Merges equal views, casts and constants."""
    env: dict[Value, Value] = {}
    seen: dict[tuple, Eqn] = {}
    eqns = []
    for eqn in graph.eqns:
        eqn = substitute(eqn, env)
        key = (eqn.op, eqn.inputs, eqn.attrs)
        if eqn.op in _SHARED and key in seen:
            env[eqn.out] = seen[key].out
            continue
        if eqn.op == "reshape" and eqn.inputs[0].type == eqn.out.type:
            env[eqn.out] = eqn.inputs[0]
            continue
        seen[key] = eqn
        eqns.append(eqn)
    if len(eqns) == len(graph.eqns):
        return graph

    def swap(v: Value) -> Value:
        return env.get(v, v)

    return replace(
        graph,
        eqns=tuple(eqns),
        returns=tuple(map(swap, graph.returns)),
        commits=tuple((old, swap(new)) for old, new in graph.commits),
    )


def dce(graph: Graph) -> Graph:
    """Drops what nobody reads. State inputs stay while a commit names them; data inputs stay."""
    live = set(graph.escaping)
    eqns: list[Eqn] = []
    for eqn in reversed(graph.eqns):
        if not any(v in live for v in eqn.results) and get_op(eqn.op).effect == "none":
            continue
        live.update(eqn.inputs)
        optional = get_op(eqn.op).optional if eqn.body is None else ()
        outs = tuple(
            None if k in optional and v not in live else v for k, v in enumerate(eqn.outputs)
        )
        if eqn.body is not None and any(v not in live for v in eqn.results):
            eqn = _narrow(eqn, live)
            outs = eqn.outputs
        eqns.append(eqn if outs == eqn.outputs else replace(eqn, outputs=outs))
    committed = {old for old, _ in graph.commits}
    inputs = tuple(
        i for i in graph.inputs if i.role == "data" or i.value in live or i.value in committed
    )
    if len(eqns) == len(graph.eqns) and inputs == graph.inputs:
        if all(a is b for a, b in zip(reversed(eqns), graph.eqns, strict=True)):
            return graph
    return replace(graph, inputs=inputs, eqns=tuple(reversed(eqns)))


def _narrow(eqn: Eqn, live: set[Value]) -> Eqn:
    """A fused equation without the results that nobody reads."""
    assert eqn.body is not None
    keep = [k for k, v in enumerate(eqn.outputs) if v in live]
    body = dce(replace(eqn.body, returns=tuple(eqn.body.returns[k] for k in keep)))
    used = {v for e in body.eqns for v in e.inputs} | set(body.returns)
    at = [k for k, i in enumerate(eqn.body.inputs) if i.value in used]
    body = replace(body, inputs=tuple(eqn.body.inputs[k] for k in at))
    return replace(
        eqn,
        inputs=tuple(eqn.inputs[k] for k in at),
        outputs=tuple(eqn.outputs[k] for k in keep),
        body=body,
    )
