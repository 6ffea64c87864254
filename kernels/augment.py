"""Augmentation: from stored images to the net's input in one pass.

A program makes BLOCK pixels of one image, all channels of them. What is drawn for the image is
drawn by every one of its programs, once each and in scalars: four Philox calls, shared by the
pixels. Then a pixel's place is worked out once, and each channel gathers the four stored values
around it (one, where nothing warps). Bandwidth-bound; neighbours read neighbours, so the gathers of
bytes stay in L1, but they are single bytes: that is the limit. Only what a constexpr asks for is
in the code.
"""

import triton
import triton.language as tl


@triton.jit
def _words(seed, row, epoch, K: tl.constexpr, STREAM: tl.constexpr):
    """Words 4 K to 4 K + 3 of a sample, each in [0, 2^32) as int64."""
    wide = row.to(tl.uint64)
    zero = (wide & 0).to(tl.uint32)
    a, b, c, d = tl.philox(
        seed, zero + K, (wide & 0xFFFFFFFF).to(tl.uint32), epoch.to(tl.uint32), zero + STREAM
    )
    low: tl.constexpr = 0xFFFFFFFF
    return (a.to(tl.int64) & low, b.to(tl.int64) & low, c.to(tl.int64) & low, d.to(tl.int64) & low)


@triton.jit
def _unit(word):
    """[0, 1), exact in fp32."""
    return (word >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def _both(word):
    """[-1, 1)."""
    return 2.0 * _unit(word) - 1.0


@triton.jit
def _turn(t):
    """(cos, sin) of t half turns, |t| <= 2, by their series around the nearest quarter.

    The library's go through an array in local memory for angles that never come here.
    """
    quarter = tl.floor(2.0 * t + 0.5)
    x = (t - 0.5 * quarter) * 3.141592653589793
    s = x * x
    sin = x * (1 - s * (1 / 6 - s * (1 / 120 - s * (1 / 5040 - s * (1 / 362880)))))
    cos = 1 - s * (1 / 2 - s * (1 / 24 - s * (1 / 720 - s * (1 / 40320 - s * (1 / 3628800)))))
    q = quarter.to(tl.int32) & 3
    swap = (q & 1) == 1
    c = tl.where(swap, sin, cos)
    d = tl.where(swap, cos, sin)
    return tl.where((q == 1) | (q == 2), -c, c), tl.where(q >= 2, -d, d)


@triton.jit
def _start(word, ROOM: tl.constexpr, PAD: tl.constexpr, CROP: tl.constexpr):
    """Where the cut begins along an axis."""
    if CROP:
        first = ((word >> 16) * (ROOM + 1) >> 16).to(tl.int32) - PAD
    else:
        first = (word & 0).to(tl.int32) + ROOM // 2
    return first


@triton.jit
def _of(C: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, A3: tl.constexpr):
    """The constant of channel C."""
    out: tl.constexpr = A0 if C == 0 else (A1 if C == 1 else (A2 if C == 2 else A3))
    return out


@triton.jit
def _inside(at, SIZE: tl.constexpr):
    """How much of a place lies in the frame: 1 inside, falling to 0 within a pixel of it."""
    return tl.clamp(at + 1.0, 0.0, 1.0) * tl.clamp(SIZE - at, 0.0, 1.0)


@triton.jit
def _tap(base, i, j, live, SH: tl.constexpr, SW: tl.constexpr, XS2: tl.constexpr,
         XS3: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """The stored value at (i, j), in fp32; beyond the image 0, or that of its edge."""
    if EDGE:
        i = tl.minimum(tl.maximum(i, 0), SH - 1)
        j = tl.minimum(tl.maximum(j, 0), SW - 1)
        ok = live
    else:
        ok = live & (i >= 0) & (i < SH) & (j >= 0) & (j < SW)
    return tl.load(base + (i * XS2 + j * XS3), mask=ok, other=0).to(tl.float32)


@triton.jit
def augment(
    x, index, epoch, seed, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    STREAM: tl.constexpr, CROP: tl.constexpr, PAD: tl.constexpr, FLIP: tl.constexpr,
    FH: tl.constexpr, FW: tl.constexpr, RESIZE: tl.constexpr, WARP: tl.constexpr,
    ZOOM: tl.constexpr, LOG_ZOOM: tl.constexpr, LOG_STRETCH: tl.constexpr,
    TURN: tl.constexpr, SLOPE: tl.constexpr, SHIFT: tl.constexpr, LENS: tl.constexpr,
    EDGE: tl.constexpr, COLOUR: tl.constexpr, BRIGHT: tl.constexpr, CONTRAST: tl.constexpr,
    PCA: tl.constexpr, UNIT: tl.constexpr,
    M0: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, M3: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    P00: tl.constexpr, P01: tl.constexpr, P02: tl.constexpr, P03: tl.constexpr,
    P10: tl.constexpr, P11: tl.constexpr, P12: tl.constexpr, P13: tl.constexpr,
    P20: tl.constexpr, P21: tl.constexpr, P22: tl.constexpr, P23: tl.constexpr,
    P30: tl.constexpr, P31: tl.constexpr, P32: tl.constexpr, P33: tl.constexpr,
    BLOCK: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """acc is ((value - M) gain + offset) R at the place that was drawn.

    The image, SH x SW, is seen as FH x FW (RESIZE: another size). The result is H x W, and zero up
    to PH x PW, which a layout of blocks pads it to. FLIP is a 24-bit threshold, TURN in half turns,
    R one over the deviation, P the components times the strength; UNIT makes stored values [0, 1].
    """
    GOES_ON: tl.constexpr = EDGE or RESIZE
    TILES: tl.constexpr = (PH * PW + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    n = program // TILES
    pixel = program % TILES * BLOCK + tl.arange(0, BLOCK)
    oi = pixel // PW
    oj = pixel % PW
    stored = pixel < PH * PW
    live = stored & (oi < H) & (oj < W)

    row = tl.load(index + n)
    now = tl.load(epoch)
    key = tl.load(seed)
    mirror, down, across, zoom = _words(key, row, now, 0, STREAM)
    u = oj.to(tl.float32) + (0.5 - W / 2)
    v = oi.to(tl.float32) + (0.5 - H / 2)
    u = tl.where((mirror >> 8) < FLIP, -u, u)
    top = _start(down, FH + 2 * PAD - H, PAD, CROP)
    left = _start(across, FW + 2 * PAD - W, PAD, CROP)

    if WARP:
        stretch, turn, shear, lens = _words(key, row, now, 1, STREAM)
        shift_down, shift_across, bright, contrast = _words(key, row, now, 2, STREAM)
        half = tl.exp(_both(stretch) * (0.5 * LOG_STRETCH))
        scale = ZOOM * tl.exp(_unit(zoom) * LOG_ZOOM)
        slope = _both(shear) * SLOPE
        cos, sin = _turn(_both(turn) * TURN)
        bent = 1.0 + _both(lens) * (LENS / (W * W / 4 + H * H / 4)) * (u * u + v * v)
        u = u * bent
        v = v * bent
        wide = 1.0 / (scale * half)
        high = half / scale
        ax = (cos + slope * sin) * wide * u + (sin - slope * cos) * wide * v
        ay = cos * high * v - sin * high * u
        ax += left.to(tl.float32) + _both(shift_across) * (SHIFT * W) + (W / 2 - 0.5)
        ay += top.to(tl.float32) + _both(shift_down) * (SHIFT * H) + (H / 2 - 0.5)
        if RESIZE:
            if not EDGE:
                fade = _inside(ay, FH) * _inside(ax, FW)
            ax = (ax + 0.5) * (SW / FW) - 0.5
            ay = (ay + 0.5) * (SH / FH) - 0.5
        fj = tl.floor(ax)
        fi = tl.floor(ay)
        rx = ax - fj
        ry = ay - fi
        i = fi.to(tl.int32)
        j = fj.to(tl.int32)
    else:
        i = oi + top
        j = (u + (W / 2 - 0.5)).to(tl.int32) + left  # whole numbers, also in fp32

    if COLOUR:
        if not WARP:
            shift_down, shift_across, bright, contrast = _words(key, row, now, 2, STREAM)
        gain = 1.0 + _both(contrast) * CONTRAST
        offset = _both(bright) * BRIGHT
        if PCA:
            a, b, c, d = _words(key, row, now, 3, STREAM)
            la = tl.sqrt(-2.0 * tl.log(1.0 - _unit(a)))
            lc = tl.sqrt(-2.0 * tl.log(1.0 - _unit(c)))
            cb, sb = _turn(2.0 * _unit(b))
            cd, sd = _turn(2.0 * _unit(d))
            g0 = la * cb
            g1 = la * sb
            g2 = lc * cd
            g3 = lc * sd

    for ch in tl.static_range(C):
        base = x + n.to(tl.int64) * XS0 + ch * XS1
        if WARP:
            upper = _tap(base, i, j, live, SH, SW, XS2, XS3, GOES_ON) * (1.0 - rx)
            upper += _tap(base, i, j + 1, live, SH, SW, XS2, XS3, GOES_ON) * rx
            lower = _tap(base, i + 1, j, live, SH, SW, XS2, XS3, GOES_ON) * (1.0 - rx)
            lower += _tap(base, i + 1, j + 1, live, SH, SW, XS2, XS3, GOES_ON) * rx
            value = upper * (1.0 - ry) + lower * ry
            if RESIZE and not EDGE:
                value *= fade
        else:
            value = _tap(base, i, j, live, SH, SW, XS2, XS3, EDGE)
        value = value * UNIT - _of(ch, M0, M1, M2, M3)
        if COLOUR:
            value = value * gain + offset
            if PCA:
                value += g0 * _of(ch, P00, P10, P20, P30) + g1 * _of(ch, P01, P11, P21, P31)
                value += g2 * _of(ch, P02, P12, P22, P32) + g3 * _of(ch, P03, P13, P23, P33)
        value = tl.where(live, value * _of(ch, R0, R1, R2, R3), 0.0)
        EPILOGUE(value, 0, n, pixel * 0 + ch, oi, oj, stored, args)
