"""Weight gradient of a convolution of channels-last images through tensor descriptors.

Stored channels-last, x and dy are matrices, [N, H W C], and the copy engine (TMA) fetches a box of
images at a pixel by two numbers: no address, no mask and no register of ours. The sum runs over
images first, then over the pixels that its tap reaches. In bf16 wgmma reads both operands
transposed from shared memory.

Tiles: 128x128x64 with 4 warps and 3 stages takes 96 KiB of shared memory and 154 to 187 registers,
about 60 fewer than conv_taps.py. BT is the second accumulator, as there.
"""

import triton
import triton.language as tl

from .common import dot, inside
from .reduce import finish_bias, finish_tile


def wgrad_tma_grid(C, K, R, S, G, BM, BN, BT, SPLIT, HAS_BIAS, **_):
    """(row tiles, column tiles with one for the bias, parts of all groups)."""
    return (triton.cdiv(K, BM), R * S * triton.cdiv(C, BN + BT) + int(HAS_BIAS), G * SPLIT)


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
