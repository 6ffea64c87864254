"""Weight gradients by filter rows: problems at every border, with tiles of their own.

The interpreter and the GPU run them through the same function.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from graphnet.ir.text import parse
from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.config import Config
from graphnet.lowering.launch.steps import Launch
from graphnet.lowering.launch.wgrad_rows import _TF32, WgradRows
from graphnet.lowering.launch.work import take_apart
from graphnet.lowering.targets.interpret import interpreted
from graphnet.lowering.tune.alone import Alone


@dataclass(frozen=True)
class Row:
    """A convolution; filters and momentum lie channels-last.

    wants  "update" of weight and bias with a bf16 copy, "gradients", "weight" or "bias" alone
    dtype  of the operands; "tf32" is fp32 with the images innermost
    """

    n: int
    c: int
    size: tuple[int, int]
    o: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: int = 1
    groups: int = 1
    block: int = 0
    wants: str = "gradients"
    dtype: str = "f32"

    def graph(self):
        (h, w), (r, s), d = self.size, self.kernel, self.dilation
        t, b, le, ri = self.padding
        oh = (h + t + b - d * (r - 1) - 1) // self.stride + 1
        ow = (w + le + ri - d * (s - 1) - 1) // self.stride + 1
        lies = f"s2d{self.block}" if self.block else "nhwc"
        turned = self.dtype == "tf32"
        kind = "f32" if turned else self.dtype
        image = ("hwcn" + (f",s2d{self.block}" if self.block else "")) if turned else lies
        x = f"{kind}[{self.n},{self.c},{h},{w}]{{{image}}}"
        dy = f"{kind}[{self.n},{self.o},{oh},{ow}]{{{'hwcn' if turned else 'nhwc'}}}"
        shape = f"[{self.o},{self.c // self.groups},{r},{s}]"
        bias, filters = f"f32[{self.o}]", f"f32{shape}{{nhwc}}"
        wgrad = (
            f"conv2d_wgrad(%x, %dy) {{stride=({self.stride},{self.stride}),"
            f" padding=({t},{b},{le},{ri}), dilation=({d},{d}), groups={self.groups},"
            f" math='{'ieee' if self.dtype == 'f32' else self.dtype}', kernel=({r},{s})}}"
        )
        scalars = "%lr, %momentum, %decay"
        own = {"bias": f"%b: {bias} param, %mb: {bias} slot(%b)"}
        own["update"] = f"{own['bias']}, %w: {filters} param, %mw: {filters} slot(%w)"
        inputs = [f"%x: {x} data", f"%dy: {dy} data"]
        of_bias = f"%c, %d = sgd_update(%b, %g1, %mb, {scalars}) {{momentum=True}}"
        if self.wants in own:
            rates = [f"{v}: f32[] hyper" for v in scalars.split(", ")]
            inputs += [own[self.wants], *rates]
        commit = ""
        if self.wants == "gradients":
            text = f"%dw: {filters}, %db: {bias} = {wgrad}"
            returns = "%dw, %db"
        elif self.wants == "weight":
            text, returns = f"%dw: {filters}, _ = {wgrad}", "%dw"
        elif self.wants == "bias":
            text = (
                f"%b1: {bias}, %mb1: {bias} = fused(%x, %dy, %b, %mb, {scalars})"
                f" {{ %a, %g1 = {wgrad}; {of_bias}; yield %c, %d }}"
            )
            commit, returns = "commit %b = %b1, %mb = %mb1", "%b1"
        else:
            copy = f"bf16{shape}{{{lies}}}"
            text = (
                f"%b1: {bias}, %mb1: {bias}, %w1: {filters}, %mw1: {filters}, %wc: {copy} ="
                f" fused(%x, %dy, %b, %mb, {scalars}, %w, %mw) {{ %a, %g1 = {wgrad}; {of_bias};"
                f" %e, %f = sgd_update(%w, %a, %mw, {scalars}) {{momentum=True}};"
                f" %h = cast(%e) {{dtype='bf16'}}; yield %c, %d, %e, %f, %h }}"
            )
            commit, returns = "commit %b = %b1, %mb = %mb1, %w = %w1, %mw = %mw1", "%wc"
        return parse(
            f"graph g({', '.join(inputs)}) {{\n  {text}\n  {commit}\n  return {returns}\n}}"
        )


def tiles(rows, bm, bn, bt=0, bk=16, programs=5):
    return Config(bm, bn, bk, BT=bt, SWAP=int(rows == "x"), PROGRAMS=programs, num_stages=2)


def hold(row: Row, c: Config, target: str = "interpret") -> list[Launch]:
    """The launches of one weight gradient over memory full of NaN against the oracle, twice."""
    graph = row.graph()
    steps = WgradRows().launch(take_apart(graph.eqns[0], lambda v: v.name), c)
    alone = Alone(graph, graph.eqns[0], target)
    run, tensor = alone.prepare(steps)
    found = []
    for _ in range(2):
        with interpreted() if target == "interpret" else nullcontext():
            why = alone.verdict(run, tensor)
        assert why is None, why
        results = [tensor(Ref(v.name, v.type.dtype.name)) for v in graph.eqns[0].results]
        found.append([t.clone().view(torch.uint8) for t in results])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    return steps


PADDED = Row(5, 8, (5, 6), 24, (3, 3), padding=(1, 1, 1, 1), wants="update")
CASES = [
    (PADDED, tiles("d", 16, 16)),
    (PADDED, tiles("x", 16, 16)),
    (PADDED, tiles("d", 32, 32, 16, programs=9)),
    (PADDED, tiles("x", 16, 16, 16, programs=7)),
    (replace(PADDED, wants="gradients"), tiles("x", 32, 16)),
    (replace(PADDED, wants="weight"), tiles("d", 16, 32)),
    (replace(PADDED, wants="bias"), tiles("d", 16, 32)),
    (replace(PADDED, dtype="bf16"), tiles("x", 16, 32)),
    (Row(18, 8, (4, 3), 8, (5, 5), padding=(2, 2, 2, 2), wants="update"), tiles("x", 16, 16)),
    # Blocks of pixels: columns beyond the filter, 144 of them as 128 + 16.
    (Row(3, 3, (23, 19), 16, (11, 11), 4, block=4, wants="update"), tiles("d", 16, 128, 16)),
    (Row(2, 3, (9, 9), 16, (5, 5), 4, block=4, dtype="bf16"), tiles("x", 16, 16)),
    (Row(3, 16, (4, 5), 32, (3, 3), padding=(1, 1, 1, 1), groups=2), tiles("d", 16, 16)),
    (Row(3, 16, (4, 5), 48, (3, 2), padding=(1, 1, 0, 1), groups=2), tiles("x", 16, 16, 16)),
    (Row(2, 8, (7, 8), 16, (3, 3), 2, padding=(1, 1, 1, 1), wants="update"), tiles("d", 16, 16)),
    (Row(2, 8, (7, 6), 16, (3, 2), dilation=2, padding=(2, 2, 1, 1)), tiles("x", 16, 16)),
    # More rows and columns of padding than the filter reaches; a filter row that reaches nothing.
    (Row(2, 8, (2, 3), 16, (2, 2), padding=(2, 1, 0, 3)), tiles("d", 16, 16)),
    (Row(2, 8, (2, 2), 16, (4, 1), padding=(3, 0, 0, 0)), tiles("x", 16, 16, programs=40)),
    (Row(1, 8, (1, 1), 8, (1, 1), wants="update"), tiles("d", 16, 16)),
    # TF32: descriptors want whole 16 bytes of images.
    (replace(PADDED, n=8, dtype="tf32"), tiles("d", 16, 16)),
    (replace(PADDED, n=20, dtype="tf32"), tiles("x", 16, 16, 16, programs=7)),
    (Row(4, 3, (23, 19), 16, (11, 11), 4, block=4, dtype="tf32"), tiles("d", 16, 128, 16)),
    (Row(4, 16, (4, 5), 48, (3, 2), padding=(1, 1, 0, 1), groups=2, dtype="tf32"),
     tiles("x", 16, 16, 16)),
    (Row(4, 3, (7, 8), 5, (3, 3), 2, padding=(1, 1, 1, 1), dtype="tf32"), tiles("d", 16, 16)),
]  # fmt: skip

# Tiles of wgmma, of each kind that a rule may take; images, rows and columns that do not fill them.
WIDE = Row(130, 48, (6, 5), 80, (3, 3), padding=(1, 1, 1, 1), wants="update", dtype="bf16")
FIRST = Row(70, 3, (31, 27), 96, (11, 11), 4, block=4, wants="update", dtype="bf16")
TILES = [
    (FIRST, Config(128, 128, 64, BT=16, num_stages=4, num_warps=8, PROGRAMS=132)),
    (WIDE, Config(128, 256, 64, SWAP=1, num_stages=4, num_warps=8, PROGRAMS=132)),
    (WIDE, Config(128, 256, 64, BT=128, SWAP=1, num_stages=3, num_warps=8, PROGRAMS=132)),
    (WIDE, Config(256, 128, 64, BT=64, num_stages=3, num_warps=8, PROGRAMS=33)),
    (WIDE, Config(128, 128, 64, num_stages=3, num_warps=4, PROGRAMS=264)),
    (WIDE, Config(64, 64, 64, BT=32, num_stages=4, num_warps=4, PROGRAMS=264)),
    *((replace(WIDE, n=132, dtype="tf32"), c) for c in _TF32),
    (replace(FIRST, n=72, dtype="tf32"), _TF32[6]),
]
