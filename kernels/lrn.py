"""Local response normalization, alone and fused with a max-pool before or behind it.

A tile is BP pixels by all channels (BC, a power of two): channels are innermost in the layouts
that matter, so a window is a few loads at neighbouring addresses, served by the first-level cache.
(A band matrix in `tl.dot` takes 20 s to compile and 20 kB of stack; `tl.gather` needs BC / 32
shuffles for each neighbour.) BP * BC is 1,024 with 4 warps, 8 elements a thread: the gradient,
which needs the scale of each neighbour, takes 110 to 130 registers there and spills at four times
the size.

Where one kernel does both, the value in between goes through global memory that only this program
reads: a buffer that is a result anyway (the pooled image), or BP pixels of private scratch, which
stays in the second-level cache. `tl.debug_barrier` is a block barrier and makes a block's own
stores visible to it.
"""

import triton
import triton.language as tl

from .common import INT32_MAX, cast_store, rounded
from .pool import window_grad, window_max


@triton.jit
def pixels(N: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SPAN: tl.constexpr,
           start, BP: tl.constexpr):  # fmt: skip
    """(n, h, w, whether it exists) of BP pixels from `start`, as columns [BP, 1].

    int64 where an operand of SPAN elements needs it.
    """
    m = start + tl.arange(0, BP)
    live = (m < N * H * W)[:, None]
    n = m // (H * W)
    if SPAN > INT32_MAX:
        n = n.to(tl.int64)
    return n[:, None], (m // W % H)[:, None], (m % W)[:, None], live


@triton.jit
def beside(near, c, C: tl.constexpr, PER: tl.constexpr):
    """Whether a channel exists, in the group of PER channels that c is in."""
    ok = (near >= 0) & (near < C)
    if PER < C:
        ok = ok & (near // PER == c // PER)
    return ok


@triton.jit
def scale(x, c, live, C: tl.constexpr, PER: tl.constexpr, XS1: tl.constexpr, LOW: tl.constexpr,
          HIGH: tl.constexpr, K: tl.constexpr, A: tl.constexpr):  # fmt: skip
    """K + A times the sum of squares over those of channels c - LOW to c + HIGH that are in its
    group; `x` points at channel c."""
    total = tl.zeros(x.shape, tl.float32)
    for j in tl.static_range(LOW + HIGH + 1):
        near = c + (j - LOW)
        ok = live & beside(near, c, C, PER)
        v = tl.load(x + (j - LOW) * XS1, mask=ok, other=0.0).to(tl.float32)
        total += v * v
    return K + A * total


@triton.jit
def power(s, BETA: tl.constexpr):
    """s^-BETA; 0.75 by square roots."""
    if BETA == 0.75:
        r = tl.rsqrt(s)
        out = r * tl.sqrt(r)
    else:
        out = tl.exp2(-BETA * tl.log2(s))
    return out


@triton.jit
def normalised(
    x, c, live, C: tl.constexpr, PER: tl.constexpr, XS1: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, K: tl.constexpr, A: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """x s^-BETA at the pointers `x`."""
    v = tl.load(x, mask=live & (c < C), other=0.0).to(tl.float32)
    return v * power(scale(x, c, live, C, PER, XS1, LOW, HIGH, K, A), BETA)


@triton.jit
def gradient(x, dy, c, live, C: tl.constexpr, PER: tl.constexpr, XS1: tl.constexpr,
             DS1: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, K: tl.constexpr,
             A: tl.constexpr, BETA: tl.constexpr):  # fmt: skip
    """dy s^-BETA - 2 A BETA x sum of dy_j x_j s_j^(-BETA - 1) over the j whose window holds c."""
    held = tl.zeros(x.shape, tl.float32)
    own = tl.zeros(x.shape, tl.float32)
    direct = tl.zeros(x.shape, tl.float32)
    for j in tl.static_range(LOW + HIGH + 1):
        near = c + (j - HIGH)
        ok = live & beside(near, c, C, PER)
        v = tl.load(x + (j - HIGH) * XS1, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(dy + (j - HIGH) * DS1, mask=ok, other=0.0).to(tl.float32)
        s = scale(x + (j - HIGH) * XS1, near, ok, C, PER, XS1, LOW, HIGH, K, A)
        d = g * power(s, BETA)
        held += tl.where(ok, d * v / s, 0.0)  # outside s may be 0
        if j == HIGH:
            own = v
            direct = d
    return direct - (2.0 * A * BETA) * own * held


@triton.jit
def lrn(
    x, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, PER: tl.constexpr, K: tl.constexpr, A: tl.constexpr,
    BETA: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    n, h, w, live = pixels(N, H, W, N * XS0, tl.program_id(0) * BP, BP)
    c = tl.arange(0, BC)[None, :]
    at = x + (n * XS0 + h * XS2 + w * XS3 + c * XS1)
    y = normalised(at, c, live, C, PER, XS1, LOW, HIGH, K, A, BETA)
    EPILOGUE(y, 0, n, c, h, w, live & (c < C), args)


@triton.jit
def lrn_grad(
    x, dy, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    DS0: tl.constexpr, DS1: tl.constexpr, DS2: tl.constexpr, DS3: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, PER: tl.constexpr, K: tl.constexpr, A: tl.constexpr,
    BETA: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    n, h, w, live = pixels(N, H, W, N * (XS0 + DS0), tl.program_id(0) * BP, BP)
    c = tl.arange(0, BC)[None, :]
    image = x + (n * XS0 + h * XS2 + w * XS3 + c * XS1)
    above = dy + (n * DS0 + h * DS2 + w * DS3 + c * DS1)
    dx = gradient(image, above, c, live, C, PER, XS1, DS1, LOW, HIGH, K, A, BETA)
    EPILOGUE(dx, 0, n, c, h, w, live & (c < C), args)


@triton.jit
def maxpool2d_lrn(
    x, pooled, args, args2,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    PS0: tl.constexpr, PS1: tl.constexpr, PS2: tl.constexpr, PS3: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, PER: tl.constexpr, K: tl.constexpr, A: tl.constexpr,
    BETA: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, EPILOGUE: tl.constexpr, EPILOGUE2: tl.constexpr,
):  # fmt: skip
    """lrn(maxpool2d(x)). EPILOGUE writes `pooled` and the index, EPILOGUE2 what is normalised."""
    n, oh, ow, live = pixels(N, OH, OW, N * (XS0 + PS0), tl.program_id(0) * BP, BP)
    c = tl.arange(0, BC)[None, :]
    ok = live & (c < C)
    base = x + (n * XS0 + c * XS1)
    best, place = window_max(
        base, oh, ow, ok, H, W, OH, OW, KH, KW, SH, SW, PT, PL, DH, DW, XS2, XS3
    )
    EPILOGUE(best, place, n, c, oh, ow, ok, args)
    tl.debug_barrier()
    at = pooled + (n * PS0 + oh * PS2 + ow * PS3 + c * PS1)
    y = normalised(at, c, live, C, PER, PS1, LOW, HIGH, K, A, BETA)
    EPILOGUE2(y, 0, n, c, oh, ow, ok, args2)


@triton.jit
def lrn_maxpool2d(
    x, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, PER: tl.constexpr, K: tl.constexpr, A: tl.constexpr,
    BETA: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, ROUND: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """maxpool2d(lrn(x)). Each pixel of a window is normalised when it is read: 9/4 of the work
    for windows of 3 at stride 2, and no image in between. ROUND is the type of that image."""
    n, oh, ow, live = pixels(N, OH, OW, N * XS0, tl.program_id(0) * BP, BP)
    c = tl.arange(0, BC)[None, :]
    base = x + (n * XS0 + c * XS1)
    best = tl.full(base.shape, float("-inf"), tl.float32)
    place = tl.zeros(base.shape, tl.int32)
    for tap in range(KH * KW):
        ih = oh * SH - PT + tap // KW * DH
        iw = ow * SW - PL + tap % KW * DW
        ok = live & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        v = normalised(base + (ih * XS2 + iw * XS3), c, ok, C, PER, XS1, LOW, HIGH, K, A, BETA)
        v = rounded(v, ROUND)  # ties are those of the image that is not written
        better = ok & ((v > best) | (v != v))
        best = tl.where(better, v, best)
        place = tl.where(better, tap, place)
    EPILOGUE(best, place, n, c, oh, ow, live & (c < C), args)


@triton.jit
def lrn_grad_maxpool2d_grad(
    x, dy, index, scratch, margs, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    DS0: tl.constexpr, DS1: tl.constexpr, DS2: tl.constexpr, DS3: tl.constexpr,
    IS0: tl.constexpr, IS1: tl.constexpr, IS2: tl.constexpr, IS3: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, PER: tl.constexpr, K: tl.constexpr, A: tl.constexpr,
    BETA: tl.constexpr,
    ROWS: tl.constexpr, PROGRAMS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    MIDDLE: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """maxpool2d_grad(MIDDLE(lrn_grad(x, dy)), index), for lrn(maxpool2d(...)) upstream.

    A task is ROWS rows of one image's gradient: the pooled rows that they hang on are normalised
    back into scratch[program], NEED rows of them, then each pixel gathers from there. ROWS 8
    repeats a quarter of the first part for windows of 3 at stride 2.
    """
    REACH: tl.constexpr = (KH - 1) * DH
    NEED: tl.constexpr = (ROWS - 1 + REACH) // SH + 1
    BLOCKS: tl.constexpr = (H + ROWS - 1) // ROWS
    c = tl.arange(0, BC)[None, :]
    mine = scratch + tl.program_id(0).to(tl.int64) * (NEED * OW * C)
    for task in range(tl.program_id(0), N * BLOCKS, PROGRAMS):
        n = task // BLOCKS
        if N * (XS0 + DS0 + H * W * C) > INT32_MAX:
            n = n.to(tl.int64)
        top = task % BLOCKS * ROWS
        # The first pooled row whose window reaches row `top`.
        first = tl.maximum(top + PT - REACH + SH - 1, 0) // SH
        for start in range(0, NEED * OW, BP):
            m = start + tl.arange(0, BP)[:, None]
            oh = first + m // OW
            ow = m % OW
            live = (m < NEED * OW) & (oh < OH)
            ok = live & (c < C)
            image = x + (n * XS0 + oh * XS2 + ow * XS3 + c * XS1)
            above = dy + (n * DS0 + oh * DS2 + ow * DS3 + c * DS1)
            dp = gradient(image, above, c, live, C, PER, XS1, DS1, LOW, HIGH, K, A, BETA)
            dp = MIDDLE(dp, 0, n, c, oh, ow, ok, margs)
            cast_store(mine + (m * C + c), dp, ok)
        tl.debug_barrier()
        for start in range(0, ROWS * W, BP):
            m = start + tl.arange(0, BP)[:, None]
            ih = top + m // W
            iw = m % W
            live = (m < ROWS * W) & (ih < H) & (c < C)
            dx = window_grad(
                mine + (c - first * (OW * C)), index + (n * IS0 + c * IS1), ih, iw, live,
                OH, OW, KH, KW, SH, SW, PT, PL, DH, DW, OW * C, C, IS2, IS3,
            )  # fmt: skip
            EPILOGUE(dx, 0, n, c, ih, iw, live, args)
        tl.debug_barrier()  # the next task writes the scratch again


@triton.jit
def maxpool2d_grad_lrn_grad(
    x, dy, index, scratch, margs, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    DS0: tl.constexpr, DS1: tl.constexpr, DS2: tl.constexpr, DS3: tl.constexpr,
    IS0: tl.constexpr, IS1: tl.constexpr, IS2: tl.constexpr, IS3: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, PER: tl.constexpr, K: tl.constexpr, A: tl.constexpr,
    BETA: tl.constexpr,
    PROGRAMS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    MIDDLE: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """lrn_grad(x, MIDDLE(maxpool2d_grad(dy, index))), for maxpool2d(lrn(x)) upstream.

    A task is BP pixels: they gather into scratch[program], then each reads its neighbours there.
    """
    c = tl.arange(0, BC)[None, :]
    p = tl.arange(0, BP)[:, None]
    mine = scratch + (tl.program_id(0).to(tl.int64) * (BP * C) + p * C + c)
    for task in range(tl.program_id(0), (N * H * W + BP - 1) // BP, PROGRAMS):
        n, h, w, live = pixels(N, H, W, N * (XS0 + DS0), task * BP, BP)
        ok = live & (c < C)
        dn = window_grad(
            dy + (n * DS0 + c * DS1), index + (n * IS0 + c * IS1), h, w, ok,
            OH, OW, KH, KW, SH, SW, PT, PL, DH, DW, DS2, DS3, IS2, IS3,
        )  # fmt: skip
        cast_store(mine, MIDDLE(dn, 0, n, c, h, w, ok, margs), ok)
        tl.debug_barrier()
        image = x + (n * XS0 + h * XS2 + w * XS3 + c * XS1)
        dx = gradient(image, mine, c, live, C, PER, XS1, 1, LOW, HIGH, K, A, BETA)
        EPILOGUE(dx, 0, n, c, h, w, ok, args)
        tl.debug_barrier()
