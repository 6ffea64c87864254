"""Analyses on networkx: the only place that imports it, inside the functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphnet.ir.graph import Graph
from graphnet.ir.text import eqn_text

if TYPE_CHECKING:
    import networkx


def to_networkx(graph: Graph) -> networkx.DiGraph:
    """Equations (by index) and inputs (by `%name`) as nodes, a value as the edge's `value`."""
    import networkx

    net = networkx.DiGraph(name=graph.name)
    made: dict = {}
    for i in graph.inputs:
        net.add_node(str(i.value), kind="input", role=i.role, label=f"{i.value}: {i.value.type}")
        made[i.value] = str(i.value)
    for at, eqn in enumerate(graph.eqns):
        net.add_node(at, kind="eqn", op=eqn.op, label=eqn_text(eqn), where=str(eqn.where))
        for v in eqn.inputs:
            net.add_edge(made[v], at, value=str(v))
        made.update((v, at) for v in eqn.results)
    return net


def to_dot(graph: Graph) -> str:
    """Graphviz source of the graph."""
    net = to_networkx(graph)
    quote = lambda s: '"' + str(s).replace("\\", "\\\\").replace('"', '\\"') + '"'
    lines = [f"digraph {quote(graph.name)} {{", "  node [shape=box, fontname=monospace];"]
    for node, data in net.nodes(data=True):
        label = data.get("op") or data["label"]
        shape = "ellipse" if data["kind"] == "input" else "box"
        lines.append(f"  {quote(node)} [label={quote(label)}, shape={shape}];")
    for a, b, data in net.edges(data=True):
        lines.append(f"  {quote(a)} -> {quote(b)} [label={quote(data['value'])}];")
    return "\n".join([*lines, "}"]) + "\n"
