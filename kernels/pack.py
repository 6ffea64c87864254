"""Space-to-depth: blocks of pixels become channels, so that a strided convolution of an image with
few channels turns into one of stride 1 with many.

Bandwidth-bound: one element a lane in the order of the result, whose writes coalesce; the image is
read in BLOCK-wide runs of each channel's rows.
"""

import triton
import triton.language as tl

from .common import cast_store, elements


def space_to_depth_grid(N, C, H, W, B, BLOCK, **_):
    return (triton.cdiv(N * C * triton.cdiv(H, B) * triton.cdiv(W, B) * B * B, BLOCK),)


@triton.jit
def space_to_depth(
    x, out,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, h // B, w // B, (h % B, w % B, c)] = x[n, c, h, w]; zeros beyond the image."""
    HB: tl.constexpr = (H + B - 1) // B
    WB: tl.constexpr = (W + B - 1) // B
    TOTAL: tl.constexpr = N * HB * WB * B * B * C
    i = elements(TOTAL, N * XS0, BLOCK)
    c = i % C
    rest = i // C
    w = rest % B
    rest = rest // B
    h = rest % B
    rest = rest // B
    w = rest % WB * B + w
    rest = rest // WB
    h = rest % HB * B + h
    n = rest // HB
    ok = (i < TOTAL) & (h < H) & (w < W)
    v = tl.load(x + n * XS0 + c * XS1 + h * XS2 + w * XS3, mask=ok, other=0.0)
    cast_store(out + i, v.to(tl.float32), i < TOTAL)
