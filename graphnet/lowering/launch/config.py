"""A launch configuration, and the arithmetic that all of its rules share.

The rules that pick one for a shape stand with the kernels, in the variants' files. They are for
sm_90 with 132 processors. Tiles are powers of two of at least 16, the least that `tl.dot` takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

PROCESSORS = 132
SHARED_BYTES = 232448
UPDATE_ACCUMULATORS = 32  # a thread; a fused update spills above (measured)
UPDATE_TENSORS = 3  # beside that many: with a fourth Triton 3.6 spills, with a fifth 3.7 too
ACCUMULATORS = 128  # a thread; more than that spills beside addresses
LEAST_PART = 256  # of a split reduction
ITEMSIZE = {"bf16": 2, "tf32": 4, "ieee": 4}  # of an operand, by how products are formed


@dataclass(frozen=True)
class Config:
    """Tile sizes of a product (BM, BN, BK, SPLIT) or of a pointwise kernel (BLOCK).

    BT is the width of a product's second accumulator, 0 for none.

    LPT: 1 starts the programs with the longest sums first, 0 in the order of storage.

    SWAP is of weight gradients by filter rows: whether the rows of a tile are columns of the
    filter. PROGRAMS is for how many programs their sums are cut, or how many take tiles in turn.

    Normalization: BM pixels by BN channels, BK rows of a gradient's task, SPLIT programs.
    """

    BM: int = 0
    BN: int = 0
    BK: int = 0
    BT: int = 0
    SPLIT: int = 1
    BLOCK: int = 0
    LPT: int = 1
    num_warps: int = 4
    num_stages: int = 2
    SWAP: int = 0
    PROGRAMS: int = 0

    @property
    def accumulators(self) -> int:
        """fp32 accumulators a thread."""
        return self.BM * (self.BN + self.BT) // (32 * self.num_warps)

    def shared_bytes(self, itemsize: int) -> int:
        """What the operand tiles of all stages take."""
        return (self.BM + self.BN + self.BT) * self.BK * itemsize * self.num_stages

    def as_dict(self) -> dict[str, Any]:
        """The fields that are set, for JSON and for people."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    def __str__(self) -> str:
        """128x128 k64 s3 w4, and whatever else is set."""
        size = f"{self.BM}x{self.BN}" + (f"+{self.BT}" if self.BT else "")
        parts = [size] if self.BM else []
        parts += [f"k{self.BK}"] if self.BK else []
        told = ("BM", "BN", "BT", "BK", "num_warps", "num_stages")
        parts += [f"{k}={v}" for k, v in self.as_dict().items() if k not in told]
        return " ".join([*parts, f"s{self.num_stages}", f"w{self.num_warps}"])


def next_power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def tile(size: int, most: int, least: int = 16) -> int:
    """The power of two that covers `size`, between `least` and `most`."""
    return max(least, min(most, next_power(size)))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def depth(k: int, most: int) -> int:
    """The deepest block of a reduction over k channels that wastes at most an eighth."""
    bk = tile(k, most)
    while bk > 16 and 8 * (cdiv(k, bk) * bk - k) > k:
        bk //= 2
    return bk


def columns(n: int, most: int, wide: int) -> tuple[int, int]:
    """(BN, BT) for n columns: least padding, but narrow tiles read their rows more often.

    most, wide  limits of BN and of BN + BT; BT is narrower than BN
    """
    powers = [16 << k for k in range(4) if 16 << k <= most]
    tiles = [(bn, 0) for bn in powers]
    tiles += [(bn, bt) for bn in powers for bt in powers if bt < bn and bn + bt <= wide]

    def cost(tile: tuple[int, int]) -> tuple[float, int]:
        width = sum(tile)
        return cdiv(n, width) * width * (1 + 24 / width), tile[1]

    return min(tiles, key=cost)


def distinct(*groups: Iterable[Config]) -> Iterator[Config]:
    """Each configuration once, in the given order; lazily, since most callers take the first."""
    seen: set[Config] = set()
    for c in chain(*groups):
        if c not in seen:
            seen.add(c)
            yield c
