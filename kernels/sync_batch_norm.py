"""Batch normalization over several ranks: what a rank tells the others of its channels, and the
statistics of all from what every rank has told. The other passes are those of batch_norm.py.

Both programs take BC channels. What is told is a part as `batch_norm.statistics` makes them, but
about 0 and not about a first value, so that one loop joins both.
"""

import triton
import triton.language as tl

from .batch_norm import joined, put_statistics


@triton.jit
def tell_statistics(
    x, work, out,
    C: tl.constexpr, XS1: tl.constexpr, PARTS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = (number, mean, sum of squares about it) of each channel from the parts in `work`."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < C
    count, m, about = joined(work, c, C, PARTS, BR, BC)
    m += tl.load(x + c * XS1, mask=there & (count > 0.0), other=0.0).to(tl.float32)
    tl.store(out + c, count, mask=there)
    tl.store(out + C + c, m, mask=there)
    tl.store(out + 2 * C + c, about, mask=there)


@triton.jit
def gather_statistics(
    told, mean, var, old_mean, old_var, old_batches, new_mean, new_var, new_batches,
    C: tl.constexpr, RANKS: tl.constexpr, TRACK: tl.constexpr, MOMENTUM: tl.constexpr,
    CUMULATIVE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """mean and var of each channel from what all ranks have told, and the running ones."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    count, m, about = joined(told, c, C, RANKS, BR, BC)
    put_statistics(
        count, m, about, c, mean, var, old_mean, old_var, old_batches, new_mean, new_var,
        new_batches, C, TRACK, MOMENTUM, CUMULATIVE,
    )  # fmt: skip
