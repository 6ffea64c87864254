"""Launches of a fully connected layer's weight gradient with its update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product as combinations

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import Layout
from graphnet.lowering.launch.codegen import Index, Ref
from graphnet.lowering.launch.config import (
    LEAST_PART,
    PROCESSORS,
    SHARED_BYTES,
    UPDATE_ACCUMULATORS,
    Config,
    _with_room,
    cdiv,
    next_power,
)
from graphnet.lowering.launch.linear import _channel_sum
from graphnet.lowering.launch.linear_products import add_parts, unboxed
from graphnet.lowering.launch.steps import Arg, Box, Step, arguments, make, preload, source
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.lowering.launch.work import Work, strides


class Pointers(Variant):
    """x and dy by pointer, masked where tiles do not divide a size."""

    name, ops = "pointers", ("linear_wgrad",)
    boxed = False

    def configs(self, problem: Problem) -> Iterator[Config]:
        n, c, k = (problem.sizes[a] for a in "NCK")
        low = problem.dtype == "bf16"
        bm, bn = (max(16, min(64, next_power(s))) for s in (k, c))
        # An ieee product holds its operand tiles in registers: 32 deep spills beside an update.
        most = {"bf16": 64, "tf32": 32, "ieee": 16}[problem.dtype]
        first = Config(
            bm, bn, max(16, min(most, next_power(n))), SPLIT=_parts(n, cdiv(k, bm) * cdiv(c, bn)),
            num_stages=2 if problem.dtype == "ieee" else 3,
        )  # fmt: skip
        others = [
            Config(bm, bn, bk, SPLIT=first.SPLIT, num_warps=w, num_stages=s)
            for (bm, bn), bk, w, s in combinations(
                ((64, 64), (64, 32), (32, 64), (32, 128), (64, 128), (128, 64)),
                (64, 128, 32) if low else (32, 16), (4, 8), (2, 3, 4),
            )
            if bm <= next_power(k) and bn <= next_power(c) and bk <= next_power(n)
        ]  # fmt: skip
        fit = [
            o for o in others
            if o.shared_bytes(2 if low else 4) <= SHARED_BYTES
            and (o.accumulators <= UPDATE_ACCUMULATORS or o.SPLIT > 1)
        ]  # fmt: skip
        yield from dict.fromkeys([first, *fit])

    def launch(self, work: Work, config: Config) -> list[Step]:
        e, c = work.anchor, _with_room(config, work.held)
        x, dy = (work.ref(v) for v in e.inputs)
        (n, columns), rows = e.inputs[0].type.shape, e.inputs[1].type.shape[1]
        whole = c.SPLIT == 1
        epi = work.epilogue(e.out, Index((rows, columns)), ahead=whole)
        db = e.outputs[1]
        epi2 = None
        if db is not None:
            epi2 = work.epilogue(db, Index(db.type.shape), widen=True)
        if epi is None:  # the weight is frozen, its bias is not
            return [_channel_sum(work, dy)]
        operands: tuple[Arg, ...] = (x, dy)
        if self.boxed:
            operands = (
                Box(x, (n, columns), (c.BK, c.BN)), Box(dy, (n, rows), (c.BK, c.BM))
            )  # fmt: skip
        own = epi if whole else None
        parts = None if whole else Ref(f".parts{work.eqn.results[0]}", "f32")
        xt, dt = (work.type(v) for v in e.inputs)
        constants = {
            "N": n, "C": columns, "K": rows, **strides("X", xt), **strides("D", dt), "BM": c.BM,
            "BN": c.BN, "BK": c.BK, "SPLIT": c.SPLIT, "HAS_BIAS": epi2 is not None,
            "BOXED": self.boxed, "PRECISION": e.attrs.math,  # type: ignore[attr-defined]
            "EPILOGUE": source(own), "EPILOGUE2": source(epi2), "PRELOAD": preload(own),
        }  # fmt: skip
        first = make(
            "weight_gradient", "linear_wgrad",
            (*operands, parts, arguments(own), arguments(epi2)), constants,
            (cdiv(columns, c.BN) + (epi2 is not None), cdiv(rows, c.BM), c.SPLIT),
            reads=(x.name, dy.name), writes=(parts.name,) if parts else (),
            scratch=((parts.name, 4 * c.SPLIT * rows * columns),) if parts else (),
            epilogues=(own, epi2), num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
        return [first, add_parts(parts, rows, columns, c.SPLIT, epi)] if parts else [first]


class Boxes(Pointers):
    """x and dy through tensor descriptors, which fill what lies beyond a size with zeros."""

    name, boxed = "boxes", True

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        return unboxed(eqn, self.ops, dtype, arch)

    def suits(self, problem: Problem) -> str | None:
        c = next(iter(self.configs(problem)))
        if problem.sizes["K"] % c.BM == problem.sizes["C"] % c.BN == 0:
            return "tiles divide the weight, so pointers need no masks"
        return None


def _parts(n: int, tiles: int) -> int:
    """Parts of a reduction over n rows: a short one does not pay for the second launch, and there
    are no more parts than processors."""
    parts = min(PROCESSORS // tiles, n // LEAST_PART) if tiles < PROCESSORS else 1
    return 1 << (max(parts, 1).bit_length() - 1)
