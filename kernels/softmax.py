"""softmax and log_softmax along an axis, and their gradients.

Sizes and strides come in the order batch, the axis (C), the other axes (H, W): over the channels
those are the pixels. A program takes BP rows by the whole axis, padded to BC, and keeps them in
registers: one read and one write of each element. Beyond 4,096 elements a row no longer fits.
"""

import triton
import triton.language as tl

from .common import INT32_MAX, cast_store


@triton.jit
def _tile(
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PIXELS: tl.constexpr,
    S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """(offsets, mask) of a tile [BP, BC]."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.arange(0, BC)
    n = p // (H * W)
    if PIXELS // (H * W) * S0 > INT32_MAX:
        n = n.to(tl.int64)
    at = n * S0 + p // W % H * S2 + p % W * S3
    return at[:, None] + c[None, :] * S1, (p < PIXELS)[:, None] & (c < C)[None, :]


@triton.jit
def softmax(
    x, y,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PIXELS: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    YS0: tl.constexpr, YS1: tl.constexpr, YS2: tl.constexpr, YS3: tl.constexpr,
    LOG: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y = softmax(x) along the axis of size C, or its logarithm."""
    at, mask = _tile(C, H, W, PIXELS, XS0, XS1, XS2, XS3, BP, BC)
    v = tl.load(x + at, mask=mask, other=float("-inf")).to(tl.float32)
    top = tl.max(v, 1)
    # A row beyond the last has no maximum.
    v = tl.where(mask, v - tl.where(top == float("-inf"), 0.0, top)[:, None], float("-inf"))
    e = tl.exp(v)
    total = tl.sum(e, 1)
    total = tl.where(total == 0.0, 1.0, total)
    if LOG:
        out = v - tl.log(total)[:, None]
    else:
        out = e / total[:, None]
    to, _ = _tile(C, H, W, PIXELS, YS0, YS1, YS2, YS3, BP, BC)
    cast_store(y + to, out, mask)


@triton.jit
def softmax_grad(
    y, dy, dx,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PIXELS: tl.constexpr,
    YS0: tl.constexpr, YS1: tl.constexpr, YS2: tl.constexpr, YS3: tl.constexpr,
    DS0: tl.constexpr, DS1: tl.constexpr, DS2: tl.constexpr, DS3: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    LOG: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx = y (dy - sum dy y), or of the logarithm dy - exp(y) sum dy."""
    at, mask = _tile(C, H, W, PIXELS, YS0, YS1, YS2, YS3, BP, BC)
    v = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    at, _ = _tile(C, H, W, PIXELS, DS0, DS1, DS2, DS3, BP, BC)
    g = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    if LOG:
        out = g - tl.exp(v) * tl.sum(g, 1)[:, None]
    else:
        out = v * (g - tl.sum(g * v, 1)[:, None])
    at, _ = _tile(C, H, W, PIXELS, XS0, XS1, XS2, XS3, BP, BC)
    cast_store(dx + at, out, mask)
