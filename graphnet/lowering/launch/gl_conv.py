"""Convolution forward and input gradient by specialised warps: kernels/gl_conv.py.

`gluon_rows` and `gluon_pairs` make the tiles of `rows` and `pairs`, `gluon_resident` keeps all
filters of a first layer in shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import Layout
from graphnet.lowering.launch.codegen import Index, Ref
from graphnet.lowering.launch.config import PROCESSORS, Config, cdiv, next_power
from graphnet.lowering.launch.conv_rows import (
    Geometry,
    Pairs,
    Rows,
    cost_of,
    filters_box,
    of_problem,
    of_work,
    order,
)
from graphnet.lowering.launch.gluon import CONSUMER, HALF, ROOM, Specialised, slices_bytes
from graphnet.lowering.launch.problems import problem_of
from graphnet.lowering.launch.steps import Box, Launch, arguments, make, source
from graphnet.lowering.launch.variants import Problem
from graphnet.lowering.launch.work import Work
from graphnet.passes.templates import anchors_of

DEEPEST = 128  # values of a run in one box of resident filters


def _images(x: Ref, g: Geometry, c: Config, depth: int) -> Box:
    """Boxes of a consumer's images by `depth` values of a row."""
    row = g.W * g.G * g.C
    block = (1, c.BM // 2, depth)
    return Box(x, (g.H, g.N, row), block, (row, g.H * row, 1), gluon=True)


def _filters(w: Ref, g: Geometry, width: int, depth: int) -> Box | None:
    return replace(filters_box(w, g, width, depth), gluon=True) if width and depth else None


def _launch(
    kernel: str, work: Work, g: Geometry, c: Config, operands: tuple, constants: dict[str, Any],
    depth: int,
) -> Launch:  # fmt: skip
    """A launch of as many programs as there are processors, which take the tiles in turn.

    depth  summed values of all pixels of an image, in whole blocks
    """
    e = work.anchor
    epi = work.epilogue(e.out, Index(e.out.type.shape), bias=work.bias)
    tiles = cdiv(g.K, c.BN + c.BT) * cdiv(g.N, c.BM // g.PIXELS) * g.G
    programs = min(c.PROGRAMS or PROCESSORS, tiles * g.OH * cdiv(g.OW, g.PIXELS))
    given = {
        **constants, "BM": c.BM, "BN": c.BN, "BT": c.BT, "BK": c.BK, "STAGES": c.num_stages,
        "PROGRAMS": programs, "EPILOGUE": source(epi),
    }  # fmt: skip
    return make(
        kernel, "gl_conv", (*operands, arguments(epi)), given, (programs,),
        reads=tuple(work.name[v] for v in e.inputs[:2]), epilogues=(epi,), num_warps=CONSUMER,
        num_stages=c.num_stages, padded=2 * tiles * c.BM * (c.BN + c.BT) * depth,
    )  # fmt: skip


class GluonRows(Specialised, Rows):
    """A warpgroup has half of a tile's images."""

    name = "gluon_rows"
    tiles: tuple[tuple[int, int, int], ...] = (
        (128, 256, 0), (128, 128, 0), (256, 128, 0), (128, 64, 32), (256, 64, 32), (256, 64, 0),
        (128, 64, 0), (128, 32, 0), (128, 16, 0),
    )  # fmt: skip

    def configs(self, problem: Problem) -> Iterator[Config]:
        g = of_problem(problem, self.pixels)
        depth = max(16, min(64, next_power(g.run)))
        fits = (
            _staged(Config(bm, bn, depth, BT=bt), (bm + bn + bt) * depth)
            for bm, bn, bt in self.tiles
            if min(g.K, 64) <= bn + bt <= max(16, next_power(g.K))
        )
        held = [c for c in fits if c is not None]
        held.sort(key=lambda c: cost_of(g, c))
        yield from held
        yield from (replace(c, num_stages=c.num_stages - 1) for c in held[:2])
        yield from (replace(c, LPT=0) for c in held[:1] if order(g))

    def cut(self, config: Config, problem: Problem) -> Config:
        c = super().cut(config, problem)
        return replace(c, BM=2 * HALF if config.BM < 4 * HALF else 4 * HALF, num_warps=CONSUMER)

    def launch(self, work: Work, config: Config) -> list[Launch]:
        c, g = config, of_work(work, self.pixels)
        x, w = (work.ref(v) for v in work.anchor.inputs[:2])
        operands = (
            _images(x, g, c, c.BK), _filters(w, g, c.BN, c.BK), _filters(w, g, c.BT, c.BK),
            order(g) if c.LPT else None,
        )  # fmt: skip
        depth = g.depth(c.BK)
        return [_launch("conv2d_specialised", work, g, c, operands, g.constants(), depth)]


class GluonPairs(GluonRows, Pairs):
    """A warpgroup has one of two neighbouring pixels; both read a box of filters."""

    name = "gluon_pairs"
    pixels = 2
    tiles = (
        (256, 128, 0), (256, 64, 32), (256, 64, 0), (256, 32, 0), (256, 16, 0), (128, 256, 0),
        (128, 128, 0),
    )  # fmt: skip


def _staged(
    c: Config, values: int, resident: int = 0, least: int = 3, most: int = 6
) -> Config | None:
    """With as many stages of so many values as fit beside what stays; None below `least`."""
    stages = min(most, (ROOM - slices_bytes(c) - 2 * resident) // (2 * values))
    return replace(c, num_stages=stages) if stages >= least else None


class GluonResident(Specialised, Rows):
    """All filters stay in shared memory; a step is one row of taps."""

    name = "gluon_resident"
    ops = ("conv2d",)

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        if why := super().accepts(eqn, layouts, dtype, arch):
            return why
        g = of_problem(problem_of(anchors_of(eqn)))
        if not g.span:
            return "groups or a dilation keep the taps of a row apart"
        if g.run > 2 * DEEPEST:
            return f"a row of taps is {g.run} values, more than {2 * DEEPEST}"
        if next(_resident(g), None) is None:
            size = 2 * g.R * g.K * g.run // 1024
            return f"{size} KiB of filters leave no room for images in shared memory"
        return None

    def configs(self, problem: Problem) -> Iterator[Config]:
        yield from _resident(of_problem(problem))

    def cut(self, config: Config, problem: Problem) -> Config:
        return self.rule(problem)  # the problem leaves no choice of a tile

    def launch(self, work: Work, config: Config) -> list[Launch]:
        c, g = config, of_work(work, 1)
        x, w = (work.ref(v) for v in work.anchor.inputs[:2])
        rest = _rest(g.run, c.BK)
        operands = (
            _images(x, g, c, c.BK), _images(x, g, c, rest) if rest else None,
            _filters(w, g, c.BN, c.BK), _filters(w, g, c.BT, c.BK),
            _filters(w, g, c.BN, rest), _filters(w, g, c.BT, rest),
        )  # fmt: skip
        names = ("N", "C", "K", "OH", "OW", "R", "SH", "SW", "OFFH", "OFFW", "STEPH")
        constants = {k: getattr(g, k) for k in names} | {"REST": rest}
        depth = g.OH * g.OW * g.R * (c.BK + rest)
        return [_launch("conv2d_resident", work, g, c, operands, constants, depth)]


def _rest(run: int, depth: int) -> int:
    """Values of a second box, behind `depth` of a run."""
    return max(16, next_power(run - depth)) if run > depth else 0


def _resident(g: Geometry) -> Iterator[Config]:
    """The tile whose columns hold all filters, with the stages that fit, and with one less."""
    widths = ((16, 0), (32, 0), (32, 16), (64, 0), (64, 32), (128, 0), (128, 64), (256, 0))
    bn, bt = next((w for w in widths if sum(w) >= g.K), (0, 0))
    depth = max(16, min(DEEPEST, 1 << g.run.bit_length() - 1))
    run = depth + _rest(g.run, depth)
    c = Config(2 * HALF, bn, depth, BT=bt)
    found = _staged(c, c.BM * run, g.R * (bn + bt) * run, 2, 4) if bn else None
    if found is not None:
        yield found
        if found.num_stages > 2:
            yield replace(found, num_stages=found.num_stages - 1)
