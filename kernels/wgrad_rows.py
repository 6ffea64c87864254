"""Weight gradient of a convolution of channels-last images: a filter row is one run of columns.

For one pixel of the result, the taps of a filter row lie side by side in memory: S C values of the
image row that start at pixel ow - PL. Seen as [H, N, W C], an image batch therefore holds a tile
of BK images by some columns of a filter row as one box, and the copy engine fetches it by three
numbers. What a tap reads beyond the border, above, below, left or right, is beyond the descriptor
and comes as zeros; rows of pixels that a filter row does not reach are left out by the host.
Where the taps do not lie side by side (a stride, a dilation, groups) a unit of columns is one tap.

A tile is [K channels, columns of a unit], and its sum runs over the images within the pixels. The
host cuts the sums into segments, one a program, so that all programs finish together; each writes
an fp32 tile of its own, and `segment_reduce` (reduce.py) adds those of a tile in order.

The rows of the accumulators are dy's channels, or with SWAP the columns of x, so that the wider
side can be 256 or 256 + 128 wide. In bf16 wgmma reads both operands transposed from shared memory.
TF32 products take K-major operands alone (the summed axis innermost): x and dy are read from copies
with the images innermost ({hwcn}), as [H, W C, N] and [OH OW K, N]. Turned in registers the same
tiles ran at 44 TFLOP/s on an H100, from copies at 265 to 380.
The bias gradient is one more product, 16 columns wide, of the boxes of dy that the first column
tiles of one unit fetch anyway: programs that only summed dy would fetch all of it once more.

Tiles: 128x256x64 with 8 warps and 4 stages takes 194 KiB of shared memory and 182 registers,
128x(256 + 128)x64 with 3 stages 194 KiB and 250. One program fills a processor.
Limits: a batch that is no multiple of BK multiplies zeros; IEEE products on FMAs are slow.
"""

import triton
import triton.language as tl

from .common import dot


@triton.jit
def segment_at(
    row,
    K: tl.constexpr, C: tl.constexpr, XC: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    COLS: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    KT: tl.constexpr, XT: tl.constexpr,
):  # fmt: skip
    """A row of the table: (slot, first step, steps; unit and block of its columns; row of the image
    for row 0 of the result, first channel of dy, first column in a row of the image)."""
    NKT: tl.constexpr = (K + KT - 1) // KT
    NXT: tl.constexpr = (COLS + XT - 1) // XT
    tile = tl.load(row + 1)
    part = tile // NKT % NXT
    unit = tile // (NKT * NXT) % (R * S)
    g = tile // (NKT * NXT * R * S)
    k0 = g * K + tile % NKT * KT
    dh = unit // S * DH - PT
    at0 = (unit % S * DW - PL) * XC + g * C + part * XT
    return tl.load(row), tl.load(row + 2), tl.load(row + 3), unit, part, dh, k0, at0


