"""Which loader feeds a convolution: a pure function of what it reads, and the reason in words.

flat   kernels/conv.py: one flattened reduction, any strides and few channels
taps   kernels/conv_taps.py: tap by tap, masked 16-byte asynchronous copies
tma    kernels/conv_tma.py: tap by tap, boxes of images fetched by the copy engine

`tma` takes fewer registers and leaves out the taps beyond the border, where `taps` multiplies
zeros. It is nevertheless no default: no GPU has run it yet, and a wrong default costs every user,
while the tuner can hold both against the oracle and the clock (`Config.loader`).
"""

from __future__ import annotations

from dataclasses import dataclass

from graphnet.errors import ConfigError
from graphnet.ir.types import TensorType

WANTED = ("", "taps", "tma")
RUN = 8  # channels of a 16-byte copy in bf16
LEAST_BLOCK = 16  # of a reduction: the least that `tl.dot` takes
ROWS = 64  # of a tile on wgmma; with tma they are images


@dataclass(frozen=True)
class Choice:
    """A loader, and why it is this one."""

    loader: str
    why: str

    def __str__(self) -> str:
        return f"{self.loader}: {self.why}"


def _no_taps(images: tuple[TensorType, ...], groups: int, stride: tuple[int, int]) -> str:
    """Why tiles cannot go tap by tap; empty if they can. `stride` is an input gradient's."""
    for t in images:
        channels = t.shape[1] // groups
        if t.layout.s2d:
            continue
        if channels % RUN:
            return f"the channels of a group ({channels}) are no multiple of {RUN}"
        if t.layout.order != "nhwc":
            return "an image lies row-major"
    if stride != (1, 1):
        return f"a pixel of the input is reached by every {stride[0]} x {stride[1]}th tap only"
    return ""


def _no_tma(images: tuple[TensorType, ...], groups: int, summed: bool) -> str:
    """Why no boxes of images can be fetched; empty if they can.

    summed  the reduction runs over the channels, so that its blocks must divide them
    """
    for t in images:
        channels = t.shape[1] // groups
        if t.layout.s2d:
            return f"the image lies in blocks of {t.layout.s2d} x {t.layout.s2d} pixels"
        if summed and channels % LEAST_BLOCK:
            return f"the channels of a group ({channels}) are no multiple of {LEAST_BLOCK}"
    return ""


def choose_loader(
    op: str,
    images: tuple[TensorType, ...],
    groups: int,
    stride: tuple[int, int] = (1, 1),
    wanted: str = "",
) -> Choice:
    """The loader of a convolution that reads `images`, the weight gradient's x and dy included.

    wanted  "taps" or "tma", taken where it can be
    """
    if wanted not in WANTED:
        raise ConfigError(f"no loader {wanted!r}", help=f"one of {', '.join(WANTED[1:])}")
    if why := _no_taps(images, groups, stride if op == "conv2d_dgrad" else (1, 1)):
        return Choice("flat", why)
    if why := _no_tma(images, groups, summed=op != "conv2d_wgrad"):
        return Choice("taps", f"tma cannot, {why}")
    if wanted == "tma":
        return Choice("tma", "asked for")
    count = images[0].shape[0]
    empty = -count % ROWS
    if 8 * empty > count:
        return Choice("taps", f"tma can, but {empty} of {count + empty} rows would be empty")
    return Choice("taps", "the default; tma can, and is not measured yet")
