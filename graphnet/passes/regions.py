"""Row regions: several equations as the stages of one launch, where images and channels are few.

A region is a `fused` equation whose body holds several anchors, each with its elementwise code. A
program of its kernel owns some images and runs one stage after the other on them, so what passes
from stage to stage never leaves a processor's cache, and nothing is launched in between. Only what
is local to an image can be a stage; sums over the batch end in a second pass.

The rules here join a producer with its consumer, and the driver keeps them legal: what is read
elsewhere stays a result, and no cycle closes. The kernels of the target say which stages there are
and whether one launch is faster than two (`Kernels.joins`, lowering/launch/region.py). For another
op to take part it needs a stage there, and a rule here.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import product

from graphnet.ir.graph import Graph
from graphnet.passes.fuse import build_merge, kept, merge
from graphnet.passes.layout import Kernels
from graphnet.passes.rewrite import Log, Match, P, Rule, rewrite

_POOLS = ("maxpool2d", "avgpool2d")
_LINEAR = ("linear", "linear_dgrad")
_LOSSES = ("cross_entropy", "multi_margin")
_BACKWARD = ("maxpool2d_grad", "avgpool2d_grad", "conv2d_dgrad", "conv2d_wgrad")


def regions(
    graph: Graph, kernels: Kernels | None, log: Log, disabled: Collection[str] = ()
) -> Graph:
    """The graph with regions; a target without kernels of ours (cpu) gets it unchanged."""
    if kernels is None:
        return graph
    for table in _tables(kernels):
        graph = rewrite(graph, table, log=log, disabled=disabled)
    return graph


def _tables(kernels: Kernels) -> list[list[Rule]]:
    """The rules, those first that make what others extend."""

    def pays(m: Match) -> str | None:
        return kernels.joins(merge(m.inner, m.root, kept(m)), (m.inner, m.root))

    def rule(outer: str, inner: str) -> Rule:
        pattern = P((f"anchor:{outer}",), P((f"anchor:{inner}",)))
        return Rule(f"{outer}({inner}(...)) => region", pattern, build_merge, pays, keeps=True)

    back = [rule(outer, inner) for outer in _BACKWARD for inner in _BACKWARD]
    rows = [rule(*pair) for pair in product((*_LOSSES, *_LINEAR), (*_LINEAR, *_LOSSES))]
    return [[rule(pool, "conv2d") for pool in _POOLS], [rule("conv2d", "conv2d")], back, rows]
