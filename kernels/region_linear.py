"""Stages of a region: small products of fully connected layers, and losses, on a program's rows.

A program owns BM rows of the batch and makes all columns of their results, BN at a time. The weight
is read whole by every program, from the second-level cache: small layers only. Rows are few, so
products in TF32 and bf16 run on 16 x 8 tensor cores, products in fp32 on FMAs.
"""

import triton
import triton.language as tl

from .common import below, dot
from .loss import cross_entropy_rows, multi_margin_rows


@triton.jit
def linear(
    first, a, b, args,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    AS0: tl.constexpr, AS1: tl.constexpr, BS0: tl.constexpr, BS1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    EPILOGUE: tl.constexpr,
):  # fmt: skip
    """acc[m, n] = sum over k of a[m, k] b[k, n] for BM rows from `first` on, all N columns."""
    m = first + tl.arange(0, BM)
    rows = below(m, M, BM)[:, None]
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        cols = below(n, N, BN)[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            ok = below(k, K, BK)
            x = a + ((m * AS0)[:, None] + (k * AS1)[None, :])
            y = b + ((k * BS0)[:, None] + (n * BS1)[None, :])
            left = tl.load(x, mask=rows & ok[None, :], other=0.0)
            right = tl.load(y, mask=ok[:, None] & cols, other=0.0)
            acc = dot(left, right, acc, PRECISION)
        EPILOGUE(acc, 0, m[:, None], n[None, :], 0, 0, rows & cols, args)


@triton.jit
def _put(total, rows, out, first, BM: tl.constexpr, PROGRAMS: tl.constexpr):
    """The sum of a program's losses, or the mean where there is one program."""
    if PROGRAMS == 1:
        tl.store(out, total / rows)
    else:
        tl.store(out + first // BM, total)


@triton.jit
def cross_entropy(
    first, logits, labels, live_ptr, rows_ptr, out, args,
    M: tl.constexpr, C: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PROGRAMS: tl.constexpr,
    SMOOTHING: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """loss.cross_entropy for BM rows from `first` on; `mean_reduce` adds what programs put out."""
    live = tl.load(live_ptr).to(tl.float32)
    rows = live if rows_ptr is None else tl.load(rows_ptr).to(tl.float32)
    total = cross_entropy_rows(
        logits, labels, live, rows, args, first + tl.arange(0, BM), M, C, S0, S1, BN, SMOOTHING,
        LOSS, GRAD, EPILOGUE,
    )  # fmt: skip
    if LOSS:
        _put(total, rows, out, first, BM, PROGRAMS)


@triton.jit
def multi_margin(
    first, logits, labels, live_ptr, rows_ptr, out, args,
    M: tl.constexpr, C: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PROGRAMS: tl.constexpr,
    MARGIN: tl.constexpr, DIVISOR: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr,
    EPILOGUE: tl.constexpr,
):  # fmt: skip
    """loss.multi_margin for BM rows from `first` on; `mean_reduce` adds what programs put out."""
    live = tl.load(live_ptr).to(tl.float32)
    rows = live if rows_ptr is None else tl.load(rows_ptr).to(tl.float32)
    total = multi_margin_rows(
        logits, labels, live, rows, args, first + tl.arange(0, BM), M, C, S0, S1, BN, MARGIN,
        DIVISOR, LOSS, GRAD, EPILOGUE,
    )  # fmt: skip
    if LOSS:
        _put(total, rows, out, first, BM, PROGRAMS)
