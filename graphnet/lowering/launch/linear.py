"""Launches of fully connected layers forward and of their input gradients.

At the batch of a training step such a product reads its weight once: what counts is that all
processors read, each with many bytes on the way. Tiles of 128 rows, a deep pipeline, and where the
tiles are few a reduction in parts that a second pass adds up, in order, and finishes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product as combinations

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import HWCN, Layout
from graphnet.lowering.launch.codegen import Epilogue, Index, Ref
from graphnet.lowering.launch.config import (
    ITEMSIZE,
    PROCESSORS,
    SHARED_BYTES,
    Config,
    cdiv,
    next_power,
    tile,
)
from graphnet.lowering.launch.products import Product, Size, blocks, plain_product, tiles
from graphnet.lowering.launch.steps import Arg, Box, Launch, arguments, make, source
from graphnet.lowering.launch.variants import Problem, no_descriptors
from graphnet.lowering.launch.work import Work
from graphnet.passes.templates import anchors_of

LEAST_BLOCKS = 8  # of a part; a second pass takes about as long as so many blocks (measured)
EPILOGUE_ACCUMULATORS = 32  # a thread
DEEP_BLOCKS = 32  # from so many on eight stages are better than four (measured)


class LinearPointers(Product):
    """Operands by pointer: any size, masked where tiles do not divide it."""

    name, ops, split = "pointers", ("linear", "linear_dgrad"), True
    boxed = False

    def writes(self, eqn: Eqn, layout: Layout) -> bool:
        """A tile's rows are images: whole runs of them."""
        return layout == HWCN

    def size(self, p: Problem) -> Size:
        n, c, k = p.shape
        return (n, k, c, 1) if p.op == "linear" else (n, c, k, 1)

    def by_rule(self, p: Problem, m: int, n: int, k: int, groups: int) -> Config:
        if p.dtype == "ieee" or few(m, n, k, p.dtype):
            return plain_product(m, n, k, groups, p.dtype)
        if fills(p, m, n, k):
            return Config(64, 64, 256 // ITEMSIZE[p.dtype], num_stages=5)
        return large_tile(m, n, k, p.dtype)

    def _grid(self, p: Problem, first: Config) -> Iterator[Config]:
        m, n, k, _ = self.size(p)
        if p.dtype == "ieee" or few(m, n, k, p.dtype):
            yield from super()._grid(p, first)
            return
        sizes = [(128, 64, 128, 4), (128, 64, 128, 8), (128, 128, 128, 8), (64, 64, 256, 4)]
        sizes += [(64, 64, 128, 4), (128, 32, 128, 4), (64, 32, 128, 4), (128, 128, 256, 8)]
        item = ITEMSIZE[p.dtype]
        for (bm, bn, run, warps), split, stages in combinations(sizes, (1, 2, 4, 8), (3, 4, 5, 8)):
            bk = run // item
            c = Config(bm, bn, bk, SPLIT=split, num_warps=warps, num_stages=stages)
            fits = c.shared_bytes(item) <= SHARED_BYTES and bm <= tile(m, 128, 64)
            if fits and bn <= next_power(n) and split * stages * bk <= next_power(k):
                yield c

    def launch(self, work: Work, config: Config) -> list[Launch]:
        e, c = work.anchor, config
        m, n, k, _ = self.size(work.problem)
        epi = work.epilogue(e.out, Index((m, n)), bias=work.bias)
        a, b = (work.ref(v) for v in e.inputs[:2])
        sa, sb = (work.type(v).strides for v in e.inputs[:2])
        operands: tuple[Arg, ...] = (a, b)
        turned = e.op == "linear"  # the stored weight is [n, k]
        if self.boxed:
            block = (c.BN, c.BK) if turned else (c.BK, c.BN)
            operands = Box(a, (m, k), (c.BM, c.BK)), Box(b, (n, k) if turned else (k, n), block)
        if turned:
            sb = sb[1], sb[0]
        whole = c.SPLIT == 1
        own, parts = (epi, None) if whole else (None, Ref(f".parts{work.eqn.results[0]}", "f32"))
        constants = {
            "M": m, "N": n, "K": k, "AS0": sa[0], "AS1": sa[1], "BS0": sb[0], "BS1": sb[1],
            **tiles(c), "SPLIT": c.SPLIT, "BOXED": self.boxed, "PRECISION": work.problem.dtype,
            "CHUNKS": chunks(c, work), "EPILOGUE": source(own),
        }  # fmt: skip
        grid = (cdiv(n, c.BN), c.SPLIT, cdiv(m, c.BM))
        first = make(
            "linear_product", "linear", (*operands, parts, arguments(own)), constants, grid,
            reads=(a.name, b.name), writes=(parts.name,) if parts else (), epilogues=(own,),
            scratch=((parts.name, 4 * c.SPLIT * m * n),) if parts else (),
            num_warps=c.num_warps, num_stages=c.num_stages,
            padded=2 * grid[0] * c.BN * grid[2] * c.BM * blocks(k, c.BK),
        )  # fmt: skip
        return [first, add_parts(parts, m, n, c.SPLIT, epi)] if parts else [first]


class LinearBoxes(LinearPointers):
    """Operands through tensor descriptors: no address in the kernel, zeros beyond the edge."""

    name, boxed = "boxes", True

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        return unboxed(eqn, layouts, dtype, arch)

    def suits(self, problem: Problem) -> str | None:
        m, n, k, _ = self.size(problem)
        if fills(problem, m, n, k):
            return "tiles of 64 x 64 fill the processors once and need no second pass"
        return few(m, n, k, problem.dtype)

    def by_rule(self, p: Problem, m: int, n: int, k: int, groups: int) -> Config:
        c = large_tile(m, n, k, p.dtype)
        deep = cdiv(cdiv(k, c.BK), c.SPLIT) >= DEEP_BLOCKS and programs(c, m, n) <= PROCESSORS
        return replace(c, num_stages=8) if deep else c


# ---- rules ----------------------------------------------------------------------------------


def programs(c: Config, m: int, n: int) -> int:
    return cdiv(m, c.BM) * cdiv(n, c.BN) * c.SPLIT


def large_tile(m: int, n: int, k: int, dtype: str) -> Config:
    """128 rows, 64 where there are no more, and as many parts as leave each processor a program;
    blocks of 128 bytes."""
    bk = tile(k, 128 // ITEMSIZE[dtype])
    if cdiv(m, 128) * cdiv(n, 128) >= PROCESSORS:  # arithmetic counts: squares read least
        return Config(128, 128, bk, num_warps=8, num_stages=4)
    c = Config(tile(m, 128, 64), tile(n, 64), bk, num_stages=4)
    length = cdiv(k, c.BK)
    parts = min(PROCESSORS // programs(c, m, n), length // LEAST_BLOCKS)
    if parts < 2 or length <= 2 * LEAST_BLOCKS:
        return c
    return replace(c, SPLIT=1 << (parts.bit_length() - 1))


def chunks(c: Config, work: Work) -> int:
    """Pieces of a tile that an epilogue takes one after the other: one that draws dropout masks
    spills beside more than 32 accumulators a thread."""
    if not any(e.op == "dropout" for e in work.rest):
        return 1
    return max(1, c.accumulators // EPILOGUE_ACCUMULATORS)


def fills(p: Problem, m: int, n: int, k: int) -> bool:
    """Whether tiles of 64 x 64 are about as many as the processors, both operands lying along the
    reduction, so that blocks of 128 are runs of 256 bytes."""
    count = cdiv(m, 64) * cdiv(n, 64)
    return p.op == "linear" and k >= 1024 and 3 * PROCESSORS <= 4 * count <= 4 * PROCESSORS


def few(m: int, n: int, k: int, dtype: str) -> str | None:
    """Why large tiles leave most processors idle; None where they do not."""
    count = programs(large_tile(m, n, k, dtype), m, n)
    return (
        f"large tiles fill {count} of {PROCESSORS} processors" if 4 * count < PROCESSORS else None
    )


# ---- shared with the weight gradient ---------------------------------------------------------


def unboxed(
    eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
) -> str | None:
    """Why descriptors cannot fetch the operands of a product; None where they can."""
    if why := no_descriptors(arch):
        return why
    if dtype == "ieee":
        return "boxes feed tensor cores, this product is ieee"
    (anchor,) = anchors_of(eqn)
    for v in anchor.inputs[:2]:
        row = layouts[v].stored(v.type.shape)[1] * v.type.dtype.itemsize
        if row % 16:
            return f"rows of {v.type} take {row} bytes, which is no multiple of 16"
    if dtype == "tf32" and anchor.op == "linear_wgrad":
        for v in anchor.inputs:
            if layouts[v].order != "hwcn":
                return f"{v} does not lie with its images innermost, which are summed up"
    return None


def add_parts(parts: Ref, m: int, n: int, count: int, epi: Epilogue | None) -> Launch:
    """The second pass: the sum of `count` parts of an [m, n] product, and its epilogue."""
    bn = min(512, next_power(n))
    bm = min(512 // bn, next_power(m))
    constants = {"M": m, "N": n, "SPLIT": count, "BM": bm, "BN": bn, "EPILOGUE": source(epi)}
    return make(
        "add_parts", "linear", (parts, arguments(epi)), constants, (cdiv(n, bn), cdiv(m, bm)),
        reads=(parts.name,), epilogues=(epi,),
    )  # fmt: skip
