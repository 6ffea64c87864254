"""Batch normalization: statistics in parts, a second pass that joins them, and one pass that uses
them; forward and backward alike.

A program takes tiles of BP pixels by BC channels, PARTS tiles apart. The pixels of the live rows
come first, so that they are p < live H W. Sums of squares cancel where a channel's mean is large
beside its deviation. So values are taken relative to the channel's first one, squares relative to
the mean of their tile, and both are joined by Chan, Golub and LeVeque's formula (1979). All orders
are fixed: no atomics. Where a convolution's kernel has kept moments of its tiles (moments.py), they
take the place of the statistics' pass.
"""

import triton
import triton.language as tl

from .common import INT32_MAX
from .moments import get_moments, put_moments


@triton.jit
def _places(
    p, c, H: tl.constexpr, W: tl.constexpr, PIXELS: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S3: tl.constexpr,
):  # fmt: skip
    """Offsets of the pixels p in the channels c: [BP, BC]. A row of pixels follows the one above
    it at once, in every layout; where images do, too, no division is needed."""
    if PIXELS // (H * W) * S0 > INT32_MAX:
        p = p.to(tl.int64)
    if S0 == H * W * S3:
        at = p * S3
    else:
        at = p // (H * W) * S0 + p % (H * W) * S3
    return at[:, None] + c[None, :] * S1


