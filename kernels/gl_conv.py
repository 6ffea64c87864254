"""Convolution forward and its input gradient by specialised warps, in Gluon for Hopper.

What conv_rows.py computes, with the same tiles, the same order and the same descriptors, by three
partitions of a program that live as long as it does and pass from tile to tile. One warp asks the
copy engine for the next boxes. Two warpgroups multiply, each half of the rows: half of the images,
or one of two neighbouring pixels. They share every box of filters. A stage of boxes is handed over
by two barriers in shared memory: `full` counts the bytes that have come, `empty` the two consumers
that have read it. A consumer gives a stage back one step late, when its product has ended.

A few programs, one a processor, take the tiles in turn. So the loader fetches the next tile's boxes
while the consumers store this one's results.

`conv2d_resident` is for filters that fit shared memory (a first layer): they are fetched once, and
a step is one row of taps, the whole run of it. Rows of taps beyond the image multiply zeros.

Results leave in slices of 64 columns. A slice is turned from the accumulators' layout into rows of
8 neighbours a thread, so that the generated EPILOGUE loads and stores 16 bytes at once. It is
masked: tiles need not divide the channels.

Tiles, in bf16: 128x128x64 with 5 stages, 128x256x64 with 3, 256x(64 + 32)x64 with 4. The consumers
have 232 registers a thread, the loader 40, of 168 on average.
Limits: sm_90 alone, bf16 alone, no interpreter; a batch that is no multiple of BM wastes rows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .conv_rows import block_at, sum_at, tile_at

WIDTH = gl.constexpr(64)  # of a slice
EACH = gl.constexpr(8)  # neighbours of a thread


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers that ARRIVALS complete."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(COUNT):
        mbarrier.init(bars.index(s), count=ARRIVALS)
    return bars


@gluon.jit
def finish(
    acc, n0, base, k0, oh, ow, args,
    N: gl.constexpr, K: gl.constexpr, OW: gl.constexpr,
    EPILOGUE: gl.constexpr,
):  # fmt: skip
    """Rows from image n0, columns from channel k0 of the K of a group that starts at base."""
    ROWS: gl.constexpr = acc.shape[0]
    COLS: gl.constexpr = acc.shape[1]
    if COLS > WIDTH:
        HALF: gl.constexpr = COLS // 2
        left, right = acc.reshape((ROWS, 2, HALF)).permute((0, 2, 1)).split()
        finish(left, n0, base, k0, oh, ow, args, N, K, OW, EPILOGUE)
        finish(right, n0, base, k0 + HALF, oh, ow, args, N, K, OW, EPILOGUE)
    else:
        ACROSS: gl.constexpr = COLS // EACH
        LIES: gl.constexpr = gl.BlockedLayout(
            [ACROSS // 2, EACH], [32 // ACROSS, ACROSS], [4, 1], [1, 0]
        )
        n = n0 + gl.arange(0, ROWS, gl.SliceLayout(1, LIES))[:, None]
        k = k0 + gl.arange(0, COLS, gl.SliceLayout(0, LIES))[None, :]
        live = (n < N) & (k < K) & (ow < OW)
        EPILOGUE(gl.convert_layout(acc, LIES), 0, n, base + k, oh, ow, live, args)


# ---- boxes of filters beside boxes of images --------------------------------------------------


@gluon.jit
def fetch(
    x, w, w2, xs0, xs1, ws, ws2, full, empty, order,
    TILES: gl.constexpr, C: gl.constexpr, H: gl.constexpr, W: gl.constexpr, K: gl.constexpr,
    N: gl.constexpr, OH: gl.constexpr, OW: gl.constexpr, R: gl.constexpr, S: gl.constexpr,
    SH: gl.constexpr, SW: gl.constexpr, OFFH: gl.constexpr, OFFW: gl.constexpr,
    STEPH: gl.constexpr, STEPW: gl.constexpr, G: gl.constexpr,
    SPAN: gl.constexpr, FILTERS: gl.constexpr, PIXELS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The loading warp: both halves of the images and the filters of every step."""
    LATER: gl.constexpr = BM // 2 if PIXELS == 1 else 0
    RIGHT: gl.constexpr = 0 if PIXELS == 1 else SW * G * C
    step = gl.program_id(0) * 0
    for t in range(gl.program_id(0), TILES * G, PROGRAMS):
        g = t // TILES
        k0, oh, ow, n0 = tile_at(t % TILES, order, N, K, OH, OW, PIXELS, BM, BN + BT)
        h0, v0, r0, s0, blocks, total = sum_at(
            oh, ow, C, H, W, R, S, SH, SW, OFFH, OFFW, STEPH, STEPW, SPAN, PIXELS, BK
        )  # fmt: skip
        for it in range(0, total):
            h, v, tap, c = block_at(it, h0, v0, r0, s0, blocks, C, S, STEPH, STEPW, SPAN, BK)
            at = (v * G + g) * C + c
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * BK * (BM + BN + BT))
            if FILTERS == "forward":
                tma.async_copy_global_to_shared(w, [tap, g * K + k0, c], bar, ws.index(stage))
                if BT > 0:
                    second = [tap, g * K + k0 + BN, c]
                    tma.async_copy_global_to_shared(w2, second, bar, ws2.index(stage))
            else:
                tma.async_copy_global_to_shared(w, [g, c, tap * K + k0], bar, ws.index(stage))
                if BT > 0:
                    second = [g, c, tap * K + k0 + BN]
                    tma.async_copy_global_to_shared(w2, second, bar, ws2.index(stage))
            tma.async_copy_global_to_shared(x, [h, n0, at], bar, xs0.index(stage))
            other = [h, n0 + LATER, at + RIGHT]
            tma.async_copy_global_to_shared(x, other, bar, xs1.index(stage))
            step += 1


