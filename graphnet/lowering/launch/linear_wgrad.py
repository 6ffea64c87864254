"""Launches of a fully connected layer's weight gradient with its update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import HWCN, Layout
from graphnet.lowering.launch.codegen import Index, Ref
from graphnet.lowering.launch.config import PROCESSORS, Config, cdiv, tile
from graphnet.lowering.launch.linear import add_parts, unboxed
from graphnet.lowering.launch.products import (
    Product,
    Size,
    blocks,
    channel_sum,
    plain_wgrad,
    tiles,
)
from graphnet.lowering.launch.steps import Arg, Box, Launch, arguments, make, preload, source
from graphnet.lowering.launch.variants import Problem
from graphnet.lowering.launch.work import Work, strides
from graphnet.passes.templates import anchors_of


class LinearWgradPointers(Product):
    """x and dy by pointer, masked where tiles do not divide a size."""

    name, ops, split = "pointers", ("linear_wgrad",), True
    boxed = False

    def size(self, p: Problem) -> Size:
        n, c, k = p.shape
        return k, c, n, 1

    def by_rule(self, p: Problem, m: int, n: int, k: int, groups: int) -> Config:
        c = plain_wgrad(m, n, k, groups, p.dtype, p.held)
        return replace(c, BK=tile(k, 64)) if p.dtype == "bf16" else c

    def launch(self, work: Work, config: Config) -> list[Launch]:
        e, c = work.anchor, config
        rows, columns, n, _ = self.size(work.problem)
        x, dy = (work.ref(v) for v in e.inputs)
        whole = c.SPLIT == 1
        # An ieee product holds its operands' tiles in registers: no room for those of the update.
        ahead = whole and work.problem.dtype != "ieee"
        dw, db = e.outputs
        epi = None
        if dw is not None:
            epi = work.epilogue(dw, Index((rows, columns)), ahead=ahead)
        epi2 = None
        if db is not None:
            epi2 = work.epilogue(db, Index(db.type.shape), widen=True)
        if epi is None:  # the weight is frozen, its bias is not
            return [channel_sum(work, dy)]
        operands: tuple[Arg, ...] = (x, dy)
        if self.boxed:
            turned = [work.type(v).layout.order == "hwcn" for v in e.inputs[:2]]
            operands = (
                _box(x, n, columns, c.BK, c.BN, turned[0]), _box(dy, n, rows, c.BK, c.BM, turned[1])
            )  # fmt: skip
        own, parts = (epi, None) if whole else (None, Ref(f".parts{work.eqn.results[0]}", "f32"))
        has_bias = epi2 is not None
        constants = {
            "N": n, "C": columns, "K": rows, **strides("X", work.type(e.inputs[0])),
            **strides("D", work.type(e.inputs[1])), **tiles(c), "SPLIT": c.SPLIT,
            "HAS_BIAS": has_bias, "BOXED": self.boxed, "PRECISION": work.problem.dtype,
            "PROGRAMS": 0, "EPILOGUE": source(own), "EPILOGUE2": source(epi2),
            "PRELOAD": preload(own),
        }  # fmt: skip
        across, down = cdiv(columns, c.BN), cdiv(rows, c.BM)
        first = make(
            "linear_wgrad", "linear_wgrad",
            (*operands, parts, arguments(own), arguments(epi2)), constants,
            (across + has_bias, down, c.SPLIT), reads=(x.name, dy.name),
            writes=(parts.name,) if parts else (), epilogues=(own, epi2),
            scratch=((parts.name, 4 * c.SPLIT * rows * columns),) if parts else (),
            num_warps=c.num_warps, num_stages=c.num_stages,
            padded=2 * across * c.BN * down * c.BM * blocks(n, c.BK),
        )  # fmt: skip
        return [first, add_parts(parts, rows, columns, c.SPLIT, epi)] if parts else [first]


def _box(x: Ref, n: int, columns: int, depth: int, width: int, turned: bool) -> Box:
    """Boxes of `depth` rows of a batch by `width` columns; turned: the batch is innermost."""
    if turned:
        return Box(x, (columns, n), (width, depth))
    return Box(x, (n, columns), (depth, width))


class LinearWgradBoxes(LinearWgradPointers):
    """x and dy through tensor descriptors, which fill what lies beyond a size with zeros."""

    name, boxed = "boxes", True

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        return unboxed(eqn, layouts, dtype, arch)

    def wants(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str
    ) -> Mapping[Value, Layout]:
        """TF32 products take the summed axis innermost, which is the batch."""
        (anchor,) = anchors_of(eqn)
        return dict.fromkeys(anchor.inputs[:2], HWCN) if dtype == "tf32" else {}

    def suits(self, problem: Problem) -> str | None:
        c, (m, n, _, _) = self.rule(problem), self.size(problem)
        if problem.dtype == "tf32":
            count = cdiv(m, c.BM) * cdiv(n, c.BN)
            few = f"{count} tiles: turning them in registers takes less than copies of x and dy"
            return few if count < PROCESSORS else None
        if m % c.BM == n % c.BN == 0:
            return "tiles divide the weight, so pointers need no masks"
        return None
