"""Stages of a region: small fully connected layers, their input gradients, and losses
(kernels/region_linear.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.launch.codegen import Index, Ref
from graphnet.lowering.launch.config import ITEMSIZE, Config, cdiv, next_power, tile
from graphnet.lowering.launch.cost import Ceiling
from graphnet.lowering.launch.problems import problem_of
from graphnet.lowering.launch.region import STAGE_US, Body, Stage, Stages
from graphnet.lowering.launch.steps import make
from graphnet.lowering.launch.variants import Problem
from graphnet.lowering.launch.work import Work
from graphnet.passes.templates import anchors_of

ROWS = 16  # of a program: the fewest that a product takes
COLUMNS = 1024  # of a loss, whose rows stay in registers
# A launch of LeNet-5's fc1 of its own, 128 x 400 x 120, takes 4.8 us (H100, measured).
ALONE_US = 4.6
# Not measured: of a processor's rate, what 16 rows reach; bytes/s that it gets from the L2 cache.
SHARE = {"ieee": 0.25, "tf32": 0.1, "bf16": 0.1}
L2 = 1e11


def _size(e: Eqn) -> tuple[int, int, int]:
    """Rows, columns and terms of a product."""
    n, c, k = problem_of([e]).shape
    return (n, k, c) if e.op == "linear" else (n, c, k)


class Linear(Stage):
    """A product with its bias and its elementwise code."""

    def __init__(self, op: str) -> None:
        self.ops = (op,)

    def refusal(self, members: Sequence[Eqn], kept: set[Value]) -> str | None:
        return None

    def us(self, members: Sequence[Eqn], programs: int, gpu: Ceiling) -> float:
        (e,) = anchors_of(members[0])
        _, n, k = _size(e)
        math: str = e.attrs.math  # type: ignore[attr-defined]
        work = 2 * ROWS * tile(n, 1 << 20) * tile(k, 1 << 20)
        compute = work / (gpu.flops(math) / gpu.processors * SHARE[math])
        memory = n * k * ITEMSIZE[math] / L2
        return STAGE_US + 1e6 * max(compute, memory) * cdiv(programs, gpu.processors)

    def write(self, body: Body, works: Sequence[Work]) -> None:
        (work,) = works
        e, c = work.anchor, body.config
        m, n, k = _size(e)
        (sa, sb) = (work.type(v).strides for v in e.inputs[:2])
        if e.op == "linear":  # the stored weight is [n, k]
            sb = sb[1], sb[0]
        operands = [body.read(v) for v in e.inputs[:2]]
        epilogue = body.epilogue(work, {e.out: "acc"}, Index((m, n)), bias=work.bias)
        constants = {
            "M": m, "N": n, "K": k, "AS0": sa[0], "AS1": sa[1], "BS0": sb[0], "BS1": sb[1],
            "BM": c.BM, "BN": tile(n, c.BN), "BK": tile(k, c.BK),
            "PRECISION": repr(e.attrs.math),  # type: ignore[attr-defined]
            "EPILOGUE": epilogue,
        }  # fmt: skip
        body.call("linear", operands, constants)
        body.notes.append(work.note)


class Loss(Stage):
    """A loss, its gradient, or both from the same logits."""

    def __init__(self, *ops: str) -> None:
        self.ops = ("+".join(ops),)

    def refusal(self, members: Sequence[Eqn], kept: set[Value]) -> str | None:
        anchors = anchors_of(members[0])
        classes = anchors[0].inputs[0].type.shape[1]
        if classes > COLUMNS:
            return f"a row of {classes} classes does not stay in registers, at most {COLUMNS} do"
        means = {a.out for a in anchors if not a.op.endswith("_grad")}
        if any(v in means for e in members[0].plain if e not in anchors for v in e.inputs):
            return "code reads the mean loss, which is complete behind the region"
        return None

    def write(self, body: Body, works: Sequence[Work]) -> None:
        (work,) = works
        e, c, programs = work.anchor, body.config, body.programs
        logits, labels, live, *over = e.inputs
        counted = over[0] if over else live  # the rows that the mean is over
        m, n = logits.type.shape
        outer = dict(work.stores)
        grad = next((a.out for a in work.anchors if a.op.endswith("_grad")), None)
        value = next((a.out for a in work.anchors if not a.op.endswith("_grad")), None)
        loss = outer.get(value) if value is not None else None
        rest = replace(work, stores=tuple(s for s in work.stores if s[0] != value))
        epilogue = "None" if grad is None else body.epilogue(rest, {grad: "acc"}, Index((m, n)))
        operands = [body.read(v) for v in e.inputs] + ["None"] * (not over)
        out = "None"
        if loss is not None and programs == 1:
            out = body.store(loss)
        elif loss is not None:
            sums = Ref(body.own("sums"), "f32")
            out = body.extra(sums.name, sums.dtype, 4 * programs)
            scalar = Ref(body.name(counted), counted.type.dtype.name)
            mean = Ref(work.name[loss], loss.type.dtype.name)
            body.after.append(
                make(
                    "mean_reduce", "reduce", (sums, scalar, mean),
                    {"COUNT": programs, "BLOCK": next_power(programs)}, (1,),
                    reads=(sums.name, scalar.name), writes=(mean.name,),
                )
            )  # fmt: skip
        s0, s1 = work.type(logits).strides
        a: Any = e.attrs
        kernel = e.op.removesuffix("_grad")
        own = (
            {"SMOOTHING": a.label_smoothing} if kernel == "cross_entropy"
            else {"MARGIN": a.margin, "DIVISOR": n if a.mean else 1}
        )  # fmt: skip
        constants = {
            "M": m, "C": n, "S0": s0, "S1": s1, "BM": c.BM, "BN": next_power(n),
            "PROGRAMS": programs, **own, "LOSS": loss is not None, "GRAD": grad is not None,
            "EPILOGUE": epilogue,
        }  # fmt: skip
        body.call(kernel, [*operands, out], constants)
        body.notes.append(work.note)


STAGES: tuple[Stage, ...] = (
    Linear("linear"),
    Linear("linear_dgrad"),
    *(Loss(op, f"{op}_grad") for op in ("cross_entropy", "multi_margin")),
    *(Loss(op) for op in ("cross_entropy", "multi_margin")),
)


class RowBlocks(Stages):
    """One program for each 16 rows of the batch: small fully connected layers, and the loss."""

    name = "row_blocks"
    alone_us = ALONE_US

    def known(self) -> Sequence[Stage]:
        return STAGES

    def configs(self, problem: Problem) -> Iterator[Config]:
        for warps in (8, 4):
            yield Config(ROWS, 128, 64, num_warps=warps)

    def interpretable(self, config: Config, problem: Problem) -> Config:
        return replace(config, BM=tile(problem.shape[0], 128))
