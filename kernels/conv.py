"""Convolution as implicit GEMM: nothing is unfolded in memory.

The reduction runs over one flattened axis, (r, s, c) with c innermost (forward) or (r, s, k)
(input gradient), so that a tile of it spans filter taps and few channels waste nothing. Each
element's address is worked out in the loop, which costs integer arithmetic: right for small
channel counts, and the limit of this form for large ones. Flattened loops are known to miscompile
with 8 warps on sm_90 (pytorch issue 173068), so the rules give them 4.
"""

import triton
import triton.language as tl

from .common import INTERPRET, dot
from .leave import in_pieces
from .reduce import finish_tile


@triton.jit
def conv2d_forward(
    x, w, moments, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    WS0: tl.constexpr, WS1: tl.constexpr, WS2: tl.constexpr, WS3: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, AT_ONCE: tl.constexpr, PARTS: tl.constexpr, STORED: tl.constexpr,
    EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Rows are output pixels (n, oh, ow), columns the output channels of one group. AT_ONCE,
    PARTS and STORED: see leave.py."""
    CG: tl.constexpr = C // G
    KG: tl.constexpr = K // G
    CRS: tl.constexpr = CG * R * S
    g = tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BN + tl.arange(0, BN)
    n = m // (OH * OW)
    oh = (m // OW) % OH
    ow = m % OW
    live = m < N * OH * OW
    h0 = oh * SH - PT
    w0 = ow * SW - PL
    rows = x + n.to(tl.int64) * XS0 + g * CG * XS1
    cols = w + (g * KG + k) * WS0
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, CRS, BK):
        q = start + tl.arange(0, BK)
        c = q % CG
        r = q // CG // S
        s = q // CG % S
        ih = h0[:, None] + (r * DH)[None, :]
        iw = w0[:, None] + (s * DW)[None, :]
        ok = live[:, None] & (q < CRS)[None, :] & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        a = tl.load(rows[:, None] + ih * XS2 + iw * XS3 + (c * XS1)[None, :], mask=ok, other=0.0)
        b = tl.load(
            cols[None, :] + (c * WS1 + r * WS2 + s * WS3)[:, None],
            mask=(q < CRS)[:, None] & (k < KG)[None, :],
            other=0.0,
        )
        acc = dot(a, b, acc, PRECISION)
    at = n[:, None], oh[:, None], ow[:, None], live[:, None], tl.program_id(0)
    in_pieces(
        acc, g * KG, tl.program_id(1) * BN, at, moments, args,
        KG, K, BM, BN, AT_ONCE, PARTS, STORED, EPILOGUE,
    )  # fmt: skip


@triton.jit
def conv2d_dgrad(
    dy, w, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr,
    DS0: tl.constexpr, DS1: tl.constexpr, DS2: tl.constexpr, DS3: tl.constexpr,
    WS0: tl.constexpr, WS1: tl.constexpr, WS2: tl.constexpr, WS3: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Rows are input pixels, columns the input channels of one group. At a stride above 1 the
    taps that hit no output are masked: right, but a stride^2 share of the work is wasted."""
    CG: tl.constexpr = C // G
    KG: tl.constexpr = K // G
    KRS: tl.constexpr = KG * R * S
    g = tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    n = m // (H * W)
    ih = (m // W) % H
    iw = m % W
    live = m < N * H * W
    rows = dy + n.to(tl.int64) * DS0 + g * KG * DS1
    cols = w + g * KG * WS0 + c * WS1
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, KRS, BK):
        q = start + tl.arange(0, BK)
        k = q % KG
        r = q // KG // S
        s = q // KG % S
        th = (ih + PT)[:, None] - (r * DH)[None, :]
        tw = (iw + PL)[:, None] - (s * DW)[None, :]
        ok = live[:, None] & (q < KRS)[None, :] & (th >= 0) & (tw >= 0)
        ok = ok & (th % SH == 0) & (tw % SW == 0)
        oh = th // SH
        ow = tw // SW
        ok = ok & (oh < OH) & (ow < OW)
        a = tl.load(rows[:, None] + oh * DS2 + ow * DS3 + (k * DS1)[None, :], mask=ok, other=0.0)
        b = tl.load(
            cols[None, :] + (k * WS0 + r * WS2 + s * WS3)[:, None],
            mask=(q < KRS)[:, None] & (c < CG)[None, :],
            other=0.0,
        )
        acc = dot(a, b, acc, PRECISION)
    mask = live[:, None] & (c < CG)[None, :]
    EPILOGUE(acc, 0, n[:, None], (g * CG + c)[None, :], ih[:, None], iw[:, None], mask, args)


@triton.jit
def conv2d_wgrad(
    x, dy, work, args, args2,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    DS0: tl.constexpr, DS1: tl.constexpr, DS2: tl.constexpr, DS3: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    EPILOGUE: tl.constexpr, EPILOGUE2: tl.constexpr,
):  # fmt: skip
    """Rows are output channels, columns the filter (r, s, c) and, behind it, one column of ones,
    whose product with dy is the bias gradient. The reduction over pixels is cut into SPLIT
    contiguous parts: partials go to work[SPLIT, K, columns] and `split_reduce` adds them in
    order. An update in the epilogue spills above 32 accumulators a thread."""
    CG: tl.constexpr = C // G
    KG: tl.constexpr = K // G
    CRS: tl.constexpr = CG * R * S
    COLS: tl.constexpr = CRS + HAS_BIAS
    P: tl.constexpr = N * OH * OW
    PER: tl.constexpr = ((P + BK - 1) // BK + SPLIT - 1) // SPLIT * BK
    g = tl.program_id(2) // SPLIT
    part = tl.program_id(2) % SPLIT
    k = tl.program_id(0) * BM + tl.arange(0, BM)
    q = tl.program_id(1) * BN + tl.arange(0, BN)
    c = q % CG
    r = q // CG // S
    s = q // CG % S
    filters = x + (g * CG + c) * XS1
    grads = dy + (g * KG + k) * DS1
    hr = r * DH - PT
    ws = s * DW - PL
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, PER, BK):
        p = part * PER + start + tl.arange(0, BK)
        live = p < P
        n = (p // (OH * OW)).to(tl.int64)
        oh = (p // OW) % OH
        ow = p % OW
        a = tl.load(
            grads[:, None] + (n * DS0 + oh * DS2 + ow * DS3)[None, :],
            mask=(k < KG)[:, None] & live[None, :],
            other=0.0,
        )
        ih = (oh * SH)[:, None] + hr[None, :]
        iw = (ow * SW)[:, None] + ws[None, :]
        ok = live[:, None] & (q < CRS)[None, :] & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        b = tl.load(filters[None, :] + (n * XS0)[:, None] + ih * XS2 + iw * XS3, mask=ok, other=0.0)
        if HAS_BIAS:
            if INTERPRET:  # which has no bf16 constant but 0
                b = b.to(tl.float32)
            b = tl.where((q == CRS)[None, :] & live[:, None], 1.0, b)
        acc = dot(a, b, acc, PRECISION)
    row = g * KG + k
    mask = (k < KG)[:, None] & (q < COLS)[None, :]
    finish_tile(
        acc, row, q, mask, part, work, args, args2,
        K, CG, R, S, 1, CRS, COLS, SPLIT, HAS_BIAS, EPILOGUE, EPILOGUE2,
    )  # fmt: skip
