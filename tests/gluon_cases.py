"""Convolutions by specialised warps: problems at every border, for the twin and for the GPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from graphnet.ir.text import parse
from graphnet.lowering.launch.choice import Kernels
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.config import Config
from graphnet.lowering.launch.registry import by_op
from graphnet.lowering.launch.steps import Launch
from graphnet.lowering.launch.work import take_apart
from graphnet.lowering.targets.interpret import interpreted
from graphnet.lowering.tune.alone import Alone
from tests import gluon_twin
from tests.wgrads import Row as Grad


@dataclass(frozen=True)
class Conv:
    """A convolution in bf16 with the code behind it: bias and relu, or the gradient of a relu."""

    n: int
    c: int
    size: tuple[int, int]
    o: int
    kernel: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    block: int = 0
    back: bool = False

    def graph(self):
        (h, w), (r, s), d = self.size, self.kernel, self.dilation
        t, b, le, ri = self.padding
        oh = (h + t + b - d * (r - 1) - 1) // self.stride + 1
        ow = (w + le + ri - d * (s - 1) - 1) // self.stride + 1
        lies = f"s2d{self.block}" if self.block else "nhwc"
        x = f"bf16[{self.n},{self.c},{h},{w}]{{{lies}}}"
        y = f"bf16[{self.n},{self.o},{oh},{ow}]{{nhwc}}"
        filters = f"%w: bf16[{self.o},{self.c // self.groups},{r},{s}]{{{lies}}} derived(%p)"
        own = f"%p: f32[{self.o},{self.c // self.groups},{r},{s}] param"
        at = (
            f"stride=({self.stride},{self.stride}), padding=({t},{b},{le},{ri}),"
            f" dilation=({d},{d}), groups={self.groups}, math='bf16', out='bf16'"
        )
        if self.back:
            inputs = f"%dy: {y} data, {own}, {filters}, %x: {x} data"
            body = (
                f"%a = conv2d_dgrad(%dy, %w) {{{at}, input_size=({h},{w})}}; %b = relu_grad(%x, %a)"
            )
            text = f"%r: {x} = fused(%dy, %w, %x) {{ {body}; yield %b }}"
        else:
            inputs = f"%x: {x} data, {own}, {filters}, %b0: f32[{self.o}] param"
            body = f"%a = conv2d(%x, %w, %b0) {{{at}}}; %b = relu(%a)"
            text = f"%r: {y} = fused(%x, %w, %b0) {{ {body}; yield %b }}"
        return parse(f"graph g({inputs}) {{\n  {text}\n  return %r\n}}")


def variant_of(op: str, name: str):
    return next(v for v in by_op()[op] if v.name == name)


def hold(graph, name: str, config: Config, target: str = "twin") -> list[Launch]:
    """A variant's launches of a graph's equation over memory full of NaN against the oracle; on a
    GPU twice, for the same bits.

    target  "twin" runs the kernels' text without a GPU, "cuda" the kernels
    """
    work = take_apart(graph.eqns[0], lambda v: v.name)
    variant = variant_of(work.problem.op, name)
    why = Kernels(by_op()).refusal(variant, work.eqn, work.layouts, "bf16")
    assert why is None, why
    steps = variant.launch(work, variant.cut(config, work.problem))
    alone = Alone(graph, work.eqn, "interpret" if target == "twin" else target)
    if target == "twin":
        alone.module = gluon_twin
    run, tensor = alone.prepare(steps)
    found = []
    for _ in range(1 if target == "twin" else 2):
        with interpreted() if target == "twin" else nullcontext():
            why = alone.verdict(run, tensor)
        assert why is None, why
        results = [tensor(Ref(v.name, v.type.dtype.name)) for v in work.eqn.results]
        found.append([t.clone().view(torch.uint8) for t in results])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[-1], strict=True))
    return steps


def tiles(bm: int, bn: int, bt: int = 0, bk: int = 16, stages: int = 3, programs: int = 5):
    return Config(bm, bn, bk, BT=bt, num_stages=stages, PROGRAMS=programs)


SAME = Conv(66, 16, (3, 4), 40, (3, 3), (1, 1, 1, 1))
CONVS = [
    (SAME, "gluon_rows", tiles(128, 64, bk=32)),
    (replace(SAME, n=130), "gluon_rows", tiles(128, 32, 16, programs=132)),
    (replace(SAME, c=24, o=72, kernel=(1, 2)), "gluon_rows", tiles(256, 16, 16)),
    (replace(SAME, back=True), "gluon_rows", tiles(128, 16, bk=32)),
    (replace(SAME, back=True, c=48), "gluon_pairs", tiles(256, 32, 16)),
    (replace(SAME, back=True, size=(2, 5)), "gluon_pairs", tiles(128, 16, stages=2)),
    (replace(SAME, size=(3, 5)), "gluon_pairs", tiles(256, 64)),
    (replace(SAME, c=32, o=32, groups=2), "gluon_rows", tiles(128, 16)),
    (replace(SAME, c=32, o=48, groups=2, back=True), "gluon_rows", tiles(128, 16)),
    (replace(SAME, stride=2), "gluon_rows", tiles(128, 32)),
    (replace(SAME, dilation=2, size=(3, 3)), "gluon_rows", tiles(128, 64)),
    # Pixels that no tap reaches: nothing to sum, and the pipeline goes on.
    (Conv(3, 16, (2, 2), 16, (1, 1), (1, 2, 2, 1)), "gluon_rows", tiles(128, 16, programs=2)),
    (
        Conv(3, 16, (2, 2), 16, (1, 1), (1, 2, 2, 1)),
        "gluon_rows",
        replace(tiles(128, 16, programs=1), LPT=0),
    ),
    (Conv(3, 16, (1, 6), 16, (1, 1), (0, 0, 3, 2)), "gluon_pairs", tiles(128, 16, programs=1)),
    (Conv(70, 3, (23, 19), 24, (11, 11), stride=4, block=4), "gluon_rows", tiles(128, 32, bk=64)),
    # Filters that stay: runs of 144 as 128 + 16, of 48 as 32 + 16, of 32.
    (Conv(70, 3, (23, 19), 96, (11, 11), stride=4, block=4), "gluon_resident", tiles(0, 0)),
    (Conv(130, 16, (3, 4), 40, (3, 3), (1, 2, 1, 0)), "gluon_resident", tiles(0, 0)),
    (Conv(3, 16, (4, 5), 8, (2, 2), (0, 1, 1, 0), stride=2), "gluon_resident", tiles(0, 0)),
]


def form(
    rows: str, bm: int, bn: int, bt: int = 0, bk: int = 16, stages: int = 3, programs: int = 5
):
    """Tiles of a weight gradient, whose rows are dy's channels ("d") or x's columns ("x")."""
    swap = int(rows == "x")
    return Config(bm, bn, bk, BT=bt, num_stages=stages, PROGRAMS=programs, SWAP=swap)


PADDED = Grad(5, 8, (3, 4), 72, (2, 2), padding=(1, 1, 1, 0), wants="update", dtype="bf16")
GRADS = [
    (PADDED, form("d", 128, 16)),
    (PADDED, form("x", 128, 64)),
    (replace(PADDED, o=136, wants="gradients"), form("d", 128, 32, 16, programs=9)),
    # Each consumer sums half of the first 128 channels, the first one those of the other 64.
    (replace(PADDED, o=136, wants="gradients"), form("x", 128, 128, 64, programs=3)),
    (replace(PADDED, o=264, c=16, kernel=(1, 2), wants="weight"), form("d", 256, 16)),
    (replace(PADDED, c=136, kernel=(1, 1), wants="gradients"), form("x", 256, 64, programs=2)),
    (replace(PADDED, wants="bias"), form("d", 128, 32)),
    (Grad(18, 8, (4, 3), 8, (3, 3), padding=(2, 2, 2, 2), dtype="bf16"), form("x", 128, 64)),
    (Grad(3, 3, (11, 11), 16, (7, 7), 4, block=4, wants="update", dtype="bf16"),
     form("d", 128, 64, 32)),
    (Grad(3, 16, (4, 5), 32, (1, 2), padding=(1, 1, 1, 1), groups=2, dtype="bf16"),
     form("d", 128, 16)),
    (Grad(2, 8, (7, 8), 16, (3, 1), 2, padding=(1, 1, 1, 1), dtype="bf16"), form("x", 128, 64)),
    # A filter row that reaches nothing: segments of no steps.
    (Grad(2, 8, (2, 2), 16, (4, 1), padding=(3, 0, 0, 0), dtype="bf16"),
     form("d", 128, 16, programs=40)),
]  # fmt: skip

# Tiles as a table names them; images, rows and columns that do not fill them.
LARGE = Grad(130, 48, (6, 5), 80, (3, 3), padding=(1, 1, 1, 1), wants="update", dtype="bf16")
THIN = Grad(70, 3, (31, 27), 96, (11, 11), 4, block=4, wants="update", dtype="bf16")
WIDE = [
    (THIN, form("d", 128, 128, 16, 64, 5, 132)),
    (LARGE, form("x", 128, 256, 0, 64, 4, 132)),
    (LARGE, form("d", 256, 128, 0, 64, 4, 33)),
    (LARGE, form("d", 256, 128, 64, 64, 4, 33)),
    (LARGE, form("x", 256, 128, 64, 64, 4, 132)),
]
BIG = Conv(260, 96, (7, 6), 272, (3, 3), (1, 1, 1, 1))
CONVS_WIDE = [
    (BIG, "gluon_rows", tiles(128, 256, 0, 64, 3, 132)),
    (BIG, "gluon_rows", tiles(128, 128, 0, 64, 5, 132)),
    (replace(BIG, back=True), "gluon_rows", tiles(128, 128, 0, 64, 5, 132)),
    (replace(BIG, back=True, size=(7, 5)), "gluon_pairs", tiles(256, 64, 32, 64, 4, 132)),
    (replace(BIG, back=True, size=(7, 5)), "gluon_pairs", tiles(256, 128, 0, 64, 3, 132)),
    (Conv(260, 3, (31, 27), 96, (11, 11), stride=4, block=4), "gluon_resident", tiles(0, 0)),
]
