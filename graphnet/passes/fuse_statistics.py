"""Batch normalization joins the convolution before it: its statistics are kept in the convolution's
epilogue, in parts, so that no pass of their own reads the result.

The fused equation is no single kernel. It is the convolution with the moments of its tiles, the
launch that joins them, and the pass that normalises (lowering/launch/moments.py). The result of the
convolution stays a result: that pass reads it, and so does the gradient. It runs behind the layout
pass, because the kernel that was chosen says whether it can keep moments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from graphnet.ir.graph import Eqn, Graph
from graphnet.passes.fuse import merge
from graphnet.passes.layout import Kernels
from graphnet.passes.rewrite import Log, Match, P, Rule, rewrite
from graphnet.passes.templates import anchors_of


def fuse_statistics(
    graph: Graph, kernels: Kernels | None, log: Log, disabled: Collection[str] = ()
) -> Graph:
    """The graph with statistics in convolutions; a target without kernels of ours (cpu) gets it
    unchanged."""
    if kernels is None:
        return graph

    def guard(m: Match) -> str | None:
        return _shape(m) or kernels.keeps(m.inner)

    pattern = P(("anchor:batch_norm",), P(("anchor:conv2d",)))
    rule = Rule("batch_norm(conv2d(...)) => fused", pattern, _build, guard, keeps=True)
    return rewrite(graph, [rule], log=log, disabled=disabled)


def _build(m: Match, fresh: Callable[[], str]) -> list[Eqn]:
    return [merge(m.inner, m.root, set(m.inner.results))]


def _shape(m: Match) -> str | None:
    """Why the equations do not fit together, whatever the kernels can do."""
    (norm, *more) = anchors_of(m.root)
    inner = m.root.body.input_values if m.root.body is not None else m.root.inputs
    outer = dict(zip(inner, m.root.inputs, strict=True))
    if more or len(anchors_of(m.inner)) > 1:
        return "another kernel is joined with one of them"
    if outer[norm.inputs[0]] != m.edges[0]:
        return "what is normalised is another value"
    beside = [e.op for e in m.root.plain if e is not norm and norm.inputs[0] in e.inputs]
    if beside:
        return f"{beside[0]} reads the convolution beside batch_norm"
    return None
