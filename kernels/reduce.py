"""Second passes, in a fixed order: what makes split reductions deterministic without atomics.

The split protocol lives here. A weight gradient cuts its reduction into SPLIT parts; each part
writes an fp32 tile to work[SPLIT, K, COLS], COLS being the filter (r, s, c) and, where wanted, one
column for the bias; `split_reduce` adds the parts, first part first. With SPLIT 1 there is no
workspace and `finish_tile` calls the epilogues at once.

`split_reduce` reads SPLIT rows of one element a lane: BLOCK 256 with 4 warps, up to 1,024 where
K x COLS fills the processors. Its update epilogue has few values a thread and never spills. It
loads parts one by one, above SPLIT 64 bound by latency; `segment_reduce` loads several at once.
"""

import triton
import triton.language as tl

from .common import INT32_MAX, filter_position, program, unflatten


@triton.jit
def finish_tile(
    acc, row, q, mask, part, work, args, args2,
    K: tl.constexpr, CG: tl.constexpr, R: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
    CRS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr, BIAS_HERE: tl.constexpr,
    EPILOGUE: tl.constexpr, EPILOGUE2: tl.constexpr,
):  # fmt: skip
    """Ends a weight-gradient tile of rows `row` and columns `q`: a partial, or the result.

    BIAS_HERE says that column CRS, the bias gradient, may lie in this tile.
    """
    if SPLIT > 1:
        at = (part * K + row).to(tl.int64)[:, None] * COLS + q[None, :]
        tl.store(work + at, acc, mask=mask)
    else:
        c, r, s = filter_position(q, CG, S, B)
        inner = mask & ((q < CRS) & (r < R) & (s < S))[None, :]
        EPILOGUE(acc, 0, row[:, None], c[None, :], r[None, :], s[None, :], inner, args)
        if BIAS_HERE:
            EPILOGUE2(acc, 0, row[:, None], 0, 0, 0, mask & (q == CRS)[None, :], args2)


@triton.jit
def finish_bias(
    sums, row, mask, part, work, args2,
    K: tl.constexpr, CRS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr,
    EPILOGUE2: tl.constexpr,
):  # fmt: skip
    """Ends the bias column of a weight gradient, where it has a program of its own."""
    if SPLIT > 1:
        tl.store(work + (part * K + row).to(tl.int64) * COLS + CRS, sums, mask=mask)
    else:
        EPILOGUE2(sums[:, None], 0, row[:, None], 0, 0, 0, mask[:, None], args2)


@triton.jit
def split_reduce(
    work, args, args2,
    SPLIT: tl.constexpr, K: tl.constexpr, CG: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    B: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
    EPILOGUE: tl.constexpr, EPILOGUE2: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """Adds the partials of work[SPLIT, K, (r, s, c) and the bias column], first part first."""
    CRS: tl.constexpr = (R + B - 1) // B * ((S + B - 1) // B) * (B * B * CG)
    COLS: tl.constexpr = CRS + HAS_BIAS
    i = program(0, AT) * BLOCK + tl.arange(0, BLOCK)
    mask = i < K * COLS
    at = work + i
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(SPLIT):
        acc += tl.load(at, mask=mask, other=0.0)
        at += K * COLS
    row = i // COLS
    q = i % COLS
    c, r, s = filter_position(q, CG, S, B)
    EPILOGUE(acc, 0, row, c, r, s, mask & (q < CRS) & (r < R) & (s < S), args)
    if HAS_BIAS:
        EPILOGUE2(acc, 0, row, 0, 0, 0, mask & (q == CRS), args2)


@triton.jit
def parts_reduce(
    work, args, args2,
    SPLIT: tl.constexpr, K: tl.constexpr, CG: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    EPILOGUE: tl.constexpr, EPILOGUE2: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """`split_reduce` of many parts and few columns: a program loads ROWS parts of BLOCK columns at
    once. Which parts are added to which, and in which order, ROWS says."""
    COLS: tl.constexpr = R * S * CG + HAS_BIAS
    i = program(0, AT) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, ROWS)[:, None]
    mask = i < K * COLS
    at = work + part * (K * COLS) + i[None, :]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, SPLIT, ROWS):
        ok = mask[None, :] & (start + part < SPLIT)
        sums += tl.load(at, mask=ok, other=0.0)
        at += ROWS * K * COLS
    acc = tl.sum(sums, axis=0)
    row = i // COLS
    q = i % COLS
    c, r, s = filter_position(q, CG, S)
    EPILOGUE(acc, 0, row, c, r, s, mask & (q < R * S * CG), args)
    if HAS_BIAS:
        EPILOGUE2(acc, 0, row, 0, 0, 0, mask & (q == COLS - 1), args2)


