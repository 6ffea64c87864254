"""The fully connected products, with torch's weight layout [out, in].

One product kernel serves forward (b is the transposed weight) and input gradient by strides alone;
the weight gradient differs by its split, its bias column and its update.

Tiles: products 16 to 128 a side, BK 32 to 128; 128x128 with 4 warps holds 128 accumulators a
thread (ieee products run on FMAs and want 64x64). The weight gradient, whose epilogue is the
optimizer update, stays within 32 accumulators a thread (64x64 with 4 warps), above which it spills.
Limit: there is no split along K, so a small batch times a small layer leaves processors idle.
"""

import triton
import triton.language as tl

from .common import INT32_MAX, dot
from .reduce import finish_bias, finish_tile


def matmul_grid(M, N, BM, BN, **_):
    """(row tiles, column tiles): neighbours share a tile of b, which is the weight."""
    return (triton.cdiv(M, BM), triton.cdiv(N, BN))


def linear_wgrad_grid(K, C, BM, BN, SPLIT, HAS_BIAS, **_):
    """(row tiles, column tiles, parts)."""
    return (triton.cdiv(K, BM), triton.cdiv(C + int(HAS_BIAS), BN), SPLIT)


@triton.jit
def matmul(
    a, b, args,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    AS0: tl.constexpr, AS1: tl.constexpr, BS0: tl.constexpr, BS1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """acc[m, n] = sum over k of a[m, k] b[k, n]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left = a + (m.to(tl.int64) * AS0)[:, None] + (k * AS1)[None, :]
    right = b + (n.to(tl.int64) * BS1)[None, :] + (k * BS0)[:, None]
    rows = (m < M)[:, None]
    cols = (n < N)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        ok = k < K - start
        x = tl.load(left, mask=rows & ok[None, :], other=0.0)
        y = tl.load(right, mask=ok[:, None] & cols, other=0.0)
        acc = dot(x, y, acc, PRECISION)
        left += BK * AS1
        right += BK * BS0
    EPILOGUE(acc, 0, m[:, None], n[None, :], 0, 0, rows & cols, args)


@triton.jit
def linear_wgrad(
    x, dy, work, args, args2,
    N: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, DS0: tl.constexpr, DS1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    EPILOGUE: tl.constexpr, EPILOGUE2: tl.constexpr,
):  # fmt: skip
    """Rows are the K outputs, columns the C inputs and, behind them, the bias gradient.

    The reduction over the N rows of the batch is cut into SPLIT parts (see reduce.py). Where C is
    a multiple of BN the bias column starts a tile: that program sums dy and multiplies nothing.
    Elsewhere it is a column of ones beside the last columns of x.
    """
    COLS: tl.constexpr = C + HAS_BIAS
    PER: tl.constexpr = ((N + BK - 1) // BK + SPLIT - 1) // SPLIT * BK
    ALONE: tl.constexpr = HAS_BIAS and C % BN == 0
    BESIDE: tl.constexpr = HAS_BIAS and C % BN != 0
    part = tl.program_id(2)
    k = tl.program_id(0) * BM + tl.arange(0, BM)
    q = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = k < K
    if ALONE and tl.program_id(1) * BN == C:
        sums = tl.zeros((BM, BK), tl.float32)  # reduced once, after the loop
        for start in range(0, PER, BK):
            n = part * PER + start + tl.arange(0, BK)
            live = n < N
            if N * DS0 > INT32_MAX:
                n = n.to(tl.int64)
            a = tl.load(
                dy + ((n * DS0)[None, :] + (k * DS1)[:, None]),
                mask=rows[:, None] & live[None, :],
                other=0.0,
            )
            sums += a.to(tl.float32)
        finish_bias(tl.sum(sums, 1), k, rows, part, work, args2, K, C, COLS, SPLIT, EPILOGUE2)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, PER, BK):
            n = part * PER + start + tl.arange(0, BK)
            live = n < N
            if N * DS0 + N * XS0 > INT32_MAX:
                n = n.to(tl.int64)
            a = tl.load(
                dy + ((n * DS0)[None, :] + (k * DS1)[:, None]),
                mask=rows[:, None] & live[None, :],
                other=0.0,
            )
            b = tl.load(
                x + ((n * XS0)[:, None] + (q * XS1)[None, :]),
                mask=live[:, None] & (q < C)[None, :],
                other=0.0,
            )
            if BESIDE:
                b = tl.where((q == C)[None, :] & live[:, None], 1.0, b.to(tl.float32))
            acc = dot(a, b, acc, PRECISION)
        mask = rows[:, None] & (q < COLS)[None, :]
        finish_tile(
            acc, k, q, mask, part, work, args, args2,
            K, C, 1, 1, 1, C, COLS, SPLIT, BESIDE, EPILOGUE, EPILOGUE2,
        )  # fmt: skip
