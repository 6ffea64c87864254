"""Convolution of channels-last images through tensor descriptors: the rows of a tile are images.

For one pixel of the result and one filter tap a convolution is a plain product, [images, C] times
[C, K]. Stored channels-last its operands are boxes of two matrices, [N, H W C] and [K, R S C], so
the copy engine (TMA) fetches a tile by two numbers: no address, no mask and no register of ours.
A tap outside of the image is no zero to multiply by, the loop leaves it out: a 3 x 3 convolution
of 13 x 13 pixels multiplies a tenth less. Rows past the last image are the descriptor's zeros. The
input gradient of a convolution of stride 1 is the same loop with negative steps.

The weight gradient sums over images first, then over the pixels that its tap reaches. In bf16
wgmma reads both operands transposed from shared memory.

Tiles: 128x128x64 with 4 warps and 3 stages takes 96 KiB of shared memory and 154 to 187 registers,
about 60 fewer than conv_taps.py. BT is the second accumulator, as there. Filters that do not lie
channels-last (fp32, tf32) come by pointer.
Limits: a batch that is no multiple of BM wastes rows; BK has to divide the channels of a group.
"""

import triton
import triton.language as tl

from .common import dot
from .reduce import finish_bias, finish_tile


def conv2d_tma_grid(N, OH, OW, K, G, BM, BN, BT, **_):
    """(blocks of images of all pixels, column tiles, groups)."""
    return (triton.cdiv(N, BM) * OH * OW, triton.cdiv(K, BN + BT), G)


def wgrad_tma_grid(C, K, R, S, G, BM, BN, BT, SPLIT, HAS_BIAS, **_):
    """(row tiles, column tiles with one for the bias, parts of all groups)."""
    return (triton.cdiv(K, BM), R * S * triton.cdiv(C, BN + BT) + int(HAS_BIAS), G * SPLIT)


