"""What the launches of all matrix products share: tiles, candidates, and the split protocol."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product as combinations
from math import prod
from typing import Any

from graphnet.lowering.launch.choice import adjusted
from graphnet.lowering.launch.codegen import Epilogue, Index, Ref
from graphnet.lowering.launch.config import (
    ACCUMULATORS,
    ITEMSIZE,
    LEAST_PART,
    PROCESSORS,
    SHARED_BYTES,
    UPDATE_ACCUMULATORS,
    UPDATE_TENSORS,
    Config,
    cdiv,
    distinct,
    next_power,
    tile,
)
from graphnet.lowering.launch.moments import Moments
from graphnet.lowering.launch.steps import Arg, Launch, arguments, make, source
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.lowering.launch.work import Work

Size = tuple[int, int, int, int]


class Product(Variant):
    """A variant that multiplies matrices.

    split      its reduction may be cut into parts, which a second pass adds up
    pairs      (BN, BT) that it may be tried with beside plain tiles
    """

    split: bool = False
    pairs: tuple[tuple[int, int], ...] = ()

    @abstractmethod
    def size(self, p: Problem) -> Size:
        """(rows, columns, length of the reduction, groups) of one of its products."""

    @abstractmethod
    def by_rule(self, p: Problem, m: int, n: int, k: int, groups: int) -> Config:
        """The configuration by the rules, for a product of this size."""

    def configs(self, problem: Problem) -> Iterator[Config]:
        first = self.by_rule(problem, *self.size(problem))
        yield from distinct([first], self._grid(problem, first))

    def cut(self, config: Config, problem: Problem) -> Config:
        m, n, k, _ = self.size(problem)
        config = replace(
            config, BM=tile(m, config.BM), BN=tile(n, config.BN), BK=tile(k, config.BK),
            BT=config.BT if n > config.BN else 0,
        )  # fmt: skip
        return with_room(config, problem.held) if self.split else config

    def _grid(self, p: Problem, first: Config) -> Iterator[Config]:
        m, n, k, _ = self.size(p)
        rows = [b for b in (16, 32, 64, 128, 256) if b <= max(16, next_power(m))]
        widths = [(b, 0) for b in (16, 32, 64, 128, 256) if b <= max(16, next_power(n))]
        depths = [b for b in (16, 32, 64, 128) if b <= max(16, next_power(k))]
        if p.dtype == "ieee":
            depths = [b for b in depths if b <= 32]
        splits = (1, 2, 4, 8, 16, 32) if self.split else (1,)
        for bm, (bn, bt), bk, split in combinations(rows, [*widths, *self.pairs], depths, splits):
            if bn + bt > 2 * next_power(n) or bm * bn < 256 or (split > 1 and k // split < 2 * bk):
                continue
            if p.dtype == "bf16" and bm < 64 and m >= 64:
                continue  # wgmma takes at least 64 rows
            for warps, stages in combinations((4, 8), (2, 3, 4)):
                c = replace(
                    first, BM=bm, BN=bn, BT=bt, BK=bk, SPLIT=split, num_warps=warps,
                    num_stages=stages,
                )  # fmt: skip
                if self._fits(c, p):
                    yield c

    def _fits(self, c: Config, p: Problem) -> bool:
        update = self.split and c.SPLIT == 1 and p.held > 0
        most = UPDATE_ACCUMULATORS if update else ACCUMULATORS
        if c.accumulators > most or c.shared_bytes(ITEMSIZE[p.dtype]) > SHARED_BYTES:
            return False
        return not self.split or with_room(c, p.held) == c


def plain_product(m: int, n: int, k: int, groups: int, math: str) -> Config:
    """Tiles of a product that fill the processors."""
    # ieee products run on FMAs; flattened convolutions hold addresses, fully connected layers draw
    # dropout masks in their epilogue: all of them spill above 64 columns.
    bm, bn = tile(m, 64), tile(n, 64)
    # Too few tiles leave processors idle: smaller ones, rows first; wgmma takes at least 64 rows.
    least = 32 if math == "ieee" or m < 64 else 64
    while cdiv(m, bm) * cdiv(n, bn) * groups < PROCESSORS and (bm > least or bn > 32):
        bm, bn = (bm // 2, bn) if bm > least and bm >= bn or bn <= 32 else (bm, bn // 2)
    bk = tile(k, 64 if math == "bf16" else 32)
    return Config(bm, bn, bk, num_stages=2 if math == "ieee" else 3)


def plain_wgrad(m: int, n: int, k: int, groups: int, math: str, held: int) -> Config:
    """Tiles of a weight gradient, its reduction cut where the tiles are few."""
    bm, bn = tile(m, 64), tile(n, 64)
    # ieee products hold their operand tiles in registers: BK=32 spills beside an update. bf16 at
    # BK=64 spills 8 to 16 bytes in LeNet's first convolution (Triton 3.6 and 3.7), none at 32.
    bk = tile(k, 16 if math == "ieee" else 32)
    tiles = cdiv(m, bm) * cdiv(n, bn) * groups
    # A part of fewer pixels or rows does not pay for the second launch; and there are no more
    # parts than processors.
    parts = min(PROCESSORS // tiles, k // LEAST_PART) if tiles < PROCESSORS else 1
    split = 1 << (max(parts, 1).bit_length() - 1)
    config = Config(bm, bn, bk, SPLIT=split, num_stages=2 if math == "ieee" else 3)
    return with_room(config, held)


def with_room(config: Config, held: int) -> Config:
    """A narrower tile where the update reads many tensors. After a split reduction the update runs
    in a second pass, and the tile stays."""
    most = UPDATE_ACCUMULATORS * UPDATE_TENSORS
    while config.SPLIT == 1 and held > UPDATE_TENSORS and config.accumulators * held > most:
        if not config.BT and config.BN <= 16:
            break
        config = replace(config, BT=0) if config.BT else replace(config, BN=config.BN // 2)
    return config


def tiles(c: Config) -> dict[str, int]:
    return {"BM": c.BM, "BN": c.BN, "BK": c.BK}


def blocks(n: int, size: int) -> int:
    """n, rounded up to whole blocks."""
    return cdiv(n, size) * size


def product(
    work: Work, kernel: str, module: str, c: Config, constants: dict[str, Any],
    size: tuple[int, int, int], epi: Epilogue | None, *, length: int, keep: Moments | None = None,
) -> Launch:  # fmt: skip
    """A launch over tiles of `size`: rows, columns, groups.

    length  of the reduction, its blocks filled up
    keep    what a kernel is told of a batch normalization; None where it does not ask
    """
    a, b = (work.ref(v) for v in work.anchor.inputs[:2])
    grid = (cdiv(size[0], c.BM), cdiv(size[1], c.BN + c.BT), size[2])
    args: tuple[Arg, ...] = (a, b, arguments(epi))
    kept = keep or Moments()
    if keep is not None:
        args = (a, b, keep.args, arguments(epi))
        constants = {**constants, **keep.constants, **keep.at_once(c.num_warps)}
    return make(
        kernel, module, args, constants, grid, reads=(a.name, b.name, *kept.reads), **kept.rest,
        epilogues=(epi,), num_warps=c.num_warps, num_stages=c.num_stages,
        padded=2 * prod(grid) * c.BM * (c.BN + c.BT) * length,
    )  # fmt: skip


# What a weight gradient's kernel has to know, given whether the bias is wanted: the tiles of rows
# and columns, how many columns a row has, and the arithmetic of all its tiles.
Shape = Callable[[bool], tuple[tuple[int, int], int, int]]


def weight_gradient(
    work: Work, kernel: str, module: str, constants: dict[str, Any], w: tuple[int, ...],
    groups: int, c: Config, shape: Shape, block: int = 1,
) -> list[Launch]:  # fmt: skip
    """The gradient, and the ordered sum of its parts where the reduction is cut.

    w      the weight's shape
    block  of space-to-depth, by which the columns are ordered
    """
    e = work.anchor
    x, dy = (work.ref(v) for v in e.inputs)
    rows, (dw, db) = w[0], e.outputs
    epi = work.epilogue(dw, Index(w)) if dw is not None else None
    epi2 = None
    if db is not None:
        epi2 = work.epilogue(db, Index(db.type.shape), widen=True)
    if epi is None:  # the weight is frozen, its bias is not
        return [channel_sum(work, dy)]
    has_bias = epi2 is not None
    grid, columns, padded = shape(has_bias)
    constants |= {**tiles(c), "SPLIT": c.SPLIT, "HAS_BIAS": has_bias}
    constants["PRECISION"] = e.attrs.math  # type: ignore[attr-defined]
    options: dict[str, Any] = {
        "num_warps": c.num_warps, "num_stages": c.num_stages, "padded": padded
    }  # fmt: skip
    whole = (*grid, groups * c.SPLIT)
    if c.SPLIT == 1:
        constants |= {"EPILOGUE": source(epi), "EPILOGUE2": source(epi2)}
        return [
            make(
                kernel, module, (x, dy, None, arguments(epi), arguments(epi2)), constants,
                whole, reads=(x.name, dy.name), epilogues=(epi, epi2), **options,
            )
        ]  # fmt: skip
    parts = Ref(f".parts{work.eqn.results[0]}", "f32")
    constants |= {"EPILOGUE": None, "EPILOGUE2": None}
    first_pass = make(
        kernel, module, (x, dy, parts, None, None), constants, whole, reads=(x.name, dy.name),
        writes=(parts.name,), scratch=((parts.name, c.SPLIT * rows * columns * 4),), **options,
    )  # fmt: skip
    r = adjusted("split_reduce", Config(BLOCK=tile(rows * columns, 256, 32)))
    filters = (*w[1:], 1, 1)[:3]  # a linear weight [K, C] is a filter of size 1 x 1
    reduce = {
        "SPLIT": c.SPLIT, "K": rows, "CG": filters[0], "R": filters[1], "S": filters[2],
        "B": block, "HAS_BIAS": has_bias, "BLOCK": r.BLOCK, "EPILOGUE": source(epi),
        "EPILOGUE2": source(epi2),
    }  # fmt: skip
    second = make(
        "split_reduce", "reduce", (parts, arguments(epi), arguments(epi2)), reduce,
        (cdiv(rows * columns, r.BLOCK),), reads=(parts.name,), epilogues=(epi, epi2),
    )  # fmt: skip
    return [first_pass, second]


def channel_sum(work: Work, dy: Ref) -> Launch:
    """The bias gradient alone."""
    bias, type = work.anchor.outputs[1], work.type(work.anchor.inputs[1])
    assert bias is not None
    n, c, h, w = (*type.shape, 1, 1)[:4]
    strides = (*type.strides, 0, 0)[:4]
    block = adjusted("channel_sum", Config(BLOCK=tile(n * h * w, 1024, 32))).BLOCK
    epi = work.epilogue(bias, Index(bias.type.shape))
    constants = {
        "N": n, "C": c, "H": h, "W": w, **{f"XS{d}": s for d, s in enumerate(strides)},
        "BLOCK": block, "EPILOGUE": source(epi),
    }  # fmt: skip
    return make(
        "channel_sum", "reduce", (dy, arguments(epi)), constants, (c,), reads=(dy.name,),
        epilogues=(epi,),
    )  # fmt: skip