@triton.jit
def statistics(
    x, live, work,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PIXELS: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS3: tl.constexpr,
    PARTS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """work[part] = (number, mean - first value, sum of squares about the mean) of each channel."""
    part = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    there = c < C
    first = tl.load(x + c * XS1, mask=there, other=0.0).to(tl.float32)
    end = tl.load(live) * (H * W)
    count = 0.0
    mean = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    for start in range(part * BP, end, PARTS * BP):
        p = start + tl.arange(0, BP)
        mask = (p < end)[:, None] & there[None, :]
        at = _places(p, c, H, W, PIXELS, XS0, XS1, XS3)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.where(mask, v - first[None, :], 0.0)
        more = tl.minimum(end - start, BP).to(tl.float32)
        here = tl.sum(v, 0) / more
        d = tl.where(mask, v - here[None, :], 0.0)
        delta = here - mean
        share = more / (count + more)
        squares += tl.sum(d * d, 0) + delta * delta * (count * share)
        mean += delta * share
        count += more
    to = work + part * (3 * C) + c
    tl.store(to, count + mean * 0.0, mask=there)
    tl.store(to + C, mean, mask=there)
    tl.store(to + 2 * C, squares, mask=there)


@triton.jit
def joined(work, c, C: tl.constexpr, PARTS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """(number, mean, sum of squares about it) of the channels c from all parts: the mean first,
    then the squares about it. Parts of nothing add nothing, and nothing at all has mean 0."""
    there = c < C
    number = tl.zeros((BR, BC), tl.float32)
    weighted = tl.zeros((BR, BC), tl.float32)
    for start in range(0, PARTS, BR):
        r = start + tl.arange(0, BR)
        at = work + r[:, None] * (3 * C) + c[None, :]
        mask = (r < PARTS)[:, None] & there[None, :]
        n = tl.load(at, mask=mask, other=0.0)
        number += n
        weighted += n * tl.load(at + C, mask=mask, other=0.0)
    count = tl.sum(number, 0)
    whole = tl.sum(weighted, 0) / tl.maximum(count, 1.0)
    squares = tl.zeros((BR, BC), tl.float32)
    for start in range(0, PARTS, BR):
        r = start + tl.arange(0, BR)
        at = work + r[:, None] * (3 * C) + c[None, :]
        mask = (r < PARTS)[:, None] & there[None, :]
        d = tl.load(at + C, mask=mask, other=0.0) - whole[None, :]
        n = tl.load(at, mask=mask, other=0.0)
        squares += tl.load(at + 2 * C, mask=mask, other=0.0) + n * d * d
    return count, whole, tl.sum(squares, 0)


@triton.jit
def put_statistics(
    count, m, about, c, mean, var, old_mean, old_var, old_batches, new_mean, new_var, new_batches,
    C: tl.constexpr, TRACK: tl.constexpr, MOMENTUM: tl.constexpr, CUMULATIVE: tl.constexpr,
):  # fmt: skip
    """mean and var of the channels c, and the running ones, which a batch without rows leaves."""
    there = c < C
    tl.store(mean + c, m, mask=there)
    tl.store(var + c, about / tl.maximum(count, 1.0), mask=there)
    if TRACK:
        share = MOMENTUM
        if CUMULATIVE:
            share = 1.0 / (tl.load(old_batches) + 1).to(tl.float32)
        if tl.program_id(0) == 0:
            seen = (tl.max(count, 0) > 0.0).to(tl.int64)
            tl.store(new_batches, tl.load(old_batches) + seen)
        share = tl.where(count > 0.0, share, 0.0)
        before = tl.load(old_mean + c, mask=there, other=0.0)
        tl.store(new_mean + c, before + share * (m - before), mask=there)
        before = tl.load(old_var + c, mask=there, other=0.0)
        unbiased = about / tl.maximum(count - 1.0, 1.0)
        tl.store(new_var + c, before + share * (unbiased - before), mask=there)


@triton.jit
def join_statistics(
    x, work, mean, var, old_mean, old_var, old_batches, new_mean, new_var, new_batches,
    C: tl.constexpr, XS1: tl.constexpr, PARTS: tl.constexpr, TRACK: tl.constexpr,
    MOMENTUM: tl.constexpr, CUMULATIVE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """mean and var of each channel from the parts, and the running ones."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    count, m, about = joined(work, c, C, PARTS, BR, BC)
    m += tl.load(x + c * XS1, mask=(c < C) & (count > 0.0), other=0.0).to(tl.float32)
    put_statistics(
        count, m, about, c, mean, var, old_mean, old_var, old_batches, new_mean, new_var,
        new_batches, C, TRACK, MOMENTUM, CUMULATIVE,
    )  # fmt: skip


@triton.jit
def join_parts(
    work, fewer,
    C: tl.constexpr, PARTS: tl.constexpr, COUNT: tl.constexpr, FEWER: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The kept moments of many parts in FEWER: COUNT neighbours become one."""
    part = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    number, mean, squares = get_moments(work, c, c < C, part * COUNT, C, PARTS, COUNT, BR, BC)
    put_moments(number, mean, squares, c, c < C, part, fewer, C, FEWER)


@triton.jit
def join_moments(
    work, mean, var, old_mean, old_var, old_batches, new_mean, new_var, new_batches,
    C: tl.constexpr, PARTS: tl.constexpr, TRACK: tl.constexpr,
    MOMENTUM: tl.constexpr, CUMULATIVE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`join_statistics` of moments that a convolution's kernel has kept."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    number, m, about = get_moments(work, c, c < C, 0, C, PARTS, PARTS, BR, BC)
    count = number.to(tl.float32) + tl.zeros((BC,), tl.float32)
    put_statistics(
        count, m.to(tl.float32), about.to(tl.float32), c, mean, var, old_mean, old_var,
        old_batches, new_mean, new_var, new_batches, C, TRACK, MOMENTUM, CUMULATIVE,
    )  # fmt: skip


@triton.jit
def _coordinates(p, c, H: tl.constexpr, W: tl.constexpr):
    """(n, c, h, w) of a tile, each broadcast to it."""
    return (p // (H * W))[:, None], c[None, :], (p // W % H)[:, None], (p % W)[:, None]


@triton.jit
def batch_norm(
    x, mean, var, weight, bias, args,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PIXELS: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS3: tl.constexpr,
    EPS: tl.constexpr, AFFINE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    EPILOGUE: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) rstd weight + bias, and what the epilogue makes of it."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    there = c < C
    mask = (p < PIXELS)[:, None] & there[None, :]
    centre = tl.load(mean + c, mask=there, other=0.0)
    scale = 1.0 / tl.sqrt_rn(tl.load(var + c, mask=there, other=1.0) + EPS)
    if AFFINE:
        scale *= tl.load(weight + c, mask=there, other=0.0)
    at = _places(p, c, H, W, PIXELS, XS0, XS1, XS3)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    y = (v - centre[None, :]) * scale[None, :]
    if AFFINE:
        y += tl.load(bias + c, mask=there, other=0.0)[None, :]
    i0, i1, i2, i3 = _coordinates(p, c, H, W)
    EPILOGUE(y, 0, i0, i1, i2, i3, mask, args)


@triton.jit
def gradient_sums(
    dy, x, mean, var, live, work,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PIXELS: tl.constexpr,
    DS0: tl.constexpr, DS1: tl.constexpr, DS3: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS3: tl.constexpr,
    EPS: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """work[part] = (sum of dy xhat, sum of dy) of each channel, over the live rows."""
    part = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    there = c < C
    centre = tl.load(mean + c, mask=there, other=0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.load(var + c, mask=there, other=1.0) + EPS)
    end = tl.load(live) * (H * W)
    products = tl.zeros((BP, BC), tl.float32)
    sums = tl.zeros((BP, BC), tl.float32)
    for start in range(part * BP, end, PARTS * BP):
        p = start + tl.arange(0, BP)
        mask = (p < end)[:, None] & there[None, :]
        at = _places(p, c, H, W, PIXELS, DS0, DS1, DS3)
        g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        at = _places(p, c, H, W, PIXELS, XS0, XS1, XS3)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        products += g * (v - centre[None, :])
        sums += g
    to = work + part * (2 * C) + c
    tl.store(to, tl.sum(products, 0) * rstd, mask=there)
    tl.store(to + C, tl.sum(sums, 0), mask=there)


@triton.jit
def join_sums(
    work, dweight, dbias,
    C: tl.constexpr, PARTS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dweight and dbias of each channel from the parts."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < C
    products = tl.zeros((BR, BC), tl.float32)
    sums = tl.zeros((BR, BC), tl.float32)
    for start in range(0, PARTS, BR):
        r = start + tl.arange(0, BR)
        at = work + r[:, None] * (2 * C) + c[None, :]
        mask = (r < PARTS)[:, None] & there[None, :]
        products += tl.load(at, mask=mask, other=0.0)
        sums += tl.load(at + C, mask=mask, other=0.0)
    tl.store(dweight + c, tl.sum(products, 0), mask=there)
    tl.store(dbias + c, tl.sum(sums, 0), mask=there)


@triton.jit
def batch_norm_grad(
    dy, x, mean, var, live, rows, weight, dweight, dbias, args,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PIXELS: tl.constexpr,
    DS0: tl.constexpr, DS1: tl.constexpr, DS3: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS3: tl.constexpr,
    EPS: tl.constexpr, AFFINE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    EPILOGUE: tl.constexpr,
):  # fmt: skip
    """dx = weight rstd (g - dbias / M - xhat dweight / M), zero in the rows that are not live. M
    counts the pixels of the rows of all ranks where `rows` does, else those of the live ones."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    there = c < C
    mask = (p < PIXELS)[:, None] & there[None, :]
    end = tl.load(live) * (H * W)
    counted = tl.load(live if rows is None else rows).to(tl.float32) * (H * W)
    per = 1.0 / tl.maximum(counted, 1.0)
    centre = tl.load(mean + c, mask=there, other=0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.load(var + c, mask=there, other=1.0) + EPS)
    tilt = tl.load(dweight + c, mask=there, other=0.0) * per * rstd
    level = tl.load(dbias + c, mask=there, other=0.0) * per
    scale = rstd
    if AFFINE:
        scale *= tl.load(weight + c, mask=there, other=0.0)
    at = _places(p, c, H, W, PIXELS, DS0, DS1, DS3)
    g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    at = _places(p, c, H, W, PIXELS, XS0, XS1, XS3)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    dx = (g - level[None, :] - (v - centre[None, :]) * tilt[None, :]) * scale[None, :]
    dx = tl.where((p < end)[:, None], dx, 0.0)
    i0, i1, i2, i3 = _coordinates(p, c, H, W)
    EPILOGUE(dx, 0, i0, i1, i2, i3, mask, args)