@triton.jit
def inside(start, STEP: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """(first, number) of the i below COUNT with 0 <= start + i STEP < SIZE."""
    if STEP > 0:
        first = tl.cdiv(tl.maximum(-start, 0), STEP)
        end = tl.cdiv(tl.maximum(SIZE - start, 0), STEP)
    else:
        first = tl.cdiv(tl.maximum(start - SIZE + 1, 0), -STEP)
        end = tl.cdiv(tl.maximum(start + 1, 0), -STEP)
    return first, tl.maximum(tl.minimum(end, COUNT) - first, 0)


@triton.jit
def filter_box(
    w, g, k0, c0, tap,
    K: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    WO: tl.constexpr, WI: tl.constexpr, WR: tl.constexpr, WS: tl.constexpr, WG: tl.constexpr,
    BOXED: tl.constexpr, TURNED: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The tile of a tap: BK summed channels from c0 by BN result channels from k0."""
    if not BOXED:
        c = c0 + tl.arange(0, BK)
        k = k0 + tl.arange(0, BN)
        at = g * WG + tap // S * WR + tap % S * WS
        mask = (c < C)[:, None] & (k < K)[None, :]
        box = tl.load(w + at + (c * WI)[:, None] + (k * WO)[None, :], mask=mask, other=0.0)
    elif TURNED:
        box = w.load([g * K + k0, tap * C + c0]).T
    else:
        box = w.load([g * C + c0, tap * K + k0])
    return box


@triton.jit
def conv2d_tma(
    x, w, w2, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, OFFH: tl.constexpr, OFFW: tl.constexpr,
    STEPH: tl.constexpr, STEPW: tl.constexpr, G: tl.constexpr,
    WO: tl.constexpr, WI: tl.constexpr, WR: tl.constexpr, WS: tl.constexpr, WG: tl.constexpr,
    BOXED: tl.constexpr, TURNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """A program makes one pixel (oh, ow) of BM images, K channels of one group as columns.

    Tap (r, s) of it is pixel (oh SH + OFFH + r STEPH, ...) of x; C channels of a group are summed
    up. x is a descriptor of [N, H W G C]. w is one of the stored filters, [filters, taps and
    channels], TURNED where a filter is a column of the result, and w2 has the boxes of the second
    accumulator; where not BOXED, both are the pointer, and the strides are those of conv_taps.py.
    """
    BLOCKS: tl.constexpr = C // BK
    g = tl.program_id(2)
    n0 = tl.program_id(0) // (OH * OW) * BM
    oh = tl.program_id(0) // OW % OH
    ow = tl.program_id(0) % OW
    k0 = tl.program_id(1) * (BN + BT)
    k = k0 + tl.arange(0, BN)
    h0 = oh * SH + OFFH
    v0 = ow * SW + OFFW
    r0, rows = inside(h0, STEPH, H, R)
    s0, cols = inside(v0, STEPW, W, S)
    acc = tl.zeros((BM, BN), tl.float32)
    if BT > 0:
        k2 = k0 + BN + tl.arange(0, BT)
        acc2 = tl.zeros((BM, BT), tl.float32)
    for it in range(rows * cols * BLOCKS):
        c0 = it % BLOCKS * BK
        r = r0 + it // BLOCKS // cols
        s = s0 + it // BLOCKS % cols
        tap = r * S + s
        a = x.load([n0, (((h0 + r * STEPH) * W + v0 + s * STEPW) * G + g) * C + c0])
        b = filter_box(w, g, k0, c0, tap, K, C, S, WO, WI, WR, WS, WG, BOXED, TURNED, BK, BN)
        acc = dot(a, b, acc, PRECISION)
        if BT > 0:
            b = filter_box(
                w2, g, k0 + BN, c0, tap, K, C, S, WO, WI, WR, WS, WG, BOXED, TURNED, BK, BT
            )
            acc2 = dot(a, b, acc2, PRECISION)
    n = (n0 + tl.arange(0, BM))[:, None]
    EPILOGUE(acc, 0, n, (g * K + k)[None, :], oh, ow, (n < N) & (k < K)[None, :], args)
    if BT > 0:
        EPILOGUE(acc2, 0, n, (g * K + k2)[None, :], oh, ow, (n < N) & (k2 < K)[None, :], args)


@triton.jit
def conv2d_wgrad_tma(
    x, x2, dy, work, args, args2,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    EPILOGUE: tl.constexpr, EPILOGUE2: tl.constexpr,
):  # fmt: skip
    """Rows are the K output channels of a group, columns C channels of one tap.

    The reduction runs over blocks of BK images within the pixels that the tap reaches, cut into
    SPLIT parts (see reduce.py). The programs behind the last tap sum dy, the bias gradient. x and
    dy are descriptors of [N, pixels and channels], x2 that of the second accumulator's boxes.
    """
    TILES: tl.constexpr = (C + BN + BT - 1) // (BN + BT)
    CRS: tl.constexpr = R * S * C
    COLS: tl.constexpr = CRS + HAS_BIAS
    BLOCKS: tl.constexpr = (N + BK - 1) // BK
    g = tl.program_id(2) // SPLIT
    part = tl.program_id(2) % SPLIT
    k0 = g * K + tl.program_id(0) * BM
    row = k0 + tl.arange(0, BM)
    rows = row < g * K + K
    tap = tl.program_id(1) // TILES
    if HAS_BIAS and tap == R * S:
        sums = tl.zeros((BK, BM), tl.float32)  # reduced once, after the loop
        PER: tl.constexpr = (OH * OW * BLOCKS + SPLIT - 1) // SPLIT
        for it in range(part * PER, min(part * PER + PER, OH * OW * BLOCKS)):
            sums += dy.load([it % BLOCKS * BK, it // BLOCKS * (G * K) + k0]).to(tl.float32)
        finish_bias(
            tl.sum(sums, 0), row, rows, part, work, args2, K * G, CRS, COLS, SPLIT, EPILOGUE2
        )
    else:
        dh = tap // S * DH - PT
        dw = tap % S * DW - PL
        h0, high = inside(dh, SH, H, OH)
        v0, wide = inside(dw, SW, W, OW)
        total = high * wide * BLOCKS
        per = tl.cdiv(total, SPLIT)
        c0 = tl.program_id(1) % TILES * (BN + BT)
        c = c0 + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        if BT > 0:
            c2 = c0 + BN + tl.arange(0, BT)
            acc2 = tl.zeros((BM, BT), tl.float32)
        for it in range(part * per, tl.minimum(part * per + per, total)):
            n = it % BLOCKS * BK
            oh = h0 + it // BLOCKS // wide
            ow = v0 + it // BLOCKS % wide
            a = dy.load([n, (oh * OW + ow) * (G * K) + k0]).T
            at = (((oh * SH + dh) * W + ow * SW + dw) * G + g) * C + c0
            acc = dot(a, x.load([n, at]), acc, PRECISION)
            if BT > 0:
                acc2 = dot(a, x2.load([n, at + BN]), acc2, PRECISION)
        finish_tile(
            acc, row, tap * C + c, rows[:, None] & (c < C)[None, :], part, work, args, args2,
            K * G, C, R, S, 1, CRS, COLS, SPLIT, False, EPILOGUE, EPILOGUE2,
        )  # fmt: skip
        if BT > 0:
            finish_tile(
                acc2, row, tap * C + c2, rows[:, None] & (c2 < C)[None, :], part, work, args,
                args2, K * G, C, R, S, 1, CRS, COLS, SPLIT, False, EPILOGUE, EPILOGUE2,
            )  # fmt: skip
