"""Kernels whose threads hold a chunk each: 8 adjacent channels of a pixel, channels innermost.

A chunk of bf16 is one access of 16 bytes. What a window over channels needs beyond it (the halo)
comes in aligned loads of 2 to 16 bytes that the first-level cache serves. So nothing goes through
shared memory and no value is shuffled: these kernels run at the speed of the memory.

Tiles are [B, 8]. Where all that an epilogue touches lies like the image (FLAT), it gets the places
in storage [B, 8] as its first index and 0 for the others: one division less for each, and registers
that stay free for loads. Else it gets the channel as [B, 8] and the rest as [B, 1]: the image, 0,
and the number of the pixel in its image, which can stand for row and column because both dense
layouts step from row to row as from pixel to pixel.

Where a result also lies with its images innermost, as TF32's weight gradients read it, neighbouring
threads hold a pixel of IMAGES images by GROUP chunks: with 8 images the stores fill whole sectors
of 32 bytes there, and with 4 chunks the loads take 128 bytes of an image.
"""

import triton
import triton.language as tl

from .common import INT32_MAX, elements
from .lrn import power
from .pool import window_max


@triton.jit
def columns(x, B: tl.constexpr, W: tl.constexpr):
    """The W columns, a power of two up to 8, of a tile [B, W]: [B] each."""
    if W == 1:
        out = (tl.reshape(x, (B,)),)
    elif W == 2:
        out = tl.split(x)
    elif W == 4:
        even, odd = tl.split(tl.reshape(x, (B, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        out = (x0, x1, x2, x3)
    else:
        even, odd = tl.split(tl.reshape(x, (B, 2, 2, 2)))
        even04, even26 = tl.split(even)
        odd15, odd37 = tl.split(odd)
        x0, x4 = tl.split(even04)
        x2, x6 = tl.split(even26)
        x1, x5 = tl.split(odd15)
        x3, x7 = tl.split(odd37)
        out = (x0, x1, x2, x3, x4, x5, x6, x7)
    return out


@triton.jit
def joined(v, B: tl.constexpr):
    """The tile [B, 8] of eight columns: the inverse of `columns`."""
    even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
    odd = tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))
    return tl.reshape(tl.join(even, odd), (B, 8))


@triton.jit
def load_columns(ptr, at, live, B: tl.constexpr, W: tl.constexpr):
    """W channels from element `at` [B] on, as fp32 columns; zeros where not live."""
    if W == 0:
        out = ()
    else:
        where = at[:, None] + tl.arange(0, W)[None, :]
        out = columns(tl.load(ptr + where, mask=live[:, None], other=0.0).to(tl.float32), B, W)
    return out


@triton.jit
def total(values, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """The sum of COUNT entries of a tuple."""
    out = values[FIRST]
    for j in tl.static_range(1, COUNT):
        out += values[FIRST + j]
    return out


@triton.jit
def squares(values):
    out = ()
    for j in tl.static_range(len(values)):
        out = out + (values[j] * values[j],)
    return out


@triton.jit
def normalised_chunk(
    below, own, above, B: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    K: tl.constexpr, A: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """x s^-BETA of eight columns `own` as [B, 8]; `below` and `above` are their halo."""
    x = below + own + above
    sq = squares(x)
    out = ()
    for c in tl.static_range(8):
        s = K + A * total(sq, len(below) + c - LOW, LOW + HIGH + 1)
        out = out + (own[c] * power(s, BETA),)
    return joined(out, B)


@triton.jit
def gradient_chunk(
    x, dy, at, chunk, live, CHUNKS: tl.constexpr, B: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, XW: tl.constexpr, DLOW: tl.constexpr,
    DHIGH: tl.constexpr, K: tl.constexpr, A: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """The gradient of the normalization for chunks at element `at`, [B, 8].

    A channel's gradient sums over the scales of channels HIGH below to LOW above it, each of which
    reaches LOW + HIGH further. XW, DLOW, DHIGH: halo of x on both sides, of dy below and above,
    rounded up to powers of two.
    """
    inner = live & (chunk > 0)
    outer = live & (chunk < CHUNKS - 1)
    xs = load_columns(x, at - XW, inner, B, XW)
    xs = xs + load_columns(x, at, live, B, 8) + load_columns(x, at + 8, outer, B, XW)
    gs = load_columns(dy, at - DLOW, inner, B, DLOW)
    gs = gs + load_columns(dy, at, live, B, 8) + load_columns(dy, at + 8, outer, B, DHIGH)
    sq = squares(xs)
    direct = ()
    held = ()
    for j in tl.static_range(-HIGH, 8 + LOW):  # the channel, counted from the chunk's first
        s = K + A * total(sq, XW + j - LOW, LOW + HIGH + 1)
        if BETA == 0.75:
            r = tl.rsqrt(s)
            d = gs[DLOW + j] * (r * tl.sqrt(r))
            h = d * xs[XW + j] * (r * r)
        else:
            d = gs[DLOW + j] * power(s, BETA)
            h = d * xs[XW + j] / s
        # Outside the image s may be 0.
        if j < 0:
            h = tl.where(inner, h, 0.0)
        if j > 7:
            h = tl.where(outer, h, 0.0)
        direct = direct + (d,)
        held = held + (h,)
    out = ()
    for c in tl.static_range(8):
        near = total(held, c, LOW + HIGH + 1)
        out = out + (direct[HIGH + c] - (2.0 * A * BETA) * xs[XW + c] * near,)
    return joined(out, B)


@triton.jit
def place(
    i, CHUNKS: tl.constexpr, PIXELS: tl.constexpr, IMAGES: tl.constexpr, GROUP: tl.constexpr
):
    """Of the i-th chunk: its number in the pixel [B]; its start in storage [B], and its places
    there [B, 8]; image [B, 1], channels [B, 8] and number of the pixel in its image [B, 1].

    IMAGES 1: chunks count as they are stored. Else, fastest first: GROUP chunks, IMAGES images, the
    chunks of a pixel, the pixels of an image, all images; those beyond the last one are not there.
    """
    if IMAGES == 1:
        chunk = i % CHUNKS
        pixel = i // CHUNKS
        at = i * 8
        n = pixel // PIXELS
        pixel = pixel % PIXELS
    else:
        rest = i // (GROUP * IMAGES)
        chunk = rest % (CHUNKS // GROUP) * GROUP + i % GROUP
        rest = rest // (CHUNKS // GROUP)
        pixel = rest % PIXELS
        n = rest // PIXELS * IMAGES + i // GROUP % IMAGES
        at = ((n * PIXELS + pixel) * CHUNKS + chunk) * 8
    j = tl.arange(0, 8)[None, :]
    return chunk, at, at[:, None] + j, n[:, None], (chunk * 8)[:, None] + j, pixel[:, None]


@triton.jit
def hand_over(acc, aux, at, n, c, pixel, mask, args, FLAT: tl.constexpr, EPILOGUE: tl.constexpr):
    """Calls the epilogue on chunks at places `at` [B, 8] of the image's storage."""
    if FLAT:
        EPILOGUE(acc, aux, at, 0, 0, 0, mask, args)
    else:
        EPILOGUE(acc, aux, n, c, 0, pixel, mask, args)


@triton.jit
def lrn_chunks(
    x, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr,
    K: tl.constexpr, A: tl.constexpr, BETA: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """BELOW, ABOVE: LOW and HIGH rounded up to powers of two."""
    CHUNKS: tl.constexpr = C // 8
    TOTAL: tl.constexpr = N * H * W * CHUNKS
    i = elements(TOTAL, N * H * W * C, BLOCK)
    live = i < TOTAL
    chunk, start, at, n, c, pixel = place(i, CHUNKS, H * W, 1, 1)
    below = load_columns(x, start - BELOW, live & (chunk > 0), BLOCK, BELOW)
    own = load_columns(x, start, live, BLOCK, 8)
    above = load_columns(x, start + 8, live & (chunk < CHUNKS - 1), BLOCK, ABOVE)
    y = normalised_chunk(below, own, above, BLOCK, LOW, HIGH, K, A, BETA)
    hand_over(y, 0, at, n, c, pixel, live[:, None], args, FLAT, EPILOGUE)


@triton.jit
def lrn_grad_chunks(
    x, dy, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, XW: tl.constexpr, DLOW: tl.constexpr,
    DHIGH: tl.constexpr, K: tl.constexpr, A: tl.constexpr, BETA: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = C // 8
    TOTAL: tl.constexpr = N * H * W * CHUNKS
    i = elements(TOTAL, N * H * W * C, BLOCK)
    live = i < TOTAL
    chunk, start, at, n, c, pixel = place(i, CHUNKS, H * W, 1, 1)
    dx = gradient_chunk(
        x, dy, start, chunk, live, CHUNKS, BLOCK, LOW, HIGH, XW, DLOW, DHIGH, K, A, BETA
    )
    hand_over(dx, 0, at, n, c, pixel, live[:, None], args, FLAT, EPILOGUE)


@triton.jit
def pooled_chunks(
    x, i, live,
    CHUNKS: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PT: tl.constexpr, PL: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    N: tl.constexpr, IMAGES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Maximum and place of the i-th chunks of the pooled image, which of them are there, and where
    they are (`place`)."""
    chunk, start, at, n, c, pixel = place(i, CHUNKS, OH * OW, IMAGES, GROUP)
    live = live[:, None]
    if N % IMAGES:
        live = live & (n < N)
    C: tl.constexpr = CHUNKS * 8
    base = x + (n * (H * W * C) + c)
    best, first = window_max(
        base, pixel // OW, pixel % OW, live, H, W, OH, OW, KH, KW, SH, SW, PT, PL, DH, DW,
        W * C, C,
    )  # fmt: skip
    return best, first, live, chunk, start, at, n, c, pixel


@triton.jit
def maxpool2d_chunks(
    x, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    TOTAL: tl.constexpr = N * OH * OW * C // 8
    i = elements(TOTAL, N * H * W * C, BLOCK)
    live = i < TOTAL
    best, first, live, chunk, start, at, n, c, pixel = pooled_chunks(
        x, i, live, C // 8, H, W, OH, OW, KH, KW, SH, SW, PT, PL, DH, DW, N, 1, 1
    )
    hand_over(best, first, at, n, c, pixel, live, args, FLAT, EPILOGUE)


@triton.jit
def maxpool2d_lrn_chunks(
    x, pooled, args, args2,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr,
    K: tl.constexpr, A: tl.constexpr, BETA: tl.constexpr,
    TILE: tl.constexpr, IMAGES: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr, EPILOGUE: tl.constexpr, EPILOGUE2: tl.constexpr,
):  # fmt: skip
    """lrn(maxpool2d(x)). A program is TILE whole pixels, so that a chunk's neighbours are its own:
    EPILOGUE writes `pooled` and the index, behind a barrier the halo is read back from there, and
    EPILOGUE2 writes what is normalised. IMAGES divides TILE."""
    CHUNKS: tl.constexpr = C // 8
    TOTAL: tl.constexpr = (N + IMAGES - 1) // IMAGES * IMAGES * OH * OW * CHUNKS
    lane = tl.arange(0, BLOCK)
    program = tl.program_id(0)
    if N * H * W * C > INT32_MAX:
        program = program.to(tl.int64)
    i = program * (TILE * CHUNKS) + lane
    live = (lane < TILE * CHUNKS) & (i < TOTAL)
    best, first, there, chunk, start, at, n, c, pixel = pooled_chunks(
        x, i, live, CHUNKS, H, W, OH, OW, KH, KW, SH, SW, PT, PL, DH, DW, N, IMAGES, GROUP
    )
    hand_over(best, first, at, n, c, pixel, there, args, FLAT, EPILOGUE)
    tl.debug_barrier()
    live = tl.reshape(there, (BLOCK,))
    below = load_columns(pooled, start - BELOW, live & (chunk > 0), BLOCK, BELOW)
    above = load_columns(pooled, start + 8, live & (chunk < CHUNKS - 1), BLOCK, ABOVE)
    own = columns(best, BLOCK, 8)
    y = normalised_chunk(below, own, above, BLOCK, LOW, HIGH, K, A, BETA)
    hand_over(y, 0, at, n, c, pixel, there, args2, FLAT, EPILOGUE2)


@triton.jit
def landed(acc, value, place, R: tl.constexpr, S: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    """acc with what a window brings to its pixel (R, S), which may lie beyond the window."""
    if R < KH and S < KW:
        acc += tl.where(place == R * KW + S, value.to(tl.float32), 0.0)
    return acc


@triton.jit
def maxpool2d_grad_chunks(
    dy, index, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    OH: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PT: tl.constexpr, PL: tl.constexpr,
    IMAGES: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, FLAT: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """A chunk of SH x SW pixels a thread: those windows that reach one of them are read once."""
    CHUNKS: tl.constexpr = C // 8
    BH: tl.constexpr = (H + PT + SH - 1) // SH
    BW: tl.constexpr = (W + PL + SW - 1) // SW
    ACROSS: tl.constexpr = (KW + SW - 1) // SW
    WINDOWS: tl.constexpr = (KH + SH - 1) // SH * ACROSS
    TOTAL: tl.constexpr = (N + IMAGES - 1) // IMAGES * IMAGES * BH * BW * CHUNKS
    i = elements(TOTAL, N * BH * SH * BW * SW * C, BLOCK)
    chunk, start, at, n, c, block = place(i, CHUNKS, BH * BW, IMAGES, GROUP)
    live = (i < TOTAL)[:, None]
    if N % IMAGES:
        live = live & (n < N)
    a = block // BW
    b = block % BW
    last = n * (OH * OW * C) + (a * OW + b) * C + c
    values = ()
    places = ()
    for k in tl.static_range(2 * WINDOWS):  # all places first: it takes fewer registers
        oh = a - k % WINDOWS // ACROSS
        ow = b - k % WINDOWS % ACROSS
        ok = live & (oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW)
        q = last - (k % WINDOWS // ACROSS * OW + k % WINDOWS % ACROSS) * C
        if k < WINDOWS:
            places = places + (tl.load(index + q, mask=ok, other=255).to(tl.int32),)
        else:
            values = values + (tl.load(dy + q, mask=ok, other=0.0),)
    top = a * SH - PT
    left = b * SW - PL
    corner = top * W + left
    for k in tl.static_range(SH * SW):
        ok = live & (top < H - k // SW) & (left < W - k % SW)
        if PT > 0:
            ok = ok & (top >= -(k // SW))
        if PL > 0:
            ok = ok & (left >= -(k % SW))
        dx = tl.zeros((BLOCK, 8), tl.float32)
        for m in tl.static_range(WINDOWS):
            dx = landed(
                dx, values[m], places[m],
                k // SW + m // ACROSS * SH, k % SW + m % ACROSS * SW, KH, KW,
            )  # fmt: skip
        pixel = corner + (k // SW * W + k % SW)
        here = n * (H * W * C) + pixel * C + c
        hand_over(dx, 0, here, n, c, pixel, ok, args, FLAT, EPILOGUE)