@gluon.jit
def filters(ws, stage, FILTERS: gl.constexpr, BK: gl.constexpr, WIDE: gl.constexpr):
    """The filters of a stage as [BK summed values, WIDE columns]."""
    if FILTERS == "forward":
        b = ws.index(stage).reshape((WIDE, BK)).permute((1, 0))
    else:
        b = ws.index(stage).reshape((BK, WIDE))
    return b


@gluon.jit
def multiply(
    HALF: gl.constexpr, xs, ws, ws2, full, empty, order, args,
    TILES: gl.constexpr, C: gl.constexpr, H: gl.constexpr, W: gl.constexpr, K: gl.constexpr,
    N: gl.constexpr, OH: gl.constexpr, OW: gl.constexpr, R: gl.constexpr, S: gl.constexpr,
    SH: gl.constexpr, SW: gl.constexpr, OFFH: gl.constexpr, OFFW: gl.constexpr,
    STEPH: gl.constexpr, STEPW: gl.constexpr, G: gl.constexpr,
    SPAN: gl.constexpr, FILTERS: gl.constexpr, PIXELS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr, EPILOGUE: gl.constexpr,
):  # fmt: skip
    """A warpgroup: half of the rows of every tile."""
    HM: gl.constexpr = BM // 2
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    step = gl.program_id(0) * 0
    for t in range(gl.program_id(0), TILES * G, PROGRAMS):
        g = t // TILES
        k0, oh, ow, n0 = tile_at(t % TILES, order, N, K, OH, OW, PIXELS, BM, BN + BT)
        h0, v0, r0, s0, blocks, total = sum_at(
            oh, ow, C, H, W, R, S, SH, SW, OFFH, OFFW, STEPH, STEPW, SPAN, PIXELS, BK
        )  # fmt: skip
        acc = gl.zeros((HM, BN), gl.float32, L)
        if BT > 0:
            L2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
            acc2 = gl.zeros((HM, BT), gl.float32, L2)
        for it in range(0, total):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            a = xs.index(stage).reshape((HM, BK))
            acc = warpgroup_mma(a, filters(ws, stage, FILTERS, BK, BN), acc, is_async=True)
            if BT > 0:
                acc2 = warpgroup_mma(a, filters(ws2, stage, FILTERS, BK, BT), acc2, is_async=True)
                acc, acc2 = warpgroup_mma_wait(2, deps=(acc, acc2))
            else:
                acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=it > 0)
            step += 1
        if BT > 0:
            acc, acc2 = warpgroup_mma_wait(0, deps=(acc, acc2))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=total > 0)
        if PIXELS == 1:
            n0 += HALF * HM
        else:
            ow += HALF
        finish(acc, n0, g * K, k0, oh, ow, args, N, K, OW, EPILOGUE)
        if BT > 0:
            finish(acc2, n0, g * K, k0 + BN, oh, ow, args, N, K, OW, EPILOGUE)


