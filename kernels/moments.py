"""Moments in parts: how many values a channel has in a part, their mean, and the sum of their
squares about it.

A workspace holds PARTS numbers (all channels of a part have as many values), then [PARTS, C] means,
then [PARTS, C] sums of squares. Sums of squares cancel where a channel's mean is large beside its
deviation, so they are taken about the mean of their part, and parts are joined by Chan, Golub and
LeVeque's formula (1979) in double precision. All orders are fixed: no atomics.
"""

import triton
import triton.language as tl


@triton.jit
def put_moments(
    number, mean, squares, c, there, part, work, C: tl.constexpr, PARTS: tl.constexpr
):
    """Writes a part of the channels c; channel 0 writes the number."""
    numbers = (number + (c * 0).to(tl.float32)).to(tl.float32)
    tl.store(work + part + c * 0, numbers, mask=there & (c == 0))
    at = work + PARTS + part * C + c
    tl.store(at, mean.to(tl.float32), mask=there)
    tl.store(at + PARTS * C, squares.to(tl.float32), mask=there)


@triton.jit
def get_moments(
    work, c, there, first, C: tl.constexpr, PARTS: tl.constexpr, COUNT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """(number, mean, squares about it) of BC channels c, of COUNT parts from `first` together: the
    mean of all first, then the squares about it. They are fp64."""
    means = work + PARTS + c[None, :]
    numbers = tl.zeros((BR, 1), tl.float64)
    weighted = tl.zeros((BR, BC), tl.float64)
    for start in range(0, COUNT, BR):
        r = start + tl.arange(0, BR)[:, None]
        p = first + r
        some = (r < COUNT) & (p < PARTS)
        n = tl.load(work + p, mask=some, other=0.0).to(tl.float64)
        numbers += n
        weighted += n * tl.load(means + p * C, mask=some & there[None, :], other=0.0)
    number = tl.sum(numbers, 0)
    mean = tl.sum(weighted, 0) / tl.maximum(number, 1.0)
    squares = tl.zeros((BR, BC), tl.float64)
    for start in range(0, COUNT, BR):
        r = start + tl.arange(0, BR)[:, None]
        p = first + r
        some = (r < COUNT) & (p < PARTS)
        n = tl.load(work + p, mask=some, other=0.0).to(tl.float64)
        mask = some & there[None, :]
        d = tl.load(means + p * C, mask=mask, other=0.0) - mean[None, :]
        squares += tl.load(means + PARTS * C + p * C, mask=mask, other=0.0) + n * d * d
    return number, mean, tl.sum(squares, 0)
