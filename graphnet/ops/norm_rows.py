"""Batch normalization on a CPU where channels lie innermost: sums that stay exact, wide vectors.

torch 2.13 adds up a channel of a channels-last image one pixel after another in fp32. Over 128
images of 32 x 32 a variance is then 1.4e-5 off, and the gradients of a ResNet-20 lie six times as
far from float64 as with row-major images. Here many pixels count as one row of as many channels, so
that each of them has sums of its own over few terms, 1e-7 off. Rows of a thousand values also fill
vectors that 16 channels do not. Rows of 2,048 take up to twice as long, since the sums of a thread
no longer fit its first cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

_WIDTH = 1024  # values of a row that is added up
_NARROW = 512  # values of one that is multiplied, whose factors are read again and again
_TERMS = 1024  # rows that are added up in one go
_aten = torch.ops.aten
_F64 = torch.float64


def lies_in_rows(x: torch.Tensor) -> bool:
    """Whether channels are innermost, without gaps, in fp32 or float64."""
    form = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return x.dtype in (torch.float32, _F64) and x.is_contiguous(memory_format=form)


@cache
def _parts(pixels: int, channels: int) -> tuple[tuple[int, int, int], ...]:
    """(first pixel, pixels of a row, rows): at most _TERMS rows each; what is left has rows of one
    pixel."""
    wide, at, out = max(1, _WIDTH // channels), 0, []
    while at < pixels:
        k = wide if pixels - at >= wide else 1
        out.append((at, k, min(_TERMS, (pixels - at) // k)))
        at += k * out[-1][2]
    return tuple(out)


def _in_parts(*tensors: torch.Tensor) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
    """(pixels of a row, rows, the tensors as [1, pixels of a row * C, rows, 1]) of each part."""
    c = tensors[0].shape[1]
    for at, k, rows in _parts(tensors[0].numel() // c, c):
        shape, strides = (1, k * c, rows, 1), (rows * k * c, 1, k * c, k * c)
        yield k, rows, [t.as_strided(shape, strides, t.storage_offset() + at * c) for t in tensors]


def statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel, joined by Chan, Golub and LeVeque (1979)."""
    count, mean, var = 0, None, None
    for k, rows, (part,) in _in_parts(x):
        means, variances = _aten.batch_norm_update_stats(part, None, None, 0.0)
        among, m = torch.var_mean(means.view(k, -1), 0, correction=0)
        v = variances.view(k, -1).mean(0).add_(among)
        if mean is None or var is None:
            count, mean, var = k * rows, m, v
            continue
        share = k * rows / (count + k * rows)  # of this part in what is joined
        apart = m - mean
        var += (v - var) * share + apart * apart * (share * (1 - share))
        mean += apart * share
        count += k * rows
    assert mean is not None and var is not None, "no rows"
    return mean, var


def sums(
    dy: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each channel the sum of dy (x - mean) rstd and that of dy, joined in float64."""
    total: list[torch.Tensor] = []
    for k, _, (g, part) in _in_parts(dy, x):
        _, *found = _aten.native_batch_norm_backward(
            g, part, None, None, None, mean.repeat(k), rstd.repeat(k), True, 0.0,
            [False, True, True],
        )  # fmt: skip
        found = [v.view(k, -1).sum(0, dtype=_F64) for v in found]
        total = [a.add_(b) for a, b in zip(total, found, strict=True)] if total else found
    dweight, dbias = total
    return dweight.to(x.dtype), dbias.to(x.dtype)


def multiplied(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor,
    dy: torch.Tensor | None = None, share: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """x scale + shift by vectors over the channels, and dy share on top of it, laid like x."""
    c = x.shape[1]
    k, pixels = 1, x.numel() // c
    while 2 * k * c <= _NARROW and pixels % (2 * k) == 0:
        k *= 2
    shape, strides = (pixels // k, k * c), (k * c, 1)
    out = torch.empty_like(x)
    rows = lambda t: t.as_strided(shape, strides, t.storage_offset())
    torch.addcmul(shift.repeat(k), rows(x), scale.repeat(k), out=rows(out))
    if dy is not None and share is not None:
        rows(out).addcmul_(rows(dy), share.repeat(k))
    return out
