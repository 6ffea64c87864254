"""What a persistent kernel needs between and before its phases: a barrier over the grid, a batch.

A kernel that runs many steps holds all its programs on the GPU at once (cooperative launch) and
lets them wait for each other between phases that depend on each other.
"""

import triton
import triton.language as tl

from .common import cast_store


@triton.jit
def grid_barrier(sync, turn, alive, PROGRAMS: tl.constexpr, LIMIT: tl.constexpr):
    """All programs' stores before it are visible to all programs' loads behind it.

    sync    i32[2], zeroed before the launch: arrivals so far, and the first barrier that failed
    turn    how many barriers this launch has met, this one included
    alive   whether this program still waits; the result is passed to the next barrier
    LIMIT   looks before it gives up: nobody hangs, sync[1] names the barrier instead

    The block's own barrier comes first: the release of one thread covers what the others stored
    only behind it. One acquire at least and the barrier at the end do the same for the loads.
    """
    tl.debug_barrier()
    tl.atomic_add(sync, 1, sem="release", scope="gpu")
    goal = turn * PROGRAMS
    seen = goal * 0
    looks = 0
    while (seen < goal) & (looks < LIMIT) & alive:
        seen = tl.atomic_add(sync, 0, sem="acquire", scope="gpu")
        looks += 1
    arrived = seen >= goal
    if alive & (arrived == 0):
        tl.atomic_cas(sync + 1, 0, turn)
    tl.debug_barrier()
    return alive & arrived


@triton.jit
def take_rows(
    images, labels_in, order, counts, step, x, labels, live,
    ROWS: tl.constexpr, SIZE: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row `program_id(0)` of a step's batch: x[row] = images[order[step, row]], and its label.

    Images are u8, read as value / 255, or fp32. An order below 0 is a row that does not live: it
    becomes zeros. counts[step] goes to `live`.
    """
    row = tl.program_id(0)
    at = tl.load(order + step * ROWS + row)
    there = at >= 0
    i = tl.arange(0, BLOCK)
    for start in range(0, SIZE, BLOCK):
        mask = start + i < SIZE
        v = tl.load(images + at * SIZE + start + i, mask=mask & there, other=0)
        if v.dtype == tl.uint8:
            v = tl.div_rn(v.to(tl.float32), 255.0)
        cast_store(x + row.to(tl.int64) * SIZE + start + i, v, mask)
    if LABELS:
        tl.store(labels + row, tl.load(labels_in + at, mask=there, other=0))
    if row == 0:
        tl.store(live, tl.load(counts + step))
