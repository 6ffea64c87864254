"""A stage of a region: convolution, activation and pool of a program's images, by FMAs.

Few channels fill no matrix unit. A lane holds KB channels of one tile of TH x TW pixels of the
convolution: the window of one pooled pixel, so that the pool is a maximum over registers and the
convolution's result is written only where somebody else reads it. A weight then serves TH x TW
products and a pixel KB. Tensors are [KB, BLOCK]: with BLOCK threads, each holds a column.

The loop over input channels and filter rows stays a loop; what is unrolled is one filter row.
Windows that overlap compute what they share several times. The input gradient is the same loop over
dy, with the filter turned around and, for a stride, zeros between its pixels (UH, UW).
"""

import triton
import triton.language as tl

from .pool import divisor
from .region_lanes import by_column, column, pixels, row


@triton.jit
def filter_row(
    acc, seen, w, ok,
    S: tl.constexpr, SW: tl.constexpr, DW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    ACROSS: tl.constexpr, WS3: tl.constexpr,
):  # fmt: skip
    """The sums with one row of the filters times the pixels that it meets."""
    for s in tl.static_range(S):
        value = tl.load(by_column(w + s * WS3), mask=ok, other=0.0).to(tl.float32)
        more = ()
        for y in tl.static_range(TH):
            for t in tl.static_range(TW):
                more = more + (acc[y * TW + t] + seen[y * ACROSS + t * SW + s * DW] * value,)
        acc = more
    return acc


@triton.jit
def conv(
    first, x, w, bias, args,
    N: tl.constexpr, IMAGES: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    K: tl.constexpr, CH: tl.constexpr, CW: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PT: tl.constexpr, PL: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    UH: tl.constexpr, UW: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    WS0: tl.constexpr, WS1: tl.constexpr, WS2: tl.constexpr, WS3: tl.constexpr,
    WAT: tl.constexpr, HAS_BIAS: tl.constexpr,
    POOL: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, TSH: tl.constexpr, TSW: tl.constexpr,
    TPT: tl.constexpr, TPL: tl.constexpr, TPB: tl.constexpr, TPR: tl.constexpr,
    COUNT_PAD: tl.constexpr, DIVISOR: tl.constexpr,
    KB: tl.constexpr, BLOCK: tl.constexpr,
    EPILOGUE: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """x[N, C, H, W] and w[K, C, R, S] to a result of CH x CW pixels, of images `first` to
    `first` + IMAGES.

    Tiles of TH x TW pixels, TSH and TSW apart, start at (-TPT, -TPL); there are OH x OW. POOL says
    what becomes of one: "max" (value and row-major place of the first maximum), "avg", or "none",
    where each pixel is a result. EPILOGUE gets the convolution's pixels and, before a pool, gives
    back what is pooled; POOLED gets the pooled ones. The filter starts at w + WAT.
    """
    GROUPS: tl.constexpr = (K + KB - 1) // KB
    TILES: tl.constexpr = IMAGES * GROUPS * OH * OW
    ACROSS: tl.constexpr = (TW - 1) * SW + (S - 1) * DW + 1
    # Where no tile leaves the image there is no pixel to mask.
    INSIDE: tl.constexpr = (
        TPT * SH + PT <= 0 and TPL * SW + PL <= 0
        and (((OH - 1) * TSH - TPT + TH - 1) * SH - PT) + (R - 1) * DH < H * UH
        and (((OW - 1) * TSW - TPL + TW - 1) * SW - PL) + (S - 1) * DW < W * UW
    )  # fmt: skip
    WHOLE: tl.constexpr = (
        TPT == 0 and TPL == 0 and (OH - 1) * TSH + TH <= CH and (OW - 1) * TSW + TW <= CW
    )
    for start in range(0, TILES, BLOCK):
        i = start + column(BLOCK)
        ow = i % OW
        oh = i // OW % OH
        n = first + i // (OW * OH * GROUPS)
        live = (i < TILES) & (n < N)
        top = oh * TSH - TPT
        left = ow * TSW - TPL
        k = i // (OW * OH) % GROUPS * KB + row(KB)
        mine = live & (k < K)
        zero = tl.zeros((KB, BLOCK), tl.float32)
        if HAS_BIAS:
            zero += tl.load(by_column(bias + k), mask=mine, other=0.0).to(tl.float32)
        acc = ()
        for _ in tl.static_range(TH * TW):
            acc = acc + (zero,)
        image = x + n * XS0
        filters = w + (k * WS0 + WAT)
        for turn in range(C * R):
            c = turn // R
            r = turn % R
            seen = pixels(
                image + c * XS1, top * SH - PT + r * DH, left * SW - PL, live,
                H, W, SH, UH, UW, TH, ACROSS, XS2, XS3, INSIDE,
            )  # fmt: skip
            at = filters + (c * WS1 + r * WS2)
            acc = filter_row(acc, seen, at, mine, S, SW, DW, TH, TW, ACROSS, WS3)
        best = tl.full((KB, BLOCK), 0.0 if POOL == "avg" else float("-inf"), tl.float32)
        place = tl.zeros((KB, BLOCK), tl.int32)
        for y in tl.static_range(TH):
            for t in tl.static_range(TW):
                value = acc[y * TW + t]
                inside = mine
                if not WHOLE:
                    inside = inside & (top + y >= 0) & (top + y < CH)
                    inside = inside & (left + t >= 0) & (left + t < CW)
                if POOL == "none":
                    EPILOGUE(value, 0, n, k, top + y, left + t, inside, args)
                else:
                    if EPILOGUE is not None:
                        value = EPILOGUE(value, 0, n, k, top + y, left + t, inside, args)
                    if POOL == "max":
                        better = (value > best) | (value != value)
                        if not WHOLE:
                            better = better & inside
                        best = tl.where(better, value, best)
                        place = tl.where(better, y * TW + t, place)
                    else:
                        best += value if WHOLE else tl.where(inside, value, 0.0)
        if POOL == "avg":
            count = divisor(
                oh, ow, CH, CW, TH, TW, TSH, TSW, TPT, TPL, TPB, TPR, COUNT_PAD, DIVISOR
            )
            best = best / count.to(tl.float32)
        if POOL != "none":
            POOLED(best, place, n, k, oh, ow, mine, args)
