"""The fully connected products, with torch's weight layout [out, in]: forward and input gradient.

One kernel serves both by strides alone: b is the transposed weight or the weight. Its operands come
by pointer (masked where a size does not divide, 16-byte asynchronous copies) or as boxes of tensor
descriptors, which fill the edge with zeros.

A batch is short and a weight is large, so the work is to read the weight once, at the rate of
memory: a tile holds up to 128 rows, so that one pass over the weight serves the whole batch, and
the pipeline is deep. Where that leaves processors idle the reduction is cut into SPLIT parts;
`add_parts` adds them, first part first, and runs the epilogue.

Tiles: 128x64x64 with 4 warps holds 64 accumulators a thread, 24 KiB of shared memory a stage.
Limits: ieee products run on FMAs and want 64x64 or less; boxes need rows of a multiple of 16 bytes.
"""

import triton
import triton.language as tl

from .common import INT32_MAX, below, dot, program


@triton.jit
def linear_product(
    a, b, parts, args,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    AS0: tl.constexpr, AS1: tl.constexpr, BS0: tl.constexpr, BS1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    BOXED: tl.constexpr, PRECISION: tl.constexpr, CHUNKS: tl.constexpr, EPILOGUE: tl.constexpr,
    AT: tl.constexpr = None,
):  # fmt: skip
    """acc[m, n] = sum over k of a[m, k] b[k, n], or part of the sum into parts[SPLIT, M, N].

    BOXED: a and b are descriptors of the matrices as they lie, b's as [N, K] where BS0 is 1.
    CHUNKS of columns (1, 2 or 4) go through the epilogue one after the other.
    """
    PER: tl.constexpr = ((K + BK - 1) // BK + SPLIT - 1) // SPLIT * BK
    part = program(1, AT)
    m0 = program(2, AT) * BM
    n0 = program(0, AT) * BN
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    rows = below(m, M, BM)[:, None]
    cols = below(n, N, BN)[None, :]
    first = part * PER if SPLIT > 1 else 0
    stop = tl.minimum(first + PER, K) if SPLIT > 1 else K
    acc = tl.zeros((BM, BN), tl.float32)
    if BOXED:
        for start in range(first, stop, BK):
            if BS0 == 1:
                y = b.load([n0, start]).T
            else:
                y = b.load([start, n0])
            acc = dot(a.load([m0, start]), y, acc, PRECISION)
    else:
        left, right, k = m, n, first + tl.arange(0, BK)
        if M * AS0 + N * K > INT32_MAX:
            left, right, k = m.to(tl.int64), n.to(tl.int64), k.to(tl.int64)
        left = a + ((left * AS0)[:, None] + (k * AS1)[None, :])
        right = b + ((k * BS0)[:, None] + (right * BS1)[None, :])
        for start in range(first, stop, BK):
            ok = below(start + tl.arange(0, BK), K, BK)
            x = tl.load(left, mask=rows & ok[None, :], other=0.0)
            y = tl.load(right, mask=ok[:, None] & cols, other=0.0)
            acc = dot(x, y, acc, PRECISION)
            left += BK * AS1
            right += BK * BS0
    if SPLIT > 1:
        store_part(parts, acc, part, m, n, rows & cols, M, N, SPLIT)
    else:
        by_chunks(acc, m, n0, rows, args, N, BM, BN, BN, CHUNKS, EPILOGUE)


@triton.jit
def by_chunks(
    acc, m, n0, rows, args, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TILE: tl.constexpr, CHUNKS: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """The epilogue of BN columns, of a tile of TILE, by chunks.

    Triton runs an operation over the whole tile before the next one, so what an epilogue keeps for
    each element (ten rounds of a random number) is there for all elements at once.
    """
    if CHUNKS == 1:
        n = n0 + tl.arange(0, BN)
        EPILOGUE(acc, 0, m[:, None], n[None, :], 0, 0, rows & below(n, N, TILE)[None, :], args)
    else:
        low, high = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        by_chunks(low, m, n0, rows, args, N, BM, BN // 2, TILE, CHUNKS // 2, EPILOGUE)
        by_chunks(high, m, n0 + BN // 2, rows, args, N, BM, BN // 2, TILE, CHUNKS // 2, EPILOGUE)


@triton.jit
def store_part(parts, acc, part, m, n, mask, M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr):
    """A tile of one part of a sum, as it is, into parts[SPLIT, M, N]."""
    row = part * M + m
    if SPLIT * M * N > INT32_MAX:
        row = row.to(tl.int64)
    tl.store(parts + ((row * N)[:, None] + n[None, :]), acc, mask=mask)


@triton.jit
def add_parts(
    parts, args,
    M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    EPILOGUE: tl.constexpr, AT: tl.constexpr = None,
):  # fmt: skip
    """The sum of parts[SPLIT, M, N], first part first, and the epilogue."""
    m = program(1, AT) * BM + tl.arange(0, BM)
    n = program(0, AT) * BN + tl.arange(0, BN)
    mask = below(m, M, BM)[:, None] & below(n, N, BN)[None, :]
    row = m
    if SPLIT * M * N > INT32_MAX:
        row = m.to(tl.int64)
    at = parts + ((row * N)[:, None] + n[None, :])
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in tl.static_range(SPLIT):
        acc += tl.load(at, mask=mask, other=0.0)
        at += M * N
    EPILOGUE(acc, 0, m[:, None], n[None, :], 0, 0, mask, args)
