"""The weight gradient of a convolution by filter rows and specialised warps, in Gluon for Hopper.

What wgrad_rows.py computes, from the same table of segments into the same workspace, which the same
second pass adds up. One warp asks the copy engine for the boxes of a step, two warpgroups multiply
them, each half of a tile's rows; gl_conv.py tells how they hand stages to one another.

Both operands lie along the result's rows and columns, not along the images that are summed, so
wgmma reads both transposed from shared memory. The bias gradient is one more product, by 16 columns
of which the first is ones. With SWAP, dy's channels are the columns: each warpgroup then sums half
of them, where such a half has at least the 64 rows that wgmma takes.

Tiles: 128x256x64 and 256x128x64 with 4 stages take 193 KiB of shared memory.
Limits: sm_90 alone, bf16 alone, no interpreter; a batch that is no multiple of BK multiplies zeros.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gl_conv import barriers
from .wgrad_rows import segment_at, step_at

LEAST = gl.constexpr(64)  # rows of a product


@gluon.jit
def fetch_segment(
    x, x2, dy, dy2, rows0, rows1, cols, cols2, full, empty, segments,
    N: gl.constexpr, C: gl.constexpr, XC: gl.constexpr, K: gl.constexpr, OW: gl.constexpr,
    R: gl.constexpr, S: gl.constexpr, COLS: gl.constexpr, SH: gl.constexpr, SW: gl.constexpr,
    PT: gl.constexpr, PL: gl.constexpr, DH: gl.constexpr, DW: gl.constexpr, G: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, BK: gl.constexpr,
    SWAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: both halves of the rows and the columns of every step."""
    KT: gl.constexpr = BN + BT if SWAP else BM
    XT: gl.constexpr = BM if SWAP else BN + BT
    HM: gl.constexpr = BM // 2
    BLOCKS: gl.constexpr = (N + BK - 1) // BK
    _, first, count, unit, part, dh, k0, at0 = segment_at(
        segments + 4 * gl.program_id(0), K, C, XC, R, S, COLS, PT, PL, DH, DW, KT, XT
    )
    for it in range(0, count):
        h, n, at, d = step_at(first + it, dh, k0, at0, BLOCKS, OW, SH, SW * XC, G * K, BK)
        stage = it % STAGES
        mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, 2 * BK * (BM + BN + BT))
        if SWAP:
            tma.async_copy_global_to_shared(x, [h, n, at], bar, rows0.index(stage))
            tma.async_copy_global_to_shared(x, [h, n, at + HM], bar, rows1.index(stage))
            tma.async_copy_global_to_shared(dy, [n, d], bar, cols.index(stage))
            if BT > 0:
                tma.async_copy_global_to_shared(dy2, [n, d + BN], bar, cols2.index(stage))
        else:
            tma.async_copy_global_to_shared(dy, [n, d], bar, rows0.index(stage))
            tma.async_copy_global_to_shared(dy, [n, d + HM], bar, rows1.index(stage))
            tma.async_copy_global_to_shared(x, [h, n, at], bar, cols.index(stage))
            if BT > 0:
                tma.async_copy_global_to_shared(x2, [h, n, at + BN], bar, cols2.index(stage))


@gluon.constexpr_function
def share(width, half):
    """Of so many columns of dy, those that a warpgroup sums: half, or the first all."""
    if width >= 2 * LEAST.value:
        return width // 2
    return width * (1 - half)


@gluon.jit
def ended(accs, IN_FLIGHT: gl.constexpr):
    """The accumulators once all but the latest products have ended."""
    if len(accs) == 1:
        done = (warpgroup_mma_wait(IN_FLIGHT, deps=accs),)
    else:
        done = warpgroup_mma_wait(IN_FLIGHT, deps=accs)
    return done


@gluon.jit
def keep(acc, out, row0, col0, XT: gl.constexpr, SWAP: gl.constexpr):
    """Stores rows from row0 and columns from col0 of a tile, which lies by dy's channels."""
    ROWS: gl.constexpr = acc.shape[0]
    COLS: gl.constexpr = acc.shape[1]
    L: gl.constexpr = acc.type.layout
    row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, L))[:, None]
    col = col0 + gl.arange(0, COLS, gl.SliceLayout(0, L))[None, :]
    if SWAP:
        gl.store(out + col * XT + row, acc)
    else:
        gl.store(out + row * XT + col, acc)


