"""The batch of a step, gathered from a data set on the device.

A program moves BLOCK values of one image. Which image that is, all of them work out from a few
scalars; the first program of an image moves its label, and the very first the scalars of the step.
Bandwidth-bound, one value a lane: rows of bytes lie one behind another, so they are read in whole
lines, and the levels (1 KiB a channel) stay in L1.
"""

import triton
import triton.language as tl


@triton.jit
def take(
    images, labels, orders, place, step, table, levels, x, y, index, live, epoch, hypers,
    N: tl.constexpr, BATCH: tl.constexpr, C: tl.constexpr, HW: tl.constexpr,
    ORDERS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, SLOT: tl.constexpr,
    LEVELS: tl.constexpr, INDEX: tl.constexpr, LIVE: tl.constexpr, EPOCH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x, y, index of BATCH rows, and live, epoch and hypers. See the op (ops/take.py)."""
    EACH: tl.constexpr = C * HW
    STEPS: tl.constexpr = (N + BATCH - 1) // BATCH
    TILES: tl.constexpr = (EACH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    n = program // TILES
    tile = program % TILES
    at = tl.load(step)
    done = at - tl.load(place)
    cursor = tl.load(place + 1)
    now = tl.load(place + 2)
    rest = (N - cursor + BATCH - 1) // BATCH
    behind = tl.maximum(done - rest, 0)
    first = tl.where(done < rest, cursor + done * BATCH, behind % STEPS * BATCH)
    now = tl.where(done < rest, now, now + 1 + behind // STEPS)
    there = first + n < N
    row = tl.load(orders + now % ORDERS * N + first + n, mask=there, other=0)

    e = tile * BLOCK + tl.arange(0, BLOCK)
    mine = (e < EACH) & there
    value = tl.load(images + row * EACH + e, mask=mine, other=0)
    if LEVELS:
        value = tl.load(levels + e // HW * LEVELS + value.to(tl.int32), mask=mine, other=0.0)
    tl.store(x + n.to(tl.int64) * EACH + e, value, mask=e < EACH)

    if tile == 0:
        tl.store(y + n, tl.load(labels + row, mask=there, other=0))
        if INDEX:
            tl.store(index + n, row)
    if program == 0:
        if LIVE:
            tl.store(live, tl.minimum(N - first, BATCH).to(tl.int32))
        if EPOCH:
            tl.store(epoch, now)
        for k in tl.static_range(K):
            number = tl.load(table + at % ROWS * K + k)
            tl.store(hypers + k * SLOT + tl.arange(0, SLOT), tl.zeros((SLOT,), tl.float32) + number)
