"""Convolution of channels-last images, one filter tap at a time: tiles lie inside a tap.

The reduction runs over (tap, block of channels) in one loop, so that every load of a tile is a run
of BK channels at one pixel: 16 bytes a thread where the channels are a multiple of 8 (bf16), which
Triton turns into asynchronous copies that feed wgmma. What conv.py works out for each element
(which tap, which pixel) is here a scalar for the loop and a column for the rows. The input
gradient of a convolution of stride 1 is the same loop with negative steps.

A tile is BN columns wide and, where BT is not 0, BT more in a second accumulator that shares the
rows: 96 channels are 64 + 32 and waste nothing, though a block is a power of two.

Tiles: 128x128x64 with 4 warps and 3 stages takes 96 KiB of shared memory and about 200 registers.
Limits: pixels outside the image are masked, not skipped; channels that are no multiple of BK
waste the rest of their block.
"""

import triton
import triton.language as tl

from .common import INT32_MAX, dot
from .leave import in_pieces
from .reduce import finish_bias, finish_tile


@triton.jit
def conv2d_taps(
    x, w, moments, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, OFFH: tl.constexpr, OFFW: tl.constexpr,
    STEPH: tl.constexpr, STEPW: tl.constexpr, G: tl.constexpr,
    XS0: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr, XG: tl.constexpr,
    WO: tl.constexpr, WI: tl.constexpr, WR: tl.constexpr, WS: tl.constexpr, WG: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, AT_ONCE: tl.constexpr, PARTS: tl.constexpr, STORED: tl.constexpr,
    EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Rows are the pixels (n, oh, ow) of the result, columns the K channels of one group.

    Tap (r, s) of result pixel (oh, ow) is pixel (oh SH + OFFH + r STEPH, ...) of x; C channels of
    a group are summed up. w is addressed by its strides of result channel (WO), summed channel
    (WI), tap row (WR) and column (WS) and group (WG). AT_ONCE, PARTS
    and STORED: see leave.py.
    """
    BLOCKS: tl.constexpr = (C + BK - 1) // BK
    g = tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * (BN + BT) + tl.arange(0, BN)
    i = tl.arange(0, BK)
    n = m // (OH * OW)
    oh = (m // OW) % OH
    ow = m % OW
    live = m < N * OH * OW
    h0 = oh * SH + OFFH
    w0 = ow * SW + OFFW
    base = n * XS0 if N * XS0 <= INT32_MAX else n.to(tl.int64) * XS0
    rows = x + g * XG + (base + h0 * XS2 + w0 * XS3)[:, None] + i[None, :]
    cols = w + g * WG + (k * WO)[None, :] + (i * WI)[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    if BT > 0:
        k2 = tl.program_id(1) * (BN + BT) + BN + tl.arange(0, BT)
        cols2 = w + g * WG + (k2 * WO)[None, :] + (i * WI)[:, None]
        acc2 = tl.zeros((BM, BT), tl.float32)
    for it in range(R * S * BLOCKS):
        tap = it // BLOCKS
        c0 = it % BLOCKS * BK
        r = tap // S
        s = tap % S
        h = h0 + r * STEPH
        v = w0 + s * STEPW
        ok = (live & (h >= 0) & (h < H) & (v >= 0) & (v < W))[:, None]
        there = (k < K)[None, :]
        if C % BK != 0:
            ok = ok & (i < C - c0)[None, :]
            there = there & (i < C - c0)[:, None]
        a = tl.load(rows + (r * STEPH * XS2 + s * STEPW * XS3 + c0), mask=ok, other=0.0)
        at = c0 * WI + r * WR + s * WS
        acc = dot(a, tl.load(cols + at, mask=there, other=0.0), acc, PRECISION)
        if BT > 0:
            there = (k2 < K)[None, :]
            if C % BK != 0:
                there = there & (i < C - c0)[:, None]
            acc2 = dot(a, tl.load(cols2 + at, mask=there, other=0.0), acc2, PRECISION)
    at = n[:, None], oh[:, None], ow[:, None], live[:, None], tl.program_id(0)
    k0 = tl.program_id(1) * (BN + BT)
    in_pieces(
        acc, g * K, k0, at, moments, args, K, G * K, BM, BN, AT_ONCE, PARTS, STORED, EPILOGUE
    )  # fmt: skip
    if BT > 0:
        in_pieces(
            acc2, g * K, k0 + BN, at, moments, args,
            K, G * K, BM, BT, AT_ONCE, PARTS, STORED, EPILOGUE,
        )  # fmt: skip


@triton.jit
def conv2d_wgrad_taps(
    x, dy, work, args, args2,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr,
    XS0: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    DS0: tl.constexpr, DS2: tl.constexpr, DS3: tl.constexpr,
    CG: tl.constexpr, FR: tl.constexpr, FS: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    EPILOGUE: tl.constexpr, EPILOGUE2: tl.constexpr,
):  # fmt: skip
    """Rows are the K output channels of a group, columns C channels of one tap.

    The reduction over pixels is cut into SPLIT parts (see reduce.py). The programs behind the last
    tap sum dy over the pixels, which is the bias gradient. (CG, FR, FS, BLOCK) is the filter as
    the result sees it: with space-to-depth, BLOCK x BLOCK of its taps are channels of x.
    """
    TILES: tl.constexpr = (C + BN + BT - 1) // (BN + BT)
    CRS: tl.constexpr = R * S * C
    COLS: tl.constexpr = CRS + HAS_BIAS
    P: tl.constexpr = N * OH * OW
    PER: tl.constexpr = ((P + BK - 1) // BK + SPLIT - 1) // SPLIT * BK
    g = tl.program_id(2) // SPLIT
    part = tl.program_id(2) % SPLIT
    k = tl.program_id(0) * BM + tl.arange(0, BM)
    tap = tl.program_id(1) // TILES
    c = tl.program_id(1) % TILES * (BN + BT) + tl.arange(0, BN)
    i = tl.arange(0, BK)
    row = g * K + k
    rows = k < K
    grads = dy + row
    if HAS_BIAS and tap == R * S:
        sums = tl.zeros((BM, BK), tl.float32)  # reduced once, after the loop
        for start in range(part * PER, part * PER + PER, BK):
            p = start + i
            n = p // (OH * OW)
            at = n * DS0 if N * DS0 <= INT32_MAX else n.to(tl.int64) * DS0
            at = at + (p // OW) % OH * DS2 + p % OW * DS3
            a = tl.load(
                grads[:, None] + at[None, :], mask=rows[:, None] & (p < P)[None, :], other=0.0
            )
            sums += a.to(tl.float32)
        finish_bias(
            tl.sum(sums, 1), row, rows, part, work, args2, K * G, CRS, COLS, SPLIT, EPILOGUE2
        )
    else:
        dh = tap // S * DH - PT
        dw = tap % S * DW - PL
        acc = tl.zeros((BM, BN), tl.float32)
        if BT > 0:
            c2 = tl.program_id(1) % TILES * (BN + BT) + BN + tl.arange(0, BT)
            acc2 = tl.zeros((BM, BT), tl.float32)
        for start in range(part * PER, part * PER + PER, BK):
            p = start + i
            n = p // (OH * OW)
            oh = (p // OW) % OH
            ow = p % OW
            live = p < P
            there = n * DS0 if N * DS0 <= INT32_MAX else n.to(tl.int64) * DS0
            a = tl.load(
                grads[:, None] + (there + oh * DS2 + ow * DS3)[None, :],
                mask=rows[:, None] & live[None, :],
                other=0.0,
            )
            ih = oh * SH + dh
            iw = ow * SW + dw
            ok = live & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            here = n * XS0 if N * XS0 <= INT32_MAX else n.to(tl.int64) * XS0
            here = x + g * C + (here + ih * XS2 + iw * XS3)[:, None]
            b = tl.load(here + c[None, :], mask=ok[:, None] & (c < C)[None, :], other=0.0)
            acc = dot(a, b, acc, PRECISION)
            if BT > 0:
                b = tl.load(here + c2[None, :], mask=ok[:, None] & (c2 < C)[None, :], other=0.0)
                acc2 = dot(a, b, acc2, PRECISION)
        finish_tile(
            acc, row, tap * C + c, rows[:, None] & (c < C)[None, :], part, work, args, args2,
            K * G, CG, FR, FS, BLOCK, CRS, COLS, SPLIT, False, EPILOGUE, EPILOGUE2,
        )  # fmt: skip
        if BT > 0:
            finish_tile(
                acc2, row, tap * C + c2, rows[:, None] & (c2 < C)[None, :], part, work, args,
                args2, K * G, CG, FR, FS, BLOCK, CRS, COLS, SPLIT, False, EPILOGUE, EPILOGUE2,
            )  # fmt: skip