@gluon.jit
def keep_sums(sums, out):
    """Stores a column of sums: all 16 are alike."""
    ROWS: gl.constexpr = sums.shape[0]
    L: gl.constexpr = sums.type.layout
    row = gl.arange(0, ROWS, gl.SliceLayout(1, L))[:, None]
    col = gl.arange(0, 16, gl.SliceLayout(0, L))[None, :]
    gl.store(out + row + col * 0, sums, mask=row + col == row)


@gluon.jit
def sum_segment(
    HALF: gl.constexpr, rows, cols, cols2, ones, full, empty, out, sums_out, count,
    BM: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, BK: gl.constexpr,
    SWAP: gl.constexpr, STAGES: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Half of the rows of a tile over `count` steps, to `out`; SUMS: its share of dy's sums."""
    HM: gl.constexpr = BM // 2
    XT: gl.constexpr = BM if SWAP else BN + BT
    # Channels whose sums are this warpgroup's: of the rows, or of the columns of either box.
    OWN: gl.constexpr = (share(BN, HALF) if SWAP else HM) if SUMS else 0
    OWN2: gl.constexpr = share(BT, HALF) if SWAP and SUMS else 0
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    accs = (gl.zeros((HM, BN), gl.float32, L),)
    if BT > 0:
        L2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
        accs = accs + (gl.zeros((HM, BT), gl.float32, L2),)
    if OWN > 0:
        accs = accs + (gl.zeros((OWN, 16), gl.float32, LS),)
    if OWN2 > 0:
        accs = accs + (gl.zeros((OWN2, 16), gl.float32, LS),)
    for it in range(0, count):
        stage = it % STAGES
        mbarrier.wait(full.index(stage), (it // STAGES) & 1)
        a = rows.index(stage).reshape((BK, HM)).permute((1, 0))
        b = cols.index(stage).reshape((BK, BN))
        new = (warpgroup_mma(a, b, accs[0], is_async=True),)
        if BT > 0:
            b2 = cols2.index(stage).reshape((BK, BT))
            new = new + (warpgroup_mma(a, b2, accs[1], is_async=True),)
        if OWN > 0:
            d = b.slice(HALF * (BN - OWN), OWN, 1).permute((1, 0)) if SWAP else a
            new = new + (warpgroup_mma(d, ones, accs[len(new)], is_async=True),)
        if OWN2 > 0:
            d2 = b2.slice(HALF * (BT - OWN2), OWN2, 1).permute((1, 0))
            new = new + (warpgroup_mma(d2, ones, accs[len(new)], is_async=True),)
        accs = ended(new, len(new))
        mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), pred=it > 0)
    accs = ended(accs, 0)
    keep(accs[0], out, HALF * HM, 0, XT, SWAP)
    if BT > 0:
        keep(accs[1], out, HALF * HM, BN, XT, SWAP)
    AFTER: gl.constexpr = 2 if BT > 0 else 1
    if OWN > 0:
        keep_sums(accs[AFTER], sums_out + (HALF * (BN - OWN) if SWAP else HALF * HM))
    if OWN2 > 0:
        keep_sums(accs[AFTER + 1], sums_out + BN + HALF * (BT - OWN2))


@gluon.jit
def multiply_segment(
    HALF: gl.constexpr, rows, cols, cols2, ones, full, empty, work, segments,
    K: gl.constexpr, C: gl.constexpr, XC: gl.constexpr, R: gl.constexpr, S: gl.constexpr,
    COLS: gl.constexpr, PT: gl.constexpr, PL: gl.constexpr, DH: gl.constexpr, DW: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, BK: gl.constexpr, SWAP: gl.constexpr,
    SEGMENTS: gl.constexpr, CARRIER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: half of the rows of the program's segment."""
    KT: gl.constexpr = BN + BT if SWAP else BM
    XT: gl.constexpr = BM if SWAP else BN + BT
    slot, first, count, unit, part, dh, k0, at0 = segment_at(
        segments + 4 * gl.program_id(0), K, C, XC, R, S, COLS, PT, PL, DH, DW, KT, XT
    )
    out = work + slot * (KT * XT)
    sums = work + SEGMENTS * (KT * XT) + slot * KT
    if CARRIER < 0:
        sum_segment(
            HALF, rows, cols, cols2, ones, full, empty, out, sums, count, BM, BN, BT, BK, SWAP,
            STAGES, False,
        )  # fmt: skip
    elif R * S == 1 and COLS <= XT:  # noqa: SIM114 (Triton 3.6 trips over a branch never taken)
        sum_segment(
            HALF, rows, cols, cols2, ones, full, empty, out, sums, count, BM, BN, BT, BK, SWAP,
            STAGES, True,
        )  # fmt: skip
    elif (unit == CARRIER) & (part == 0):
        sum_segment(
            HALF, rows, cols, cols2, ones, full, empty, out, sums, count, BM, BN, BT, BK, SWAP,
            STAGES, True,
        )  # fmt: skip
    else:
        sum_segment(
            HALF, rows, cols, cols2, ones, full, empty, out, sums, count, BM, BN, BT, BK, SWAP,
            STAGES, False,
        )  # fmt: skip


@gluon.jit
def conv2d_wgrad_specialised(
    x, x2, dy, dy2, work, segments,
    N: gl.constexpr, C: gl.constexpr, XC: gl.constexpr, K: gl.constexpr, OW: gl.constexpr,
    R: gl.constexpr, S: gl.constexpr, COLS: gl.constexpr, SH: gl.constexpr, SW: gl.constexpr,
    PT: gl.constexpr, PL: gl.constexpr, DH: gl.constexpr, DW: gl.constexpr, G: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, BK: gl.constexpr,
    SWAP: gl.constexpr, SEGMENTS: gl.constexpr, CARRIER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Operands, table, workspace and constants as of conv2d_wgrad_rows; the boxes of a tile's rows
    are BM / 2 wide."""
    HM: gl.constexpr = BM // 2
    T: gl.constexpr = gl.bfloat16
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    if SWAP:
        rows0 = gl.allocate_shared_memory(T, [STAGES, 1, BK, HM], x.layout)
        rows1 = gl.allocate_shared_memory(T, [STAGES, 1, BK, HM], x.layout)
        cols = gl.allocate_shared_memory(T, [STAGES, BK, BN], dy.layout)
    else:
        rows0 = gl.allocate_shared_memory(T, [STAGES, BK, HM], dy.layout)
        rows1 = gl.allocate_shared_memory(T, [STAGES, BK, HM], dy.layout)
        cols = gl.allocate_shared_memory(T, [STAGES, 1, BK, BN], x.layout)
    cols2 = cols
    if BT > 0:
        if SWAP:
            cols2 = gl.allocate_shared_memory(T, [STAGES, BK, BT], dy2.layout)
        else:
            cols2 = gl.allocate_shared_memory(T, [STAGES, 1, BK, BT], x2.layout)
    ones = full
    if CARRIER >= 0:
        LIES: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
        SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, 16], T)
        ones = gl.allocate_shared_memory(T, [BK, 16], SHARED, gl.full((BK, 16), 1.0, T, LIES))
        fence_async_shared()
    gl.warp_specialize(
        [
            (
                multiply_segment,
                (
                    0, rows0, cols, cols2, ones, full, empty, work, segments, K, C, XC, R, S, COLS,
                    PT, PL, DH, DW, BM, BN, BT, BK, SWAP, SEGMENTS, CARRIER, STAGES,
                ),
            ),
            (
                multiply_segment,
                (
                    1, rows1, cols, cols2, ones, full, empty, work, segments, K, C, XC, R, S, COLS,
                    PT, PL, DH, DW, BM, BN, BT, BK, SWAP, SEGMENTS, CARRIER, STAGES,
                ),
            ),
            (
                fetch_segment,
                (
                    x, x2, dy, dy2, rows0, rows1, cols, cols2, full, empty, segments, N, C, XC, K,
                    OW, R, S, COLS, SH, SW, PT, PL, DH, DW, G, BM, BN, BT, BK, SWAP, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
