"""The weight gradient meets its optimizer update: the gradient is never written.

This is the only place that joins `%g` with `*_update`. The driver's ordinary law refuses it when
`%g` is also read by an all-reduce, a global norm, an accumulator or the `add` of a shared
parameter.
"""

from __future__ import annotations

import graphnet.ops  # noqa: F401  (fills the registry)
from graphnet.ir.op import all_ops
from graphnet.passes.fuse import build_merge, fits
from graphnet.passes.rewrite import Match, P, Rule
from graphnet.passes.templates import is_update

WGRADS = ("conv2d_wgrad", "linear_wgrad")
UPDATES = tuple(name for name in all_ops() if is_update(name))


def _joins(m: Match) -> str | None:
    if m.edges[0] != m.root.inputs[1]:
        return "the value is not the gradient of the update"
    return fits(m)


RULES = [
    Rule(f"{u}(w, {g}(x, dy)) => fused", P((u,), P((f"anchor:{g}",))), build_merge, _joins)
    for g in WGRADS
    for u in UPDATES
]
# The low-precision copy is written by the kernel that writes the master; both are results.
COPIES = [
    Rule(f"cast({inner}(...)) => fused", P(("cast",), P((op,))), build_merge, fits, keeps=True)
    for inner, op in [(g, f"anchor:{g}") for g in WGRADS] + [(u, u) for u in UPDATES]
]
