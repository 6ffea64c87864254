"""Lanes of a region's stages: tensors of [KB, BLOCK], of which each thread holds a column."""

import triton
import triton.language as tl


@triton.jit
def row(KB: tl.constexpr):
    """[KB, 1] of the numbers below KB, of which the compiler does not know that they follow each
    other: it would lay out every tensor so that loads of neighbours join, each in a way of its own,
    and move sums between threads in the loop. The grid has one program in its second direction."""
    return (tl.arange(0, KB) ^ tl.program_id(1))[:, None]


@triton.jit
def column(BLOCK: tl.constexpr):
    """[1, BLOCK] of the numbers below BLOCK, hidden likewise."""
    return (tl.arange(0, BLOCK) ^ tl.program_id(1))[None, :]


@triton.jit
def numbers(BLOCK: tl.constexpr):
    """[BLOCK] of the numbers below BLOCK, hidden likewise."""
    return tl.arange(0, BLOCK) ^ tl.program_id(1)


@triton.jit
def by_column(pointers):
    """[KB, BLOCK] pointers, of which each thread is to hold a column. Triton 3.6 would give a
    column to several threads where it knows of no neighbours. It now thinks that columns are, but
    not that they are aligned, so it loads each element alone."""
    nothing = column(pointers.shape[1]) - tl.arange(0, pointers.shape[1])[None, :]
    return tl.max_contiguous(pointers + nothing, [1, 2])


@triton.jit
def pixels(
    x, top, left, ok,
    H: tl.constexpr, W: tl.constexpr, SH: tl.constexpr, UH: tl.constexpr, UW: tl.constexpr,
    TH: tl.constexpr, ACROSS: tl.constexpr, XS2: tl.constexpr, XS3: tl.constexpr,
    INSIDE: tl.constexpr,
):  # fmt: skip
    """TH x ACROSS pixels from (top, left): rows SH apart, columns next to each other. Zero where
    there is none: beyond the image, and between the pixels of an image with zeros in between."""
    out = ()
    for y in tl.static_range(TH):
        for j in tl.static_range(ACROSS):
            ih = top + y * SH
            iw = left + j
            there = ok
            if not INSIDE:
                there = there & (ih >= 0) & (iw >= 0) & (ih < H * UH) & (iw < W * UW)
            if UH > 1:
                there = there & (ih % UH == 0)
            if UW > 1:
                there = there & (iw % UW == 0)
            at = ih // UH * XS2 + iw // UW * XS3
            out = out + (tl.load(x + at, mask=there, other=0.0).to(tl.float32),)
    return out
