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
from graphnet.ir.types import Layout
from graphnet.lowering.launch.codegen import Epilogue, Index, Ref
from graphnet.lowering.launch.config import PROCESSORS, SHARED_BYTES, Config, cdiv, next_power
from graphnet.lowering.launch.steps import Arg, Box, Launch, Step, arguments, make, source
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.lowering.launch.work import Work

LEAST_BLOCKS = 8  # of a part; a second pass takes about as long as so many blocks (measured)
EPILOGUE_ACCUMULATORS = 32  # a thread
DEEP_BLOCKS = 32  # from so many on eight stages are better than four (measured)


class Pointers(Variant):
    """Operands by pointer: any size, masked where tiles do not divide it."""

    name, ops = "pointers", ("linear", "linear_dgrad")
    boxed = False

    def configs(self, problem: Problem) -> Iterator[Config]:
        m, n, k = _size(problem)
        first = _plain(m, n, k, problem.dtype)
        if problem.dtype == "bf16":
            if _fills(problem):
                first = Config(64, 64, 128, num_stages=5)
            elif not few(problem):
                first = split_tile(m, n, k)
        yield from dict.fromkeys([first, *self._others(problem, first)])

    def _others(self, problem: Problem, first: Config) -> Iterator[Config]:
        m, n, k = _size(problem)
        if problem.dtype != "bf16":
            yield from (
                replace(first, BK=bk, num_stages=s) for bk, s in ((16, 2), (32, 2), (32, 3))
            )
            return
        sizes = [(128, 64, 64, 4), (128, 128, 64, 8), (64, 64, 128, 4), (64, 64, 64, 4)]
        sizes += [(128, 32, 64, 4), (64, 32, 64, 4), (128, 128, 128, 8), (128, 256, 64, 8)]
        for (bm, bn, bk, warps), split, stages in combinations(sizes, (1, 2, 4, 8), (3, 4, 5, 8)):
            c = Config(bm, bn, bk, SPLIT=split, num_warps=warps, num_stages=stages)
            room = c.shared_bytes(2) <= SHARED_BYTES and bm <= max(64, next_power(m))
            if room and bn <= next_power(n) and split * stages * bk <= next_power(k):
                yield c

    def launch(self, work: Work, config: Config) -> list[Step]:
        e, c = work.anchor, config
        (m, k), n = e.inputs[0].type.shape, e.out.type.shape[1]
        bias = e.inputs[2] if len(e.inputs) > 2 else None
        epi = work.epilogue(e.out, Index((m, n)), bias=bias)
        a, b = (work.ref(v) for v in e.inputs[:2])
        sa, sb = (work.type(v).strides for v in e.inputs[:2])
        operands: tuple[Arg, ...] = (a, b)
        turned = e.op == "linear"  # the stored weight is [n, k]
        if self.boxed:
            block = (c.BN, c.BK) if turned else (c.BK, c.BN)
            size = (n, k) if turned else (k, n)
            operands = Box(a, (m, k), (c.BM, c.BK)), Box(b, size, block)
        if turned:
            sb = sb[1], sb[0]
        constants = {
            "M": m, "N": n, "K": k, "AS0": sa[0], "AS1": sa[1], "BS0": sb[0], "BS1": sb[1],
            "BM": c.BM, "BN": c.BN, "BK": c.BK, "SPLIT": c.SPLIT, "BOXED": self.boxed,
            "PRECISION": e.attrs.math,  # type: ignore[attr-defined]
            "EPILOGUE": source(epi) if c.SPLIT == 1 else None,
        }  # fmt: skip
        parts = Ref(f".parts{work.eqn.results[0]}", "f32") if c.SPLIT > 1 else None
        own = epi if c.SPLIT == 1 else None
        first = make(
            "product", "linear", (*operands, parts, arguments(own)), constants,
            (cdiv(n, c.BN), c.SPLIT, cdiv(m, c.BM)), reads=(a.name, b.name),
            writes=(parts.name,) if parts else (), epilogues=(own,),
            scratch=((parts.name, 4 * c.SPLIT * m * n),) if parts else (),
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
        return [first, add_parts(parts, m, n, c.SPLIT, epi)] if parts else [first]


class Boxes(Pointers):
    """Operands through tensor descriptors: no address in the kernel, zeros beyond the edge."""

    name, boxed = "boxes", True

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        return unboxed(eqn, self.ops, dtype, arch)

    def suits(self, problem: Problem) -> str | None:
        if _fills(problem):
            return "tiles of 64 x 64 fill the processors once and need no second pass"
        if why := few(problem):
            return why
        return None

    def configs(self, problem: Problem) -> Iterator[Config]:
        m, n, k = _size(problem)
        first = split_tile(m, n, k)
        blocks = cdiv(cdiv(k, first.BK), first.SPLIT)
        if blocks >= DEEP_BLOCKS and programs(first, m, n) <= PROCESSORS:
            first = replace(first, num_stages=8)
        yield from dict.fromkeys([first, *self._others(problem, first)])


# ---- rules ----------------------------------------------------------------------------------


def _size(p: Problem) -> tuple[int, int, int]:
    """(rows, columns, length of the reduction)."""
    n, c, k = (p.sizes[a] for a in "NCK")
    return (n, k, c) if p.op == "linear" else (n, c, k)


def programs(c: Config, m: int, n: int) -> int:
    return cdiv(m, c.BM) * cdiv(n, c.BN) * c.SPLIT


def split_tile(m: int, n: int, k: int) -> Config:
    """128 rows, 64 where there are no more, and as many parts as leave each processor a program."""
    bk = max(16, min(64, next_power(k)))
    c = Config(max(64, min(128, next_power(m))), max(16, min(64, next_power(n))), bk, num_stages=4)
    blocks = cdiv(k, bk)
    parts = min(PROCESSORS // programs(c, m, n), blocks // LEAST_BLOCKS)
    if parts < 2 or blocks <= 2 * LEAST_BLOCKS:
        # An epilogue that draws dropout masks spills beside 64 accumulators a thread.
        return replace(c, num_warps=8) if c.accumulators > EPILOGUE_ACCUMULATORS else c
    return replace(c, SPLIT=1 << (parts.bit_length() - 1))


def _fills(p: Problem) -> bool:
    """Whether tiles of 64 x 64 are about as many as the processors, both operands lying along the
    reduction, so that blocks of 128 are runs of 256 bytes."""
    m, n, k = _size(p)
    count = cdiv(m, 64) * cdiv(n, 64)
    return p.op == "linear" and k >= 1024 and 3 * PROCESSORS <= 4 * count <= 4 * PROCESSORS


def few(p: Problem) -> str | None:
    """Why large tiles leave most processors idle; None where they do not."""
    m, n, k = _size(p)
    count = programs(split_tile(m, n, k), m, n)
    return f"large tiles make {count} programs" if 4 * count < PROCESSORS else None


def _plain(m: int, n: int, k: int, math: str) -> Config:
    """Tiles that fill the processors, without parts."""
    # ieee products run on FMAs, and layers draw dropout masks in their epilogue: both spill above
    # 64 columns. wgmma takes at least 64 rows.
    bm, bn = (max(16, min(64, next_power(s))) for s in (m, n))
    least = 32 if math == "ieee" or m < 64 else 64
    while cdiv(m, bm) * cdiv(n, bn) < PROCESSORS and (bm > least or bn > 32):
        bm, bn = (bm // 2, bn) if bm > least and bm >= bn or bn <= 32 else (bm, bn // 2)
    bk = max(16, min(64 if math == "bf16" else 32, next_power(k)))
    return Config(bm, bn, bk, num_stages=2 if math == "ieee" else 3)


# ---- shared with the weight gradient ---------------------------------------------------------


def unboxed(eqn: Eqn, ops: tuple[str, ...], dtype: str, arch: int) -> str | None:
    """Why descriptors cannot fetch the operands of a product; None where they can."""
    if arch < 90:
        return f"sm_{arch} has no tensor descriptors"
    if dtype != "bf16":
        return f"boxes feed bf16 products, this one is {dtype}"
    anchor = next(e for e in (eqn.body.eqns if eqn.body else (eqn,)) if e.op in ops)
    for v in anchor.inputs[:2]:
        row = v.type.shape[1] * v.type.dtype.itemsize
        if row % 16:
            return f"rows of {v.type} take {row} bytes, which is no multiple of 16"
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