@gluon.jit
def conv2d_specialised(
    x, w, w2, order, args,
    N: gl.constexpr, C: gl.constexpr, H: gl.constexpr, W: gl.constexpr, K: gl.constexpr,
    OH: gl.constexpr, OW: gl.constexpr, R: gl.constexpr, S: gl.constexpr,
    SH: gl.constexpr, SW: gl.constexpr, OFFH: gl.constexpr, OFFW: gl.constexpr,
    STEPH: gl.constexpr, STEPW: gl.constexpr, G: gl.constexpr,
    SPAN: gl.constexpr, FILTERS: gl.constexpr, PIXELS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr, EPILOGUE: gl.constexpr,
):  # fmt: skip
    """Operands and constants as of conv2d_rows, but x's boxes are BM / 2 images of [H, N, W G C]
    for pairs, too. Grid: PROGRAMS, at most one a tile; the groups follow one another."""
    HM: gl.constexpr = BM // 2
    ACROSS: gl.constexpr = (OW + PIXELS - 1) // PIXELS
    IMAGES: gl.constexpr = (N + BM // PIXELS - 1) // (BM // PIXELS)
    TILES: gl.constexpr = (K + BN + BT - 1) // (BN + BT) * OH * ACROSS * IMAGES
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    xs0 = gl.allocate_shared_memory(x.dtype, [STAGES, 1, HM, BK], x.layout)
    xs1 = gl.allocate_shared_memory(x.dtype, [STAGES, 1, HM, BK], x.layout)
    if FILTERS == "forward":
        ws = gl.allocate_shared_memory(w.dtype, [STAGES, 1, BN, BK], w.layout)
    else:
        ws = gl.allocate_shared_memory(w.dtype, [STAGES, 1, BK, BN], w.layout)
    ws2 = ws
    if BT > 0:
        if FILTERS == "forward":
            ws2 = gl.allocate_shared_memory(w.dtype, [STAGES, 1, BT, BK], w2.layout)
        else:
            ws2 = gl.allocate_shared_memory(w.dtype, [STAGES, 1, BK, BT], w2.layout)
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    0, xs0, ws, ws2, full, empty, order, args, TILES, C, H, W, K, N, OH, OW, R, S,
                    SH, SW, OFFH, OFFW, STEPH, STEPW, G, SPAN, FILTERS, PIXELS, BM, BN, BT, BK,
                    STAGES, PROGRAMS, EPILOGUE,
                ),
            ),
            (
                multiply,
                (
                    1, xs1, ws, ws2, full, empty, order, args, TILES, C, H, W, K, N, OH, OW, R, S,
                    SH, SW, OFFH, OFFW, STEPH, STEPW, G, SPAN, FILTERS, PIXELS, BM, BN, BT, BK,
                    STAGES, PROGRAMS, EPILOGUE,
                ),
            ),
            (
                fetch,
                (
                    x, w, w2, xs0, xs1, ws, ws2, full, empty, order, TILES, C, H, W, K, N, OH, OW,
                    R, S, SH, SW, OFFH, OFFW, STEPH, STEPW, G, SPAN, FILTERS, PIXELS, BM, BN, BT,
                    BK, STAGES, PROGRAMS,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


# ---- filters that stay ------------------------------------------------------------------------


@gluon.jit
def place(t, N: gl.constexpr, OH: gl.constexpr, OW: gl.constexpr, BM: gl.constexpr):
    """(first image, row and column) of the t-th tile: pixels are fastest."""
    return t // (OH * OW) * BM, t // OW % OH, t % OW


@gluon.jit
def fetch_resident(
    x, x2, w, w2, u, u2, xs0, xs1, ys0, ys1, ws, ws2, us, us2, full, empty, whole,
    TILES: gl.constexpr, N: gl.constexpr, C: gl.constexpr, OH: gl.constexpr, OW: gl.constexpr,
    R: gl.constexpr, SH: gl.constexpr, SW: gl.constexpr, OFFH: gl.constexpr, OFFW: gl.constexpr,
    STEPH: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, BK: gl.constexpr,
    REST: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The loading warp: all filters, then a row of taps of both halves of the images a step."""
    mbarrier.expect(whole.index(0), 2 * R * (BN + BT) * (BK + REST))
    for r in gl.static_range(R):
        tma.async_copy_global_to_shared(w, [r, 0, 0], whole.index(0), ws.index(r))
        if BT > 0:
            tma.async_copy_global_to_shared(w2, [r, BN, 0], whole.index(0), ws2.index(r))
        if REST > 0:
            tma.async_copy_global_to_shared(u, [r, 0, BK], whole.index(0), us.index(r))
            if BT > 0:
                tma.async_copy_global_to_shared(u2, [r, BN, BK], whole.index(0), us2.index(r))
    step = gl.program_id(0) * 0
    for t in range(gl.program_id(0), TILES, PROGRAMS):
        n0, oh, ow = place(t, N, OH, OW, BM)
        at = (ow * SW + OFFW) * C
        for r in gl.static_range(R):
            h = oh * SH + OFFH + r * STEPH
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * BM * (BK + REST))
            tma.async_copy_global_to_shared(x, [h, n0, at], bar, xs0.index(stage))
            tma.async_copy_global_to_shared(x, [h, n0 + BM // 2, at], bar, xs1.index(stage))
            if REST > 0:
                rest = [h, n0, at + BK]
                tma.async_copy_global_to_shared(x2, rest, bar, ys0.index(stage))
                rest = [h, n0 + BM // 2, at + BK]
                tma.async_copy_global_to_shared(x2, rest, bar, ys1.index(stage))
            step += 1


@gluon.jit
def multiply_resident(
    HALF: gl.constexpr, xs, ys, ws, ws2, us, us2, full, empty, whole, args,
    TILES: gl.constexpr, N: gl.constexpr, K: gl.constexpr, OH: gl.constexpr, OW: gl.constexpr,
    R: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, BK: gl.constexpr,
    REST: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr, EPILOGUE: gl.constexpr,
):  # fmt: skip
    """A warpgroup: half of the images of every tile."""
    HM: gl.constexpr = BM // 2
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    mbarrier.wait(whole.index(0), 0)
    step = gl.program_id(0) * 0
    for t in range(gl.program_id(0), TILES, PROGRAMS):
        acc = gl.zeros((HM, BN), gl.float32, L)
        if BT > 0:
            L2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BT, 16])
            acc2 = gl.zeros((HM, BT), gl.float32, L2)
        for r in gl.static_range(R):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            a = xs.index(stage).reshape((HM, BK))
            acc = warpgroup_mma(a, filters(ws, r, "forward", BK, BN), acc, is_async=True)
            if BT > 0:
                acc2 = warpgroup_mma(a, filters(ws2, r, "forward", BK, BT), acc2, is_async=True)
            if REST > 0:
                b = ys.index(stage).reshape((HM, REST))
                acc = warpgroup_mma(b, filters(us, r, "forward", REST, BN), acc, is_async=True)
                if BT > 0:
                    f2 = filters(us2, r, "forward", REST, BT)
                    acc2 = warpgroup_mma(b, f2, acc2, is_async=True)
            if BT > 0:
                acc, acc2 = warpgroup_mma_wait(0, deps=(acc, acc2))
            else:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(stage))
            step += 1
        n0, oh, ow = place(t, N, OH, OW, BM)
        finish(acc, n0 + HALF * HM, 0, 0, oh, ow, args, N, K, OW, EPILOGUE)
        if BT > 0:
            finish(acc2, n0 + HALF * HM, 0, BN, oh, ow, args, N, K, OW, EPILOGUE)


@gluon.jit
def conv2d_resident(
    x, x2, w, w2, u, u2, args,
    N: gl.constexpr, C: gl.constexpr, K: gl.constexpr, OH: gl.constexpr, OW: gl.constexpr,
    R: gl.constexpr, SH: gl.constexpr, SW: gl.constexpr, OFFH: gl.constexpr, OFFW: gl.constexpr,
    STEPH: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, BK: gl.constexpr,
    REST: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr, EPILOGUE: gl.constexpr,
):  # fmt: skip
    """Forward alone, one group; BN + BT columns hold all K filters, BK + REST values a whole run.

    x and x2 are boxes of BM / 2 images by BK and by REST values of [H, N, W C]; w and w2, u and u2
    of filters [R, K, S C], those of the first and of the second accumulator's columns, by BK and by
    REST values. Grid: PROGRAMS, at most one a tile.
    """
    HM: gl.constexpr = BM // 2
    TILES: gl.constexpr = OH * OW * ((N + BM - 1) // BM)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    whole = barriers(1, 1)
    xs0 = gl.allocate_shared_memory(x.dtype, [STAGES, 1, HM, BK], x.layout)
    xs1 = gl.allocate_shared_memory(x.dtype, [STAGES, 1, HM, BK], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [R, 1, BN, BK], w.layout)
    ys0, ys1, ws2, us, us2 = xs0, xs1, ws, ws, ws
    if BT > 0:
        ws2 = gl.allocate_shared_memory(w.dtype, [R, 1, BT, BK], w2.layout)
    if REST > 0:
        ys0 = gl.allocate_shared_memory(x.dtype, [STAGES, 1, HM, REST], x2.layout)
        ys1 = gl.allocate_shared_memory(x.dtype, [STAGES, 1, HM, REST], x2.layout)
        us = gl.allocate_shared_memory(w.dtype, [R, 1, BN, REST], u.layout)
        if BT > 0:
            us2 = gl.allocate_shared_memory(w.dtype, [R, 1, BT, REST], u2.layout)
    gl.warp_specialize(
        [
            (
                multiply_resident,
                (
                    0, xs0, ys0, ws, ws2, us, us2, full, empty, whole, args, TILES, N, K, OH, OW,
                    R, BM, BN, BT, BK, REST, STAGES, PROGRAMS, EPILOGUE,
                ),
            ),
            (
                multiply_resident,
                (
                    1, xs1, ys1, ws, ws2, us, us2, full, empty, whole, args, TILES, N, K, OH, OW,
                    R, BM, BN, BT, BK, REST, STAGES, PROGRAMS, EPILOGUE,
                ),
            ),
            (
                fetch_resident,
                (
                    x, x2, w, w2, u, u2, xs0, xs1, ys0, ys1, ws, ws2, us, us2, full, empty, whole,
                    TILES, N, C, OH, OW, R, SH, SW, OFFH, OFFW, STEPH, BM, BN, BT, BK, REST,
                    STAGES, PROGRAMS,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
