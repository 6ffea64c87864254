"""Convolutions between channels-last images, for the variants that go tap by tap.

The interpreter and the GPU run the same rows through the same function.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphnet.ir.graph import Builder, Graph, Value
from graphnet.ir.op import get_op
from graphnet.ir.types import DType, TensorType, f32
from graphnet.lowering.launch.choice import forced
from graphnet.lowering.plan.plan import make_plan
from graphnet.ops.round_tf32 import rounded
from tests.case import attrs, fill
from tests.kinds import convs_of
from tests.poisoned import run


@dataclass(frozen=True)
class Row:
    """A convolution and the columns of its tile; `padding` is (rows, columns)."""

    n: int
    c: int
    h: int
    w: int
    o: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1
    groups: int = 1
    note: str = ""
    BN: int = 16
    BT: int = 0

    def attrs(self, op: str, math: str, **more):
        top, left = self.padding
        return attrs(
            op, stride=(self.stride,) * 2, padding=(top, top, left, left), math=math,
            dilation=(self.dilation,) * 2, groups=self.groups, **more,
        )  # fmt: skip

    def ops(self, variant: str) -> tuple[str, ...]:
        """The passes that a variant computes of this row."""
        if variant == "pairs" and (self.groups > 1 or self.stride > 1):
            return ()
        return tuple(
            op for op in convs_of(variant) if self.stride == 1 or op != "conv2d_dgrad"
        )  # fmt: skip

    def graph(self, op: str, dtype: DType, math: str, filters: str = "nhwc") -> Graph:
        """`op` on channels-last images; `filters` is the layout of the weight, "" for torch's."""
        b = Builder("g")
        x = TensorType(dtype, (self.n, self.c, self.h, self.w))
        w = TensorType(dtype, (self.o, self.c // self.groups, *self.kernel))
        (y,) = get_op("conv2d").infer(self.attrs("conv2d", math), x, w)

        def last(name: str, type: TensorType, layout: str = "nhwc") -> Value:
            given = b.input(name, type)
            return b.one("relayout", given, attrs=attrs("relayout", layout=layout))

        if op == "conv2d":
            ins = [last("x", x), last("w", w, filters), b.input("b", TensorType(f32, (self.o,)))]
            at = self.attrs(op, math)
        elif op == "conv2d_dgrad":
            ins = [last("dy", y), last("w", w, filters)]
            at = self.attrs(op, math, input_size=(self.h, self.w))
        else:
            ins = [last("x", x), last("dy", y)]
            at = self.attrs(op, math, kernel=self.kernel)
        return b.build(*b.emit(op, ins, at))


ROWS = [
    Row(2, 16, 3, 4, 16, (3, 3), padding=(1, 1), note="border"),
    Row(18, 32, 2, 2, 16, (1, 1), note="tail of images"),
    Row(2, 48, 2, 2, 48, (1, 2), note="two accumulators", BN=32, BT=16),
    Row(2, 48, 2, 3, 48, (2, 1), note="tail of columns", BN=32),
    Row(2, 32, 3, 2, 64, (2, 2), padding=(1, 0), groups=2, note="groups"),
    Row(2, 16, 2, 2, 16, (1, 1), padding=(1, 2), note="pixels that no tap reaches"),
    Row(2, 16, 5, 4, 16, (3, 2), stride=2, padding=(1, 0), note="stride"),
    Row(2, 16, 3, 3, 16, (2, 2), padding=(1, 1), dilation=2, note="dilation"),
]
MATH = {"f32": "ieee", "bf16": "bf16"}


def hold(
    op: str, row: Row, dtype: DType, variant: str, *, filters: str = "nhwc",
    target: str = "interpret", math: str = "", **forces: int,
) -> str:  # fmt: skip
    """Runs one convolution over poisoned memory against the oracle; the variant that ran."""
    math = math or MATH[dtype.name]
    graph = row.graph(op, dtype, math, filters)
    g = torch.Generator().manual_seed(1)
    drawn = [fill(i.value.type, g, i.value.type.dtype.torch) for i in graph.inputs]
    if math == "tf32":
        drawn = [rounded(t) for t in drawn]
    tiles = {"BM": 16, "BN": row.BN, "BT": row.BT, "BK": 16, **forces}
    with forced(op, variant=variant, **tiles):
        choices = [s.choice for s in make_plan(graph, target).launches]
        run(graph, drawn, target=target)
    return next(c.variant.name for c in choices if c is not None)
