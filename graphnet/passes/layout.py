"""The layout pass: the only writer of layouts.

Activations of the convolutional part go channels-last where the channels fill 16-byte loads;
what a reshape reads or writes, what leaves the graph, and inputs stay row-major, so that a flatten
is a view. Kernels address operands by stride, so no pair of layouts needs a relayout here.
"""

from __future__ import annotations

from dataclasses import replace

from graphnet.ir.graph import Eqn, Graph, Input, Value
from graphnet.ir.types import NHWC

CHANNELS = 8  # 16 bytes of bf16


def _pinned(graph: Graph) -> set[Value]:
    """Values that must be row-major."""
    out = set(graph.input_values) | graph.escaping()
    for e in graph.eqns:
        if e.op in ("reshape", "relayout", "concat", "slice", "slice_grad"):
            out.update((*e.inputs, *e.results))
    return out


def layout(graph: Graph, target: str) -> Graph:
    """The graph with storage chosen; the cpu target plans its own and gets it unchanged."""
    if target == "cpu":
        return graph
    pinned = _pinned(graph)
    env: dict[Value, Value] = {}
    for e in graph.eqns:
        for v in e.results:
            shape = v.type.shape
            if len(shape) == 4 and shape[1] % CHANNELS == 0 and v not in pinned:
                env[v] = Value(v.name, v.type.with_layout(NHWC))
    if not env:
        return graph
    return replace(graph, eqns=tuple(_relabel(e, env) for e in graph.eqns))


def _relabel(eqn: Eqn, env: dict[Value, Value]) -> Eqn:
    swap = lambda v: None if v is None else env.get(v, v)
    body = eqn.body
    inputs = tuple(env.get(v, v) for v in eqn.inputs)
    if body is not None:
        inner = dict(zip(body.input_values, inputs, strict=True))
        for ret, out in zip(body.returns, eqn.results, strict=True):
            inner[ret] = Value(ret.name, ret.type.with_layout(env.get(out, out).type.layout))
        eqns = tuple(_relabel(e, inner) for e in body.eqns)
        returns = tuple(inner.get(v, v) for v in body.returns)
        body = replace(body, inputs=tuple(Input(v) for v in inputs), eqns=eqns, returns=returns)
    return replace(eqn, inputs=inputs, outputs=tuple(map(swap, eqn.outputs)), body=body)