@triton.jit
def step_at(
    it, dh, k0, at0,
    BLOCKS: tl.constexpr, OW: tl.constexpr, SH: tl.constexpr, SWC: tl.constexpr,
    DK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(row of the image, first image, column of x, column of dy) of a step."""
    pixel = it // BLOCKS
    h = pixel // OW * SH + dh
    return h, it % BLOCKS * BK, pixel % OW * SWC + at0, pixel * DK + k0


@triton.jit
def gradients(dy, n, at, WIDTH: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr):
    """[WIDTH channels, BK images] of dy; TURNED: the images are innermost."""
    if TURNED:
        box = dy.load([at, n])
    else:
        box = dy.load([n, at]).T
    return box


@triton.jit
def columns(x, h, n, at, WIDTH: tl.constexpr, BK: tl.constexpr, TURNED: tl.constexpr):
    """[WIDTH columns, BK images] of an image row of x."""
    if TURNED:
        box = x.load([h, at, n]).reshape(WIDTH, BK)
    else:
        box = x.load([h, n, at]).reshape(BK, WIDTH).T
    return box


@triton.jit
def wgrad_segment(
    x, x2, dy, dy2, out, sums_out, first, count, dh, k0, at0,
    BLOCKS: tl.constexpr, OW: tl.constexpr, SH: tl.constexpr, SWC: tl.constexpr,
    DK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    SWAP: tl.constexpr, SUMS: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`count` steps of the sum from step `first`, into a tile at `out`; SUMS: those of dy too."""
    XT: tl.constexpr = BM if SWAP else BN + BT
    acc = tl.zeros((BM, BN), tl.float32)
    if BT > 0:
        acc2 = tl.zeros((BM, BT), tl.float32)
    if SUMS:
        one = tl.where(tl.arange(0, 16)[None, :] == 0, 1.0, tl.zeros((BK, 16), tl.float32))
        if PRECISION == "bf16":
            one = one.to(tl.bfloat16)
        sums = tl.zeros((BN if SWAP else BM, 16), tl.float32)
        if SWAP and BT > 0:
            sums2 = tl.zeros((BT, 16), tl.float32)
    for it in range(first, first + count):
        h, n, at, k = step_at(it, dh, k0, at0, BLOCKS, OW, SH, SWC, DK, BK)
        if SWAP:
            a = columns(x, h, n, at, BM, BK, TURNED)
            d = gradients(dy, n, k, BN, BK, TURNED)
            acc = dot(a, d.T, acc, PRECISION)
            if BT > 0:
                d2 = gradients(dy2, n, k + BN, BT, BK, TURNED)
                acc2 = dot(a, d2.T, acc2, PRECISION)
                if SUMS:
                    sums2 = dot(d2, one, sums2, PRECISION)
        else:
            d = gradients(dy, n, k, BM, BK, TURNED)
            acc = dot(d, columns(x, h, n, at, BN, BK, TURNED).T, acc, PRECISION)
            if BT > 0:
                acc2 = dot(d, columns(x2, h, n, at + BN, BT, BK, TURNED).T, acc2, PRECISION)
        if SUMS:
            sums = dot(d, one, sums, PRECISION)
    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    if SWAP:
        tl.store(out + j * XT + i, acc)
    else:
        tl.store(out + i * XT + j, acc)
    if BT > 0:
        j2 = BN + tl.arange(0, BT)[None, :]
        if SWAP:
            tl.store(out + j2 * XT + i, acc2)
        else:
            tl.store(out + i * XT + j2, acc2)
    if SUMS:
        tl.store(sums_out + tl.arange(0, BN if SWAP else BM), tl.sum(sums, 1))
        if SWAP and BT > 0:
            tl.store(sums_out + BN + tl.arange(0, BT), tl.sum(sums2, 1))


@triton.jit
def conv2d_wgrad_rows(
    x, x2, dy, dy2, work, segments,
    N: tl.constexpr, C: tl.constexpr, XC: tl.constexpr, K: tl.constexpr, OW: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, COLS: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PT: tl.constexpr, PL: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    SWAP: tl.constexpr, SEGMENTS: tl.constexpr, CARRIER: tl.constexpr, TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Each program sums one segment, (slot, tile, first step, steps), into work[slot, KT, XT].

    A tile is KT channels of dy by XT columns. A step is BK images at one pixel: images first, then
    the pixels of the whole result, row by row. Tiles count, fastest first, blocks of K channels,
    blocks of the COLS columns of a unit, units (R rows, or R S taps where S is not 1) and groups.
    A group has C channels of the XC of a pixel and K of dy's. The first column tiles of unit
    CARRIER, if it is not negative, leave the sums of dy behind all tiles, as work[SEGMENTS, KT].
    x is a descriptor of [H, N, W XC], dy of [N, OH OW G K], TURNED of [H, W XC, N] and [OH OW G K,
    N]; x2 or dy2 are the second accumulator's boxes.
    """
    KT: tl.constexpr = BN + BT if SWAP else BM
    XT: tl.constexpr = BM if SWAP else BN + BT
    BLOCKS: tl.constexpr = (N + BK - 1) // BK
    row = segments + 4 * tl.program_id(0)
    slot, first, count, unit, part, dh, k0, at0 = segment_at(
        row, K, C, XC, R, S, COLS, PT, PL, DH, DW, KT, XT
    )
    out = work + slot * (KT * XT)
    sums = work + SEGMENTS * (KT * XT) + slot * KT
    if CARRIER < 0:
        wgrad_segment(
            x, x2, dy, dy2, out, sums, first, count, dh, k0, at0, BLOCKS, OW, SH, SW * XC,
            G * K, BM, BN, BT, BK, SWAP, False, TURNED, PRECISION,
        )  # fmt: skip
    elif (unit == CARRIER) & (part == 0):
        wgrad_segment(
            x, x2, dy, dy2, out, sums, first, count, dh, k0, at0, BLOCKS, OW, SH, SW * XC,
            G * K, BM, BN, BT, BK, SWAP, True, TURNED, PRECISION,
        )  # fmt: skip
    else:
        wgrad_segment(
            x, x2, dy, dy2, out, sums, first, count, dh, k0, at0, BLOCKS, OW, SH, SW * XC,
            G * K, BM, BN, BT, BK, SWAP, False, TURNED, PRECISION,
        )  # fmt: skip
