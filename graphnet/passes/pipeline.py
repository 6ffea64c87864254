"""The whole pass pipeline, on one screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphnet import config
from graphnet.ir.graph import Graph
from graphnet.ir.verify import verify
from graphnet.ops.gradient import Handling
from graphnet.passes.autodiff import autodiff, pullback
from graphnet.passes.dce import cse, dce
from graphnet.passes.fuse_epilogue import CHAINS, EPILOGUES, MOVES
from graphnet.passes.fuse_loss import fuse_pairs
from graphnet.passes.fuse_lrn import RULES as NORMS
from graphnet.passes.fuse_statistics import fuse_statistics
from graphnet.passes.fuse_update import COPIES, RULES
from graphnet.passes.layout import Kernels, layout
from graphnet.passes.observe import Observer
from graphnet.passes.precision import precision
from graphnet.passes.regions import regions
from graphnet.passes.rewrite import Log, rewrite
from graphnet.passes.shard import shard


@dataclass
class Stages:
    """The graph after each stage, and what the rewrite rules did and refused."""

    traced: Graph
    joint: Graph
    fused: Graph
    log: Log = field(default_factory=Log)

    def graph(self, stage: str) -> Graph:
        return {"traced": self.traced, "joint": self.joint, "fused": self.fused}[stage]


def run(
    traced: Graph,
    *,
    precision: str = "fp32",
    optimizer: Any = None,
    grads: bool = False,
    kernels: Kernels | None = None,
    trainable: Sequence[str] = (),
    multipliers: Mapping[str, tuple[float, float]] | None = None,
    handling: Handling | None = None,
    wrt: Sequence[str] | None = None,
    ranks: int = 1,
    reduce: str | None = None,
    towers: int = 1,
    disabled: Sequence[str] = (),
) -> Stages:
    """traced -> joint -> fused.

    wrt       names of inputs: the graph of `pullback`, in the place of one with a loss
    ranks     how many processes share the rows of the step
    reduce    "bf16": their gradients are summed as bf16
    towers    how many share its channels
    kernels   whose layouts the graph gets; None for a target without kernels of ours
    disabled  names of passes or rules, as in GRAPHNET_DISABLE
    """
    log, off = Log(), {*disabled, *config.disabled()}
    train = optimizer is not None or grads

    def differentiate(g: Graph) -> Graph:
        if wrt is not None:
            return pullback(g, wrt)
        if not train:
            return g
        return autodiff(
            g, trainable=trainable, optimizer=optimizer, grads=grads, multipliers=multipliers,
            handling=handling, ranks=ranks, reduce=reduce,
        )  # fmt: skip

    def rules(*tables: Sequence) -> Callable[[Graph], Graph]:
        return lambda g: rewrite(g, [r for t in tables for r in t], log=log, disabled=off)

    # name, takes, gives, pass
    passes: list[tuple[str, str, str, Callable[[Graph], Graph]]] = [
        *([("shard", "traced", "traced", lambda g: shard(g, towers))] if towers > 1 else []),
        ("autodiff", "traced", "joint", differentiate),
        ("precision", "joint", "joint", lambda g: _precision(g, precision)),
        ("moves", "joint", "joint", rules(MOVES)),
        ("clean", "joint", "joint", lambda g: dce(cse(g))),
        ("fuse_pairs", "joint", "fused", lambda g: fuse_pairs(g, log)),
        ("fuse_epilogues", "fused", "fused", rules(EPILOGUES, NORMS)),
        ("fuse_updates", "fused", "fused", rules(RULES)),
        ("fuse_copies", "fused", "fused", rules(COPIES)),
        ("fuse_chains", "fused", "fused", rules(CHAINS)),
        ("regions", "fused", "fused", lambda g: regions(g, kernels, log, off)),
        ("layout", "fused", "fused", lambda g: layout(g, kernels)),
        ("dce", "fused", "fused", dce),
        ("fuse_statistics", "fused", "fused", lambda g: fuse_statistics(g, kernels, log, off)),
    ]
    # Missed fusions are an error only of the full pipeline.
    strict = not off
    stages: dict[str, Graph] = {"traced": verify(traced, "traced")}
    observer, graph = Observer(traced, log), traced
    for number, (name, _, gives, apply) in enumerate(passes, 1):
        if name in off:
            stages[gives] = graph
            continue
        before, graph = graph, apply(graph)
        last = number == len(passes)
        verify(graph, gives, fusing=strict and last)
        stages[gives] = observer.passed(number, name, before, graph)
    fused = _rename(graph)
    return Stages(traced, stages["joint"], fused, log)


_precision = precision


def _rename(graph: Graph) -> Graph:
    from dataclasses import replace

    return replace(graph, name=f"{graph.name.split('.')[0]}.fused")

