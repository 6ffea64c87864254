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
    NHWC: tl.constexpr, BLOCK: tl.constexpr, EPILOGUE: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """Runs the epilogue over every element of a [D0, D1, D2, D3] index space."""
    TOTAL: tl.constexpr = D0 * D1 * D2 * D3
    i = elements(TOTAL, 0, BLOCK, AT)
    i0, i1, i2, i3 = unflatten(i, D1, D2, D3, NHWC)
    EPILOGUE(0.0, 0, i0, i1, i2, i3, i < TOTAL, args)


@triton.jit
def record_step(
    ring, loss, step, held, go, norm,
    RING: tl.constexpr, STICKY: tl.constexpr, NORM: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """ring[step mod RING] = loss, or NaN where a norm is not finite; then step + 1. One program.

    Where it is STICKY, steps that were held back take places in the ring too, `go` is inf behind
    the first of them, and a step that is not finite counts as held.
    """
    at = tl.load(step)
    value = tl.load(loss)
    if NORM:
        value = tl.where(tl.abs(tl.load(norm)) < float("inf"), value, float("nan"))
    if STICKY:
        before = tl.load(held)
        tl.store(ring + (at + before.to(tl.int64)) % RING, value)
        free = tl.where(before == 0.0, value, float("inf"))
        fine = tl.abs(free) < float("inf")
        tl.debug_barrier()
        tl.store(go, free)
        tl.store(held, tl.where(fine, before, before + 1.0))
        tl.store(step, tl.where(fine, at + 1, at))
    else:
        tl.store(ring + at % RING, value)
        tl.debug_barrier()
        tl.store(step, at + 1)
