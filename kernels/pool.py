"""Pooling. One thread an element; windows are unrolled, so they should stay small (up to 7x7).

Gradients gather: each input pixel visits the windows that hold it. No atomics, no scatter.
"""

import triton
import triton.language as tl

from .common import unflatten


@triton.jit
def window_max(
    base, oh, ow, live,
    H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PT: tl.constexpr, PL: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    XS2: tl.constexpr, XS3: tl.constexpr,
):  # fmt: skip
    """(maximum, row-major place of the first one) of the windows of output pixels (oh, ow).

    `base` points at pixel (0, 0) of each element's image and channel. NaN wins.
    """
    # Where no window leaves the image there is no tap to mask.
    INSIDE: tl.constexpr = (
        PT == 0 and PL == 0
        and (OH - 1) * SH + (KH - 1) * DH < H and (OW - 1) * SW + (KW - 1) * DW < W
    )  # fmt: skip
    best = tl.full(base.shape, float("-inf"), tl.float32)
    place = tl.zeros(base.shape, tl.int32)
    top = oh * SH - PT
    left = ow * SW - PL
    corner = base + (top * XS2 + left * XS3)
    for r in tl.static_range(KH):
        for s in tl.static_range(KW):
            ok = live
            if not INSIDE:
                ih = top + r * DH
                iw = left + s * DW
                ok = live & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            # The interpreter has no bf16 constant but 0.
            v = tl.load(corner + (r * DH * XS2 + s * DW * XS3), mask=ok, other=0.0).to(tl.float32)
            better = (v > best) | (v != v)
            if not INSIDE:
                better = better & ok
            best = tl.where(better, v, best)
            place = tl.where(better, r * KW + s, place)
    return best, place


@triton.jit
def window_grad(
    dy, index, ih, iw, live,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, DS2: tl.constexpr, DS3: tl.constexpr,
    IS2: tl.constexpr, IS3: tl.constexpr,
):  # fmt: skip
    """The sum of dy over the windows whose index names input pixel (ih, iw); `dy` and `index`
    point at output pixel (0, 0) of each element's image and channel."""
    acc = tl.zeros(dy.shape, tl.float32)
    for r in tl.static_range(KH):
        for s in tl.static_range(KW):
            th = ih + PT - r * DH
            tw = iw + PL - s * DW
            oh = th // SH
            ow = tw // SW
            ok = live & (th >= 0) & (tw >= 0) & (oh < OH) & (ow < OW)
            ok = ok & (th % SH == 0) & (tw % SW == 0)
            place = tl.load(index + (oh * IS2 + ow * IS3), mask=ok, other=255).to(tl.int32)
            mine = ok & (place == r * KW + s)
            acc += tl.load(dy + (oh * DS2 + ow * DS3), mask=mine, other=0.0).to(tl.float32)
    return acc


