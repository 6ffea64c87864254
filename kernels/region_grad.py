"""Stages of a region's backward pass: the gradient of a pool, and parts of weight gradients.

A pool's gradient is gathered, one pixel a lane, and stored for the stages behind it: row-major for
the input gradient, whose lanes follow the pixels, and channels-last for the weight gradient, whose
lanes follow the channels.

Of a weight gradient a lane holds KB filters by one row of the filter for one input channel, over
every PARTS-th row of the program's images; QW pixels of a row are unrolled. There is no sum across
lanes: each of the PARTS lanes that share a piece of the filter writes a part of its own, fp32, and
`parts_reduce` adds those of all programs in order.
"""

import triton
import triton.language as tl

from .pool import window_grad, window_share
from .region_lanes import by_column, column, numbers, pixels, row


@triton.jit
def pool_grad(
    first, dy, index, twin, args,
    N: tl.constexpr, IMAGES: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    PB: tl.constexpr, PR: tl.constexpr, COUNT_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    DS0: tl.constexpr, DS1: tl.constexpr, DS2: tl.constexpr, DS3: tl.constexpr,
    IS0: tl.constexpr, IS1: tl.constexpr, IS2: tl.constexpr, IS3: tl.constexpr,
    MAX: tl.constexpr, TWIN: tl.constexpr, BLOCK: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """EPILOGUE gets each pixel's gradient, by the windows whose index names it (MAX) or its share
    of all windows that hold it. What it gives back goes to `twin`, channels-last."""
    TOTAL: tl.constexpr = IMAGES * C * H * W
    for start in range(0, TOTAL, BLOCK):
        i = start + numbers(BLOCK)
        iw = i % W
        ih = i // W % H
        c = i // (W * H) % C
        n = first + i // (W * H * C)
        live = (i < TOTAL) & (n < N)
        at = dy + n * DS0 + c * DS1
        if MAX:
            acc = window_grad(
                at, index + n * IS0 + c * IS1, ih, iw, live,
                OH, OW, KH, KW, SH, SW, PT, PL, 1, 1, DS2, DS3, IS2, IS3,
            )  # fmt: skip
        else:
            acc = window_share(
                at, ih, iw, live, H, W, OH, OW, KH, KW, SH, SW, PT, PL, PB, PR, COUNT_PAD, DIVISOR,
                DS2, DS3,
            )  # fmt: skip
        value = EPILOGUE(acc, 0, n, c, ih, iw, live, args)
        if TWIN:
            tl.store(twin + ((n * H + ih) * W + iw) * C + c, value, mask=live)


@triton.jit
def taps(
    acc, seen, dy, ok, left,
    S: tl.constexpr, SW: tl.constexpr, DW: tl.constexpr, QW: tl.constexpr, OW: tl.constexpr,
    DS3: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The sums of a filter row's taps, and behind them that of dy, with QW more pixels."""
    for q in tl.static_range(QW):
        there = ok
        if OW % QW != 0:
            there = there & (left + q < OW)
        value = tl.load(by_column(dy + q * DS3), mask=there, other=0.0).to(tl.float32)
        more = ()
        for s in tl.static_range(S):
            more = more + (acc[s] + value * seen[q * SW + s * DW],)
        if HAS_BIAS:
            more = more + (acc[S] + value,)
        acc = more
    return acc


@triton.jit
def wgrad(
    first, x, dy, work, args,
    N: tl.constexpr, IMAGES: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    K: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    DS0: tl.constexpr, DS1: tl.constexpr, DS2: tl.constexpr, DS3: tl.constexpr,
    HAS_BIAS: tl.constexpr, KB: tl.constexpr, QW: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """work[program x PARTS + part, K, (r, s, c) and the bias column] from x[N, C, H, W] and
    dy[N, K, OH, OW]."""
    GROUPS: tl.constexpr = (K + KB - 1) // KB
    COLUMNS: tl.constexpr = GROUPS * C * R * PARTS
    COLS: tl.constexpr = R * S * C + HAS_BIAS
    LINES: tl.constexpr = IMAGES * OH
    CHUNKS: tl.constexpr = (OW + QW - 1) // QW
    ACROSS: tl.constexpr = (QW - 1) * SW + (S - 1) * DW + 1
    INSIDE: tl.constexpr = (
        PT <= 0 and PL <= 0 and (OH - 1) * SH - PT + (R - 1) * DH < H
        and (CHUNKS * QW - 1) * SW - PL + (S - 1) * DW < W
    )  # fmt: skip
    for start in range(0, COLUMNS, BLOCK):
        i = start + column(BLOCK)
        k = i % GROUPS + row(KB) * GROUPS
        c = i // GROUPS % C
        r = i // (GROUPS * C) % R
        part = i // (GROUPS * C * R)
        live = i < COLUMNS
        mine = live & (k < K)
        acc = ()
        for _ in tl.static_range(S + HAS_BIAS):
            acc = acc + (tl.zeros((KB, BLOCK), tl.float32),)
        for turn in range((LINES + PARTS - 1) // PARTS * CHUNKS):
            line = part + turn // CHUNKS * PARTS
            left = turn % CHUNKS * QW
            n = first + line // OH
            oh = line % OH
            ok = live & (line < LINES) & (n < N)
            seen = pixels(
                x + n * XS0 + c * XS1, oh * SH - PT + r * DH, left * SW - PL + i * 0, ok,
                H, W, SH, 1, 1, 1, ACROSS, XS2, XS3, INSIDE,
            )  # fmt: skip
            at = dy + n * DS0 + k * DS1 + oh * DS2 + left * DS3
            acc = taps(acc, seen, at, ok & mine, left, S, SW, DW, QW, OW, DS3, HAS_BIAS)
        at = work + ((first // IMAGES * PARTS + part) * K + k) * COLS
        for s in tl.static_range(S):
            tl.store(at + ((r * S + s) * C + c), acc[s], mask=mine)
        if HAS_BIAS:
            tl.store(at + (COLS - 1), acc[S], mask=mine & (c == 0) & (r == 0))
