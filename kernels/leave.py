"""How the tile of a convolution leaves its kernel: by the epilogue, and where batch normalization
follows, with the moments of what was stored (moments.py)."""

import triton
import triton.language as tl

from .common import rounded
from .moments import put_moments


@triton.jit
def in_pieces(
    acc, group, k0, at, moments, args,
    K: tl.constexpr, CHANNELS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    AT_ONCE: tl.constexpr, PARTS: tl.constexpr, STORED: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """The epilogue of BN columns from k0 of a group of K, which begins at channel `group`, AT_ONCE
    elements after the other; 0 for all at once. On its way out a tile is held once more, by places
    that it is stored at, once more for each further order that it is stored in, and once more for
    its moments.

    at       (images, row and column of the pixels, which of them exist, number of the tile among
             those of its columns)
    moments  (number of live images, workspace) where there are PARTS; STORED is the element type of
             the result, CHANNELS are all that it has
    """
    if AT_ONCE == 0 or BM * BN <= AT_ONCE:
        n, oh, ow, live, part = at
        k = k0 + tl.arange(0, BN)[None, :]
        leave(
            acc, n, group + k, oh, ow, live, k < K, part, moments, args,
            CHANNELS, PARTS, STORED, EPILOGUE,
        )  # fmt: skip
    else:
        low, high = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        in_pieces(
            low, group, k0, at, moments, args, K, CHANNELS, BM, BN // 2, AT_ONCE, PARTS, STORED,
            EPILOGUE,
        )  # fmt: skip
        in_pieces(
            high, group, k0 + BN // 2, at, moments, args, K, CHANNELS, BM, BN // 2, AT_ONCE, PARTS,
            STORED, EPILOGUE,
        )  # fmt: skip


@triton.jit
def leave(
    acc, n, channel, oh, ow, rows, columns, part, moments, args,
    C: tl.constexpr, PARTS: tl.constexpr, STORED: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile, and where there are PARTS the moments of what it stored.

    rows, columns  [BM, 1] and [1, BN], which of them exist
    """
    if PARTS == 0:
        EPILOGUE(acc, 0, n, channel, oh, ow, rows & columns, args)
    else:
        v = rounded(EPILOGUE(acc, 0, n, channel, oh, ow, rows & columns, args), STORED)
        counts = rows & (n < tl.load(moments[0]))
        number = tl.sum(counts.to(tl.float32), 0)[None, :]
        per = 1.0 / tl.maximum(number, 1.0)
        mean = tl.sum(tl.where(counts, v, 0.0), 0)[None, :] * per
        # The sum of large values is less exact than that of their distances.
        mean += tl.sum(tl.where(counts, v - mean, 0.0), 0)[None, :] * per
        d = tl.where(counts, v - mean, 0.0)
        squares = tl.sum(d * d, 0)[None, :]
        put_moments(number, mean, squares, channel, columns, part, moments[1], C, PARTS)
