"""The loss and its gradient read the same logits: one kernel, and no probabilities in memory.

The two are siblings, not a chain, so this is a small pass of its own and not a rule of the driver.
"""

from __future__ import annotations

from dataclasses import replace

from graphnet.ir.graph import Graph
from graphnet.passes.fuse import merge
from graphnet.passes.rewrite import Log, order
from graphnet.passes.templates import TEMPLATES, refusal


def fuse_pairs(graph: Graph, log: Log) -> Graph:
    """Joins each anchor with its pair where both read the same operands."""
    for first, template in TEMPLATES.items():
        if template.pair is None:
            continue
        name = f"{first}(z), {template.pair}(z) => fused"
        for a in [e for e in graph.eqns if e.op == first]:
            twins = [e for e in graph.eqns if e.op == template.pair and e.inputs == a.inputs]
            if not twins:
                continue
            fused = merge(a, twins[0], set(a.results))
            assert fused.body is not None
            if why := refusal(fused.body):
                log.refusals[name, str(a.out)] = why
                continue
            log.hits[name] = log.hits.get(name, 0) + 1
            fused = replace(fused, where=a.where.merged(twins[0].where, name))
            eqns = [fused if e is twins[0] else e for e in graph.eqns if e is not a]
            graph = replace(graph, eqns=order(eqns, graph))
    return graph
