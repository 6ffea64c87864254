"""Code without an anchor, and the device ring of losses.

Bandwidth-bound, one element a lane. BLOCK 1,024 with 4 warps gives each thread 8 elements: two
16-byte accesses in fp32, one in bf16, where the traversal follows the storage. Where operands lie
differently, one of them is read strided: that is the limit, and the layout pass's business.
"""

import triton
import triton.language as tl

from .common import elements, unflatten


@triton.jit
def elementwise(
    args,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr,
    NHWC: tl.constexpr, BLOCK: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Runs the epilogue over every element of a [D0, D1, D2, D3] index space."""
    TOTAL: tl.constexpr = D0 * D1 * D2 * D3
    i = elements(TOTAL, 0, BLOCK)
    i0, i1, i2, i3 = unflatten(i, D1, D2, D3, NHWC)
    EPILOGUE(0.0, 0, i0, i1, i2, i3, i < TOTAL, args)


@triton.jit
def record_step(ring, loss, step, norm, RING: tl.constexpr, NORM: tl.constexpr):
    """ring[step mod RING] = loss, or NaN where a norm is not finite; then step + 1. One program."""
    at = tl.load(step)
    value = tl.load(loss)
    if NORM:
        value = tl.where(tl.abs(tl.load(norm)) < float("inf"), value, float("nan"))
    tl.store(ring + at % RING, value)
    tl.debug_barrier()
    tl.store(step, at + 1)