@triton.jit
def maxpool2d(
    x, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    NHWC: tl.constexpr, BLOCK: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """acc is the maximum, aux the row-major place of the first one in its window; NaN wins."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < N * C * OH * OW
    n, c, oh, ow = unflatten(i, C, OH, OW, NHWC)
    best, place = window_max(
        x + n * XS0 + c * XS1, oh, ow, live,
        H, W, OH, OW, KH, KW, SH, SW, PT, PL, DH, DW, XS2, XS3,
    )  # fmt: skip
    EPILOGUE(best, place, n, c, oh, ow, live, args)


@triton.jit
def maxpool2d_grad(
    dy, index, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    DS0: tl.constexpr, DS1: tl.constexpr, DS2: tl.constexpr, DS3: tl.constexpr,
    IS0: tl.constexpr, IS1: tl.constexpr, IS2: tl.constexpr, IS3: tl.constexpr,
    NHWC: tl.constexpr, BLOCK: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """acc is the sum of dy over the windows whose index names this pixel."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < N * C * H * W
    n, c, ih, iw = unflatten(i, C, H, W, NHWC)
    acc = window_grad(
        dy + n * DS0 + c * DS1, index + n * IS0 + c * IS1, ih, iw, live,
        OH, OW, KH, KW, SH, SW, PT, PL, DH, DW, DS2, DS3, IS2, IS3,
    )  # fmt: skip
    EPILOGUE(acc, 0, n, c, ih, iw, live, args)


@triton.jit
def divisor(
    oh, ow, H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    PB: tl.constexpr, PR: tl.constexpr, COUNT_PAD: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """What the sum of a window is divided by, as torch counts it."""
    h0 = oh * SH - PT
    w0 = ow * SW - PL
    h1 = tl.minimum(h0 + KH, H + PB)
    w1 = tl.minimum(w0 + KW, W + PR)
    if DIVISOR > 0:
        return (h1 - h0) * 0 + DIVISOR
    if COUNT_PAD:
        return (h1 - h0) * (w1 - w0)
    rows = tl.minimum(h1, H) - tl.maximum(h0, 0)
    return rows * (tl.minimum(w1, W) - tl.maximum(w0, 0))


@triton.jit
def window_share(
    dy, ih, iw, live,
    H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PT: tl.constexpr, PL: tl.constexpr, PB: tl.constexpr, PR: tl.constexpr,
    COUNT_PAD: tl.constexpr, DIVISOR: tl.constexpr, DS2: tl.constexpr, DS3: tl.constexpr,
):  # fmt: skip
    """The sum of dy / divisor over the windows that hold input pixel (ih, iw); `dy` points at
    output pixel (0, 0) of each element's image and channel."""
    acc = tl.zeros(dy.shape, tl.float32)
    for r in tl.static_range(KH):
        for s in tl.static_range(KW):
            th = ih + PT - r
            tw = iw + PL - s
            oh = th // SH
            ow = tw // SW
            ok = live & (th >= 0) & (tw >= 0) & (oh < OH) & (ow < OW)
            ok = ok & (th % SH == 0) & (tw % SW == 0)
            count = divisor(oh, ow, H, W, KH, KW, SH, SW, PT, PL, PB, PR, COUNT_PAD, DIVISOR)
            share = tl.load(dy + (oh * DS2 + ow * DS3), mask=ok, other=0.0).to(tl.float32)
            acc += tl.where(ok, share / count.to(tl.float32), 0.0)
    return acc


@triton.jit
def avgpool2d(
    x, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    PB: tl.constexpr, PR: tl.constexpr, COUNT_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    NHWC: tl.constexpr, BLOCK: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """acc is the mean of the window."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < N * C * OH * OW
    n, c, oh, ow = unflatten(i, C, OH, OW, NHWC)
    acc = tl.zeros((BLOCK,), tl.float32)
    for r in tl.static_range(KH):
        for s in tl.static_range(KW):
            ih = oh * SH - PT + r
            iw = ow * SW - PL + s
            ok = live & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
            at = x + n * XS0 + c * XS1 + ih * XS2 + iw * XS3
            acc += tl.load(at, mask=ok, other=0.0).to(tl.float32)
    count = divisor(oh, ow, H, W, KH, KW, SH, SW, PT, PL, PB, PR, COUNT_PAD, DIVISOR)
    EPILOGUE(acc / count.to(tl.float32), 0, n, c, oh, ow, live, args)


@triton.jit
def avgpool2d_grad(
    dy, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    PB: tl.constexpr, PR: tl.constexpr, COUNT_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    DS0: tl.constexpr, DS1: tl.constexpr, DS2: tl.constexpr, DS3: tl.constexpr,
    NHWC: tl.constexpr, BLOCK: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """acc is the sum of dy / divisor over the windows that hold this pixel."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < N * C * H * W
    n, c, ih, iw = unflatten(i, C, H, W, NHWC)
    acc = window_share(
        dy + n * DS0 + c * DS1, ih, iw, live,
        H, W, OH, OW, KH, KW, SH, SW, PT, PL, PB, PR, COUNT_PAD, DIVISOR, DS2, DS3,
    )  # fmt: skip
    EPILOGUE(acc, 0, n, c, ih, iw, live, args)


@triton.jit
def adaptive_avgpool2d(
    x, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    NHWC: tl.constexpr, BLOCK: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """acc is the mean over rows floor(oh H/OH) to ceil((oh+1) H/OH), likewise columns."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < N * C * OH * OW
    n, c, oh, ow = unflatten(i, C, OH, OW, NHWC)
    h0 = oh * H // OH
    h1 = ((oh + 1) * H + OH - 1) // OH
    w0 = ow * W // OW
    w1 = ((ow + 1) * W + OW - 1) // OW
    acc = tl.zeros((BLOCK,), tl.float32)
    for r in range((H + OH - 1) // OH + 1):
        for s in range((W + OW - 1) // OW + 1):
            ok = live & (h0 + r < h1) & (w0 + s < w1)
            at = x + n * XS0 + c * XS1 + (h0 + r) * XS2 + (w0 + s) * XS3
            acc += tl.load(at, mask=ok, other=0.0).to(tl.float32)
    EPILOGUE(acc / ((h1 - h0) * (w1 - w0)).to(tl.float32), 0, n, c, oh, ow, live, args)


@triton.jit
def adaptive_avgpool2d_grad(
    dy, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr,
    DS0: tl.constexpr, DS1: tl.constexpr, DS2: tl.constexpr, DS3: tl.constexpr,
    NHWC: tl.constexpr, BLOCK: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """acc is the sum of dy / window size over the windows that hold this pixel."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < N * C * H * W
    n, c, ih, iw = unflatten(i, C, H, W, NHWC)
    acc = tl.zeros((BLOCK,), tl.float32)
    for r in range(OH // H + 2):
        for s in range(OW // W + 2):
            oh = ih * OH // H + r
            ow = iw * OW // W + s
            ok = live & (oh * H < (ih + 1) * OH) & (ow * W < (iw + 1) * OW)
            rows = ((oh + 1) * H + OH - 1) // OH - oh * H // OH
            cols = ((ow + 1) * W + OW - 1) // OW - ow * W // OW
            at = dy + n * DS0 + c * DS1 + oh * DS2 + ow * DS3
            ok = ok & (oh < OH) & (ow < OW)
            share = tl.load(at, mask=ok, other=0.0).to(tl.float32) / (rows * cols).to(tl.float32)
            acc += tl.where(ok, share, 0.0)
    EPILOGUE(acc, 0, n, c, ih, iw, live, args)
