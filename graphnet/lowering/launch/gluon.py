"""What all variants in Gluon have in common: where they are accepted, and how they are chosen."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from functools import cache

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import Layout
from graphnet.lowering.launch.codegen import makes_tensors
from graphnet.lowering.launch.config import SHARED_BYTES, Config
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.passes.templates import anchors_of

TRITONS = ("3.6.0", "3.7.1")  # whose compilers were seen to make the same of these kernels
CONSUMER = 4  # warps of a consumer, which a launch counts; there are two and a loader
HALF = 64  # rows of a consumer at the least: what wgmma takes
SLICE = 64  # columns of the accumulators that go through shared memory at once
ROOM = SHARED_BYTES - 1024  # beside the barriers


@cache
def triton() -> str:
    """The version of Triton that is installed, which is not imported."""
    return importlib.metadata.version("triton").partition("+")[0]


def refusal(eqn: Eqn, dtype: str, arch: int) -> str | None:
    """Why specialised warps cannot compute an equation, whatever its shape; None where they can."""
    if dtype != "bf16":
        return f"specialised warps multiply in bf16, not {dtype}"
    anchors = anchors_of(eqn)
    stored = {v.type.dtype.name for e in anchors for v in e.inputs[:2]} - {"bf16"}
    if stored:
        return f"an operand is stored in {stored.pop()}, and wgmma multiplies bf16 as it lies"
    if arch != 90:
        return f"sm_{arch} has no products of warpgroups (wgmma)"
    if triton() not in TRITONS:
        return f"Triton {triton()} was not tried with Gluon kernels, {' and '.join(TRITONS)} were"
    for e in eqn.body.eqns if eqn.body else ():
        if e not in anchors and makes_tensors(e):
            return f"the code of {e.op} makes ranges of its own, which lack a layout in Gluon"
    return None


class Specialised(Variant):
    """A variant whose kernel has a loading warp and two consumers. The class behind it computes the
    same equation in Triton's language, says what the shape has to be, and is the fallback."""

    interpreted = moments = False

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        return refusal(eqn, dtype, arch) or super().accepts(eqn, layouts, dtype, arch)

    def suits(self, problem: Problem) -> str | None:
        return "a table has to name it: no rule chooses Gluon"


def slices_bytes(c: Config) -> int:
    """Shared memory in which both consumers turn a slice, 64 rows at once, in fp32 at the most."""
    return 2 * HALF * min(SLICE, c.BN) * 4
