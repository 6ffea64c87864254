"""The weight gradient meets its optimizer update: the gradient is never written.

This is the only place that joins `%g` with `*_update`, and with what stands between them: a sum
over steps, clipping, and the guard behind. The driver refuses it when `%g` is also
read by an all-reduce, a global norm or the `add` of a shared parameter; then what follows the norm
is one kernel, and the gradient is written and read.
"""

from __future__ import annotations

import graphnet.ops  # noqa: F401  (fills the registry)
from graphnet.ir.op import all_ops
from graphnet.passes.fuse import build_merge, fits
from graphnet.passes.rewrite import Match, P, Rule
from graphnet.passes.templates import is_update

WGRADS = ("conv2d_wgrad", "linear_wgrad")
UPDATES = tuple(name for name in all_ops() if is_update(name))
# Where the gradient stands among the operands of what takes one.
TAKERS = {"clip": 0, "accumulate": 1, **dict.fromkeys(UPDATES, 1)}


def _joins(m: Match) -> str | None:
    if not any(e.op in TAKERS and e.inputs[TAKERS[e.op]] == m.edges[0] for e in m.root.plain):
        return "the value is not the gradient of the update"
    return fits(m)


def _rule(outer: str, inner: str, pattern: str) -> Rule:
    return Rule(
        f"{outer}(w, {inner}(x, dy)) => fused", P((outer,), P((pattern,))), build_merge, _joins
    )


def _over_ranks(m: Match) -> str | None:
    """Why a reduction over the ranks does not join the update behind it."""
    size = m.edges[0].type.bytes
    return f"{m.edges[0]} is a sum over all ranks: {size:,} bytes are written, summed and read"


# Each consumer of a gradient joins the kernel that makes it, or else the consumer before it.
RULES = [
    *(_rule(u, g, f"anchor:{g}") for g in WGRADS for u in (*TAKERS, "chain")),
    *(_rule(u, t, t) for t in ("clip", "accumulate", "cast") for u in (*TAKERS, "chain") if u != t),
    # A gradient that travels in bf16 is written so.
    *(Rule(f"cast({g}(x, dy)) => fused", P(("cast",), P((f"anchor:{g}",))), build_merge, fits)
      for g in WGRADS),
    *(
        Rule(f"{u}(w, all_reduce(g)) => fused", P((u,), P(("all_reduce",))), build_merge,
             _over_ranks)
        for u in (*TAKERS, "chain")
    ),
    # The guard reads the update's result, in whatever kernel that is.
    *(
        Rule(f"if_finite({name}(...)) => fused", P(("if_finite",), P((op,))), build_merge, fits)
        for name, op in [(g, f"anchor:{g}") for g in WGRADS] + [(u, u) for u in (*UPDATES, "chain")]
    ),
]
# The low-precision copy is written by the kernel that writes the master; both are results. So is a
# count that the updates read, and its guarded copy, which is kept.
_KEPT = [(f"if_finite({u}(...))", "if_finite", u) for u in ("adam_debias", "chain")] + [
    (f"{copy}({inner}(...))", copy, op)
    for copy in ("cast", "round_tf32")
    for inner, op in [(g, f"anchor:{g}") for g in WGRADS] + [(u, u) for u in (*UPDATES, "chain")]
]
COPIES = [
    Rule(f"{name} => fused", P((outer,), P((inner,))), build_merge, fits, keeps=True)
    for name, outer, inner in _KEPT
]
