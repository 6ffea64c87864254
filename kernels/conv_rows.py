"""Convolution forward and its input gradient from boxes of channels-last images.

For one pixel of the result a convolution is a plain product, [images, taps and channels] times
[taps and channels, K]: rows of a tile are images, and the copy engine (TMA) fetches both operands.
Read as [H, images, W C], the pixels that one row of taps meets are one run of S C values; read as
[taps, K, S C], so are the filters. So the forward sum goes along whole runs (SPAN), in blocks that
may cross from tap to tap: 96 channels go in blocks of 64. What a block holds beyond its run is
multiplied by the descriptor's zeros in the filters (a NaN in the neighbouring pixel would pass).
Taps outside of the image are left out, rows past the last image are zeros.

Each pixel has its own number of taps: `order` starts with the longest sums, so that the last
programs to start are the short ones. Columns are fastest, neighbours in time share x in L2. Where
the columns are few, two neighbouring pixels share every tile of the filters (PIXELS = 2): half as
many bytes of filters for each product, a few more zeros at the border.

Tiles, in bf16: 128x128x64 with 4 warps and 3 stages twice on a processor (96 KiB, 168 registers),
128x256x64 with 8 warps and 4 stages once. BT is a second accumulator: 96 columns are 64 + 32.
Limits: a batch that is no multiple of BM wastes rows; the gradient is for stride 1 alone. TF32
products take K-major operands (the summed axis innermost), so its gradient reads the filters from
a copy with their result channels innermost ("turned").
"""

import triton
import triton.language as tl

from .common import dot, inside
from .leave import in_pieces


@triton.jit
def tile_at(
    t, order,
    N: tl.constexpr, K: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, PIXELS: tl.constexpr,
    BM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(first column, row and column of the pixel, first image) of the t-th tile of a group."""
    ACROSS: tl.constexpr = (OW + PIXELS - 1) // PIXELS
    TILES: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    pixel = t // TILES % (OH * ACROSS)
    n0 = t // (TILES * OH * ACROSS) * (BM // PIXELS)
    if order is not None:
        pixel = tl.load(order + pixel)
    return t % TILES * COLUMNS, pixel // ACROSS, pixel % ACROSS * PIXELS, n0


@triton.jit
def sum_at(
    oh, ow,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, OFFH: tl.constexpr, OFFW: tl.constexpr,
    STEPH: tl.constexpr, STEPW: tl.constexpr, SPAN: tl.constexpr, PIXELS: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Where the sum of a pixel, or of a pair, starts: (row and column of the image at tap (0, 0),
    first tap down and across that meets the image, blocks of a row of taps, blocks in all)."""
    h0 = oh * SH + OFFH
    v0 = ow * SW + OFFW
    r0, rows = inside(h0, STEPH, H, R)
    # A tap counts for a pair if it meets the image from either pixel.
    s0, cols = inside(v0 + (PIXELS - 1), STEPW, W + (PIXELS - 1), S)
    if SPAN:
        blocks = tl.cdiv(cols * C, BK)
    else:
        blocks = cols * ((C + BK - 1) // BK)
    # A prologue divides by the blocks even where there is nothing to sum.
    return h0, v0, r0, s0, tl.maximum(blocks, 1), rows * blocks


@triton.jit
def block_at(
    it, h0, v0, r0, s0, blocks,
    C: tl.constexpr, S: tl.constexpr, STEPH: tl.constexpr, STEPW: tl.constexpr,
    SPAN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """(row of the image, its pixel, row of the filters, first summed value) of the it-th block."""
    BLOCKS: tl.constexpr = (C + BK - 1) // BK
    r = r0 + it // blocks
    if SPAN:
        v = v0
        tap = r
        c = s0 * C + it % blocks * BK
    else:
        s = s0 + it % blocks // BLOCKS
        v = v0 + s * STEPW
        tap = r * S + s
        c = it % BLOCKS * BK
    return h0 + r * STEPH, v, tap, c


@triton.jit
def filter_box(
    w, g, tap, k0, c0,
    K: tl.constexpr, FILTERS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The tile of BK summed values from c0 by BN result channels from k0."""
    if FILTERS == "forward":
        box = w.load([tap, g * K + k0, c0]).reshape(BN, BK).T
    elif FILTERS == "turned":
        box = w.load([tap, g, k0, c0]).reshape(BN, BK).T
    else:
        box = w.load([g, c0, tap * K + k0]).reshape(BK, BN)
    return box


@triton.jit
def conv2d_rows(
    x, w, w2, order, moments, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, OFFH: tl.constexpr, OFFW: tl.constexpr,
    STEPH: tl.constexpr, STEPW: tl.constexpr, G: tl.constexpr,
    SPAN: tl.constexpr, FILTERS: tl.constexpr, PIXELS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    AT_ONCE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, STORED: tl.constexpr,
    EPILOGUE: tl.constexpr,
):  # fmt: skip
    """A program makes PIXELS neighbours of BM / PIXELS images, K channels of a group as columns.

    Tap (r, s) of pixel (oh, ow) is pixel (oh SH + OFFH + r STEPH, ...) of x; C channels of one of
    G groups are summed up. x is a descriptor of [H, N, W G C], of [H, W, N, C] for two pixels. w
    holds the filters, and w2 those of the second accumulator's boxes: "forward" [rows of taps, G K,
    S C] if SPAN, else [taps, G K, C]; "gradient" [G, C, taps K], "turned" [taps, G, K, C]. order
    has a number of each pixel (of each pair), None for the order of storage. A tile is one of
    the PARTS of the moments of what is STORED (moments.py).
    Grid: (column tiles, pixels, images; groups).
    """
    BI: tl.constexpr = BM // PIXELS
    g = tl.program_id(1)
    k0, oh, ow, n0 = tile_at(tl.program_id(0), order, N, K, OH, OW, PIXELS, BM, BN + BT)
    h0, v0, r0, s0, blocks, total = sum_at(
        oh, ow, C, H, W, R, S, SH, SW, OFFH, OFFW, STEPH, STEPW, SPAN, PIXELS, BK
    )  # fmt: skip
    acc = tl.zeros((BM, BN), tl.float32)
    if BT > 0:
        acc2 = tl.zeros((BM, BT), tl.float32)
    for it in range(total):
        h, v, tap, c = block_at(it, h0, v0, r0, s0, blocks, C, S, STEPH, STEPW, SPAN, BK)
        if PIXELS == 1:
            a = x.load([h, n0, (v * G + g) * C + c])
        else:
            a = x.load([h, v, n0, c])
        a = a.reshape(BM, BK)
        acc = dot(a, filter_box(w, g, tap, k0, c, K, FILTERS, BK, BN), acc, PRECISION)
        if BT > 0:
            b = filter_box(w2, g, tap, k0 + BN, c, K, FILTERS, BK, BT)
            acc2 = dot(a, b, acc2, PRECISION)
    row = tl.arange(0, BM)[:, None]
    n = n0 + row
    live = n < N
    part = (n0 // BI * OH + oh) * ((OW + PIXELS - 1) // PIXELS) + ow // PIXELS
    if PIXELS > 1:
        n = n0 + row % BI
        ow += row // BI
        live = (n < N) & (ow < OW)
    at = n, oh, ow, live, part
    in_pieces(
        acc, g * K, k0, at, moments, args, K, G * K, BM, BN, AT_ONCE, PARTS, STORED, EPILOGUE
    )  # fmt: skip
    if BT > 0:
        in_pieces(
            acc2, g * K, k0 + BN, at, moments, args,
            K, G * K, BM, BT, AT_ONCE, PARTS, STORED, EPILOGUE,
        )  # fmt: skip
