"""Tensors in another order: space-to-depth, and images innermost.

Space-to-depth: blocks of pixels become channels, so that a strided convolution of an image with few
channels turns into one of stride 1 with many. A thread writes V adjacent elements of the result, 16
bytes an access, and reads each of them where it lies; what neighbours read together the first-level
cache serves.

Images innermost (`hwcn`) is the transpose of a matrix with one row an image. A program turns a tile
in shared memory, so that both sides are runs of 128 bytes and more.

Both are bandwidth-bound.
"""

import triton
import triton.language as tl

from .common import INT32_MAX, below, cast_store


@triton.jit
def space_to_depth(
    x, out, args,
    N: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    XS0: tl.constexpr, XS1: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    B: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """out[n, h // B, w // B, (h % B, w % B, c)] = x[n, c, h, w]; zeros beyond the image.

    V divides the B * B * C elements of a block of pixels; a program writes BLOCK times V. EPILOGUE
    gives what is stored for an element, None what was read.
    """
    HB: tl.constexpr = (H + B - 1) // B
    WB: tl.constexpr = (W + B - 1) // B
    PARTS: tl.constexpr = B * B * C // V
    TOTAL: tl.constexpr = N * HB * WB * PARTS
    i = tl.program_id(0)
    if TOTAL * V + N * XS0 + BLOCK * V > INT32_MAX:
        i = i.to(tl.int64)
    i = i * BLOCK + tl.arange(0, BLOCK)
    live = (i < TOTAL)[:, None]
    j = tl.arange(0, V)[None, :]
    inner = (i % PARTS * V)[:, None] + j
    block = i // PARTS
    h = (block // WB % HB * B)[:, None] + inner // (B * C)
    w = (block % WB * B)[:, None] + inner // C % B
    n = (block // (WB * HB))[:, None]
    ok = live & (h < H) & (w < W)
    at = x + (n * XS0 + inner % C * XS1 + h * XS2 + w * XS3)
    v = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    if EPILOGUE is not None:
        v = tl.where(ok, EPILOGUE(v, 0, n, inner % C, h, w, ok, args), 0.0)
    cast_store(out + ((i * V)[:, None] + j), v, live)


@triton.jit
def transpose(
    x, out,
    ROWS: tl.constexpr, COLS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[COLS, ROWS] = x[ROWS, COLS], a tile of BM rows by BN columns a program."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = below(m, ROWS, BM)
    cols = below(n, COLS, BN)
    if ROWS * COLS > INT32_MAX:
        m = m.to(tl.int64)
        n = n.to(tl.int64)
    tile = tl.load(x + ((m * COLS)[:, None] + n[None, :]), mask=rows[:, None] & cols[None, :])
    tl.store(out + ((n * ROWS)[:, None] + m[None, :]), tile.T, mask=cols[:, None] & rows[None, :])