@triton.jit
def segment_reduce(
    work, first, args, args2,
    K: tl.constexpr, G: tl.constexpr, UNITS: tl.constexpr, COLS: tl.constexpr,
    CG: tl.constexpr, R: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
    KT: tl.constexpr, XT: tl.constexpr, SEGMENTS: tl.constexpr, CARRIER: tl.constexpr,
    MOST: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr, BIAS_BLOCK: tl.constexpr,
    EPILOGUE: tl.constexpr, EPILOGUE2: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """Adds the segments of each tile of wgrad_rows.py, first segment first.

    Segments first[t] to first[t + 1], at most MOST, are tile t's, and work[SEGMENTS, KT, XT] holds
    them. A program adds BLOCK elements, which lie in the workspace as in a filter stored (r, s, c):
    16 bytes a thread on both sides. UNROLL segments are on their way at once. The programs behind
    those of the tiles add the sums of dy, work[SEGMENTS, KT] behind the tiles.
    """
    NKT: tl.constexpr = (K + KT - 1) // KT
    NXT: tl.constexpr = (COLS + XT - 1) // XT
    TILES: tl.constexpr = NKT * NXT * UNITS * G
    BLOCKS: tl.constexpr = KT * XT // BLOCK
    p = program(0, AT)
    if p < TILES * BLOCKS:
        tile = p // BLOCKS
        unit = tile // (NKT * NXT) % UNITS
        e = p % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        k = tile % NKT * KT + e // XT
        q = tile // NKT % NXT * XT + e % XT
        if B == 1 and CG % 4 == 0 and XT % 4 == 0:
            # Four neighbours lie in one tap, which the compiler cannot see; nor behind a call.
            tap = tl.max_constancy((unit * COLS + q) // CG, 4)
            r = tl.max_constancy(tap // S, 4)
            s = tl.max_constancy(tap % S, 4)
            c = tl.max_contiguous(tl.multiple_of(q % CG, 4), 4)
        else:
            c, r, s = filter_position(unit * COLS + q, CG, S, B)
        there = (k < K) & (q < COLS)
        start = tl.load(first + tile)
        stop = tl.load(first + tile + 1)
        acc = tl.zeros((BLOCK,), tl.float32)
        for more in range(0, MOST, UNROLL):
            for u in tl.static_range(UNROLL):
                z = start + more + u
                acc += tl.load(work + z * (KT * XT) + e, mask=there & (z < stop), other=0.0)
        row = tile // (NKT * NXT * UNITS) * K + k
        # Not for B = 1, where it says nothing and costs the update its 16-byte accesses.
        inner = there & (r < R) & (s < S) if B > 1 else there
        EPILOGUE(acc, 0, row, c, r, s, inner, args)
    elif CARRIER >= 0:
        g = (p - TILES * BLOCKS) // NKT
        block = (p - TILES * BLOCKS) % NKT
        tile = (g * UNITS + CARRIER) * (NXT * NKT) + block
        i = tl.arange(0, BIAS_BLOCK)
        mine = (i < KT) & (block * KT + i < K)
        at = work + SEGMENTS * (KT * XT) + i
        sums = tl.zeros((BIAS_BLOCK,), tl.float32)
        for z in range(tl.load(first + tile), tl.load(first + tile + 1)):
            sums += tl.load(at + z * KT, mask=mine, other=0.0)
        EPILOGUE2(sums, 0, g * K + block * KT + i, 0, 0, 0, mine, args2)


@triton.jit
def mean_reduce(
    work, live, out, COUNT: tl.constexpr, BLOCK: tl.constexpr, AT: tl.constexpr = None
):
    """out = sum of work[COUNT] / live, by one program: a tree of fixed shape."""
    i = tl.arange(0, BLOCK)
    parts = tl.load(work + i, mask=i < COUNT, other=0.0)
    tl.store(out, tl.sum(parts) / tl.load(live).to(tl.float32))


@triton.jit
def square_sum(
    x, work,
    N: tl.constexpr, FIRST: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
    AT: tl.constexpr = None,
):  # fmt: skip
    """work[FIRST + this program] = the sum of squares of its blocks of x[N], in order."""
    own = program(0, AT)
    at = own * BLOCK + tl.arange(0, BLOCK)
    if N + PROGRAMS * BLOCK > INT32_MAX:
        at = at.to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, PROGRAMS * BLOCK):
        v = tl.load(x + start + at, mask=start + at < N, other=0.0).to(tl.float32)
        sums += v * v
    tl.store(work + FIRST + own, tl.sum(sums))


@triton.jit
def norm_reduce(work, out, COUNT: tl.constexpr, BLOCK: tl.constexpr, AT: tl.constexpr = None):
    """out = sqrt(sum of work[COUNT]), by one program: a tree of fixed shape."""
    i = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, COUNT, BLOCK):
        sums += tl.load(work + start + i, mask=start + i < COUNT, other=0.0)
    tl.store(out, tl.sqrt(tl.sum(sums)))


@triton.jit
def channel_sum(
    x, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    BLOCK: tl.constexpr, EPILOGUE: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """The sum over n, h and w of each channel; acc is [1] at (channel, 0, 0, 0).

    One program a channel: reads coalesce in NCHW alone, and few channels leave processors idle.
    Only for what no weight gradient's column of ones covers.
    """
    c = program(0, AT)
    base = x + c * XS1
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N * H * W, BLOCK):
        i = start + tl.arange(0, BLOCK)
        n = i // (H * W)
        if N * XS0 > INT32_MAX:
            n = n.to(tl.int64)
        at = n * XS0 + (i // W) % H * XS2 + i % W * XS3
        sums += tl.load(base + at, mask=i < N * H * W, other=0.0).to(tl.float32)
    one = tl.arange(0, 1)
    EPILOGUE(tl.sum(sums) + one * 0.0, 0, c + one, 0, 0, 0, one == 0, args)


@triton.jit
def axis_sum(
    x, out,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, K3: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr,
    PARTS: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """out[part, kept] = the sum of a part of the elements of x for each kept one.

    x has the strides S0..S3. Of each axis, K is its size where it is kept, R where it is summed,
    the other one is 1. A program adds tiles of BR summed by BO kept elements, PARTS tiles apart.
    """
    KEPT: tl.constexpr = K0 * K1 * K2 * K3
    TERMS: tl.constexpr = R0 * R1 * R2 * R3
    o = program(0, AT) * BO + tl.arange(0, BO)
    part = program(1, AT)
    o0, o1, o2, o3 = unflatten(o, K1, K2, K3, False)
    if KEPT * TERMS > INT32_MAX:
        o0 = o0.to(tl.int64)
    base = x + (o0 * S0 + o1 * S1 + o2 * S2 + o3 * S3)
    sums = tl.zeros((BR, BO), tl.float32)
    for start in range(part * BR, TERMS, PARTS * BR):
        r = start + tl.arange(0, BR)
        r0, r1, r2, r3 = unflatten(r, R1, R2, R3, False)
        if KEPT * TERMS > INT32_MAX:
            r0 = r0.to(tl.int64)
        at = base[None, :] + (r0 * S0 + r1 * S1 + r2 * S2 + r3 * S3)[:, None]
        inside = (r < TERMS)[:, None] & (o < KEPT)[None, :]
        sums += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + part * KEPT + o, tl.sum(sums, 0), mask=o < KEPT)


@triton.jit
def ordered_sum(
    work, out,
    PARTS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """out[COUNT] = the sum of work[PARTS, COUNT], first part first."""
    i = program(0, AT) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        acc += tl.load(work + part * COUNT + i, mask=i < COUNT, other=0.0)
    tl.store(out + i, acc, mask=i < COUNT)
