"""The weight gradient of fully connected layers, dw = dy^T x, and the update that follows it.

The product is small beside the state it updates: for every weight a few tensors are read and
written, so memory decides. PRELOAD asks for what the update reads of a tile before the product
begins, which hides the product behind those loads (an H100 reaches 93 % of its bandwidth so).
Neighbouring programs share rows of the weight. The bias gradient has programs of its own, one for
each tile of rows, that sum dy and multiply nothing: no odd column disturbs 16-byte accesses.

Tiles: 64x64x64 with 4 warps, 32 accumulators a thread beside 32 values of each tensor of the
update; above that it spills. A reduction over many rows of a batch is cut into SPLIT parts, which
`linear.add_parts` adds. Where the update runs beside a convolution, PROGRAMS programs walk over the
tiles, so that the other processors are left to that; each tile is computed as before, to the bit.
"""

import triton
import triton.language as tl

from .common import INT32_MAX, below, dot, program
from .linear import store_part


@triton.jit
def batch_tile(
    x, at, first, n, live, cols,
    S0: tl.constexpr, S1: tl.constexpr, N: tl.constexpr, BOXED: tl.constexpr,
):  # fmt: skip
    """Rows n (from `first`) of a batch by columns `at`; zeros beyond it."""
    if BOXED and S0 == 1:  # the batch is innermost
        tile = x.load([at, first]).T
    elif BOXED:
        tile = x.load([first, at])
    else:
        if N * S0 > INT32_MAX:
            n = n.to(tl.int64)
        p = x + ((n * S0)[:, None] + (at * S1)[None, :])
        tile = tl.load(p, mask=live[:, None] & cols[None, :], other=0.0)
    return tile


@triton.jit
def one_tile(
    x, dy, parts, args, args2, across_at, down_at, part,
    N: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, DS0: tl.constexpr, DS1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, BOXED: tl.constexpr, PRECISION: tl.constexpr,
    EPILOGUE: tl.constexpr, EPILOGUE2: tl.constexpr, PRELOAD: tl.constexpr,
):  # fmt: skip
    """Tile (down_at, across_at) of the weight, of the sum's part `part`; behind the last column of
    tiles the bias gradient of these rows."""
    PER: tl.constexpr = ((N + BK - 1) // BK + SPLIT - 1) // SPLIT * BK
    k0 = down_at * BM
    k = k0 + tl.arange(0, BM)
    rows = below(k, K, BM)
    down = k0 if BOXED else k
    if HAS_BIAS and across_at == (C + BN - 1) // BN:
        sums = tl.zeros((BK, BM), tl.float32)  # reduced once, after the loop
        for first in range(0, N if SPLIT == 1 else tl.where(part == 0, N, 0), BK):
            n = first + tl.arange(0, BK)
            live = below(n, N, BK)
            sums += batch_tile(dy, down, first, n, live, rows, DS0, DS1, N, BOXED).to(tl.float32)
        own = rows if SPLIT == 1 else rows & (part == 0)
        EPILOGUE2(tl.sum(sums, 0)[:, None], 0, k[:, None], 0, 0, 0, own[:, None], args2)
    else:
        q0 = across_at * BN
        q = q0 + tl.arange(0, BN)
        cols = below(q, C, BN)
        across = q0 if BOXED else q
        mask = rows[:, None] & cols[None, :]
        held = 0
        if PRELOAD is not None:
            held = PRELOAD(k[:, None], q[None, :], 0, 0, mask, args)
        begin = part * PER if SPLIT > 1 else 0
        stop = tl.minimum(begin + PER, N) if SPLIT > 1 else N
        acc = tl.zeros((BM, BN), tl.float32)
        for first in range(begin, stop, BK):
            n = first + tl.arange(0, BK)
            live = below(n, N, BK)
            a = batch_tile(dy, down, first, n, live, rows, DS0, DS1, N, BOXED)
            b = batch_tile(x, across, first, n, live, cols, XS0, XS1, N, BOXED)
            acc = dot(a.T, b, acc, PRECISION)
        if SPLIT > 1:
            store_part(parts, acc, part, k, q, mask, K, C, SPLIT)
        else:
            EPILOGUE(acc, held, k[:, None], q[None, :], 0, 0, mask, args)


@triton.jit
def linear_wgrad(
    x, dy, parts, args, args2,
    N: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, DS0: tl.constexpr, DS1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, BOXED: tl.constexpr, PRECISION: tl.constexpr, PROGRAMS: tl.constexpr,
    EPILOGUE: tl.constexpr, EPILOGUE2: tl.constexpr, PRELOAD: tl.constexpr,
    AT: tl.constexpr = None,
):  # fmt: skip
    """Rows are the K outputs, columns the C inputs; the sum runs over the N rows of the batch.

    With SPLIT a part goes to parts[SPLIT, K, C], the bias gradient is whole all the same.
    BOXED: x and dy are descriptors of the matrices as they lie, with the batch innermost for TF32,
    whose products take the summed axis so.
    PROGRAMS: that many programs make all tiles, in the order of the grid of one program a tile; 0
    is that grid.
    """
    ACROSS: tl.constexpr = (C + BN - 1) // BN + (1 if HAS_BIAS else 0)
    DOWN: tl.constexpr = (K + BM - 1) // BM
    if PROGRAMS == 0:
        one_tile(
            x, dy, parts, args, args2, program(0, AT), program(1, AT), program(2, AT),
            N, C, K, XS0, XS1, DS0, DS1, BM, BN, BK, SPLIT, HAS_BIAS, BOXED, PRECISION,
            EPILOGUE, EPILOGUE2, PRELOAD,
        )  # fmt: skip
    else:
        for t in tl.range(program(0, AT), ACROSS * DOWN * SPLIT, PROGRAMS, num_stages=1):
            one_tile(
                x, dy, parts, args, args2, t % ACROSS, t // ACROSS % DOWN, t // (ACROSS * DOWN),
                N, C, K, XS0, XS1, DS0, DS1, BM, BN, BK, SPLIT, HAS_BIAS, BOXED, PRECISION,
                EPILOGUE, EPILOGUE2, PRELOAD,
            )  # fmt: skip
