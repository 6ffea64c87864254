"""Max-pools between a channels-last image and a row-major pooled one, which a flatten reads.

A tile is pixels by channels of one image. It is read along the channels and written along the
pixels, or the reverse, each in the order of storage; the turn goes through shared memory. Epilogues
get the number of the pixel in its image as the last index and 0 as the row (see chunks.py).
"""

import triton
import triton.language as tl

from .chunks import landed
from .common import INT32_MAX
from .pool import window_max


@triton.jit
def maxpool2d_tiles(
    x, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """BM pixels of the pooled image by BN channels; x is channels-last."""
    ACROSS: tl.constexpr = (C + BN - 1) // BN
    n = tl.program_id(0) // ACROSS
    if N * H * W * C > INT32_MAX:
        n = n.to(tl.int64)
    p = tl.arange(0, BM)[:, None]
    if OH * OW > BM:
        p += tl.program_id(1) * BM
    c = tl.program_id(0) % ACROSS * BN + tl.arange(0, BN)[None, :]
    live = p < OH * OW
    if C % BN != 0:
        live = live & (c < C)
    base = x + n * (H * W * C) + (c + p * 0)
    best, first = window_max(
        base, p // OW, p % OW, live, H, W, OH, OW, KH, KW, SH, SW, PT, PL, DH, DW, W * C, C
    )
    EPILOGUE(best, first, n, c, 0, p, live, args)


@triton.jit
def with_window(
    sums, value, place, NEXT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """The sums of a block's pixels with what lands on them from window NEXT: one window after the
    other, because all of them at once fill the registers."""
    out = ()
    for k in tl.static_range(SH * SW):
        out = out + (
            landed(
                sums[k], value, place,
                k // SW + NEXT // ACROSS * SH, k % SW + NEXT % ACROSS * SW, KH, KW,
            ),
        )  # fmt: skip
    return out


@triton.jit
def maxpool2d_grad_tiles(
    dy, index, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """BN channels of one image: dy, row-major, is read once and gathered along its pixels by the
    blocks of SH x SW pixels of the result; index is channels-last. BM covers either's pixels."""
    BH: tl.constexpr = (H + PT + SH - 1) // SH
    BW: tl.constexpr = (W + PL + SW - 1) // SW
    ACROSS: tl.constexpr = (KW + SW - 1) // SW
    WINDOWS: tl.constexpr = (KH + SH - 1) // SH * ACROSS
    TILES: tl.constexpr = (C + BN - 1) // BN
    n = tl.program_id(0) // TILES
    if N * H * W * C > INT32_MAX:
        n = n.to(tl.int64)
    p = tl.arange(0, BM)[:, None]
    c = tl.program_id(0) % TILES * BN + tl.arange(0, BN)[None, :]
    whole = p < OH * OW
    live = p < BH * BW
    if C % BN != 0:
        whole = whole & (c < C)
        live = live & (c < C)
    g = tl.load(dy + n * (OH * OW * C) + (c * (OH * OW) + p), mask=whole, other=0.0)
    a = p // BW
    b = p % BW
    sums = ()
    for k in tl.static_range(SH * SW):  # noqa: B007
        sums = sums + (tl.zeros((BM, BN), tl.float32),)
    for k in tl.static_range(WINDOWS):
        oh = a - k // ACROSS
        ow = b - k % ACROSS
        ok = (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
        q = tl.where(ok, oh * OW + ow, 0)
        at = index + n * (OH * OW * C) + (q * C + c)
        place = tl.load(at, mask=live & ok, other=255).to(tl.int32)
        value = tl.gather(g, tl.broadcast_to(q, (BM, BN)), 0)
        sums = with_window(sums, value, place, k, KH, KW, SH, SW, ACROSS)
    top = a * SH - PT
    left = b * SW - PL
    for k in tl.static_range(SH * SW):
        ok = live & (top < H - k // SW) & (left < W - k % SW)
        if PT > 0:
            ok = ok & (top >= -(k // SW))
        if PL > 0:
            ok = ok & (left >= -(k % SW))
        EPILOGUE(sums[k], 0, n, c, 0, top * W + left + (k // SW * W + k % SW), ok, args)
