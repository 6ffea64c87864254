"""Pooling and local response normalization in one kernel, in both orders, forward and backward.

Forward, pool first: the pooled image is written, because the gradient needs it, and normalised
while it is in cache. Norm first: the normalised image is never written. Backward the value between
the two never leaves the kernel either; a relu mask between them is part of it.
"""

from __future__ import annotations

from graphnet.passes.fuse import build_merge, fits
from graphnet.passes.rewrite import P, Rule

RULES = [
    Rule(
        "lrn(maxpool2d(x)) => fused",
        P(("anchor:lrn",), P(("maxpool2d",)), at=0, result=0), build_merge, fits, keeps=True,
    ),
    Rule(
        "maxpool2d(lrn(x)) => fused",
        P(("anchor:maxpool2d",), P(("lrn",)), at=0), build_merge, fits,
    ),
    Rule(
        "maxpool2d_grad(lrn_grad(x, dy), i) => fused",
        P(("anchor:maxpool2d_grad",), P(("anchor:lrn_grad",))), build_merge, fits,
    ),
    Rule(
        "lrn_grad(x, maxpool2d_grad(dy, i)) => fused",
        P(("anchor:lrn_grad",), P(("anchor:maxpool2d_grad",))), build_merge, fits,
    ),
]  # fmt: skip
