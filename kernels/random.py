"""Philox4x32-10 (Salmon et al., SC 2011): one counter an element, so no mask is ever stored."""

import triton
import triton.language as tl


@triton.jit
def dropout_keep(seed, sample, element, STREAM: tl.constexpr, THRESHOLD: tl.constexpr):
    """Whether an element is kept: word 0 >= THRESHOLD as unsigned integers.

    seed (int64) is the key; the counter is (element within the sample in logical order, sample
    low 32 bits, sample high 32 bits, STREAM), so that no layout and no batch split changes it.
    """
    zero = (sample + element) * 0
    wide = (sample + zero).to(tl.uint64)
    low = (wide & 0xFFFFFFFF).to(tl.uint32)
    high = (wide >> 32).to(tl.uint32)
    position = (element + zero).to(tl.uint32)
    stream = zero.to(tl.uint32) + STREAM
    word, _, _, _ = tl.philox(seed, position, low, high, stream)
    return word.to(tl.int64) & 0xFFFFFFFF >= THRESHOLD
