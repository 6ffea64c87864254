"""Convolution forward and input gradient from boxes of images: kernels/conv_rows.py.

`rows` makes one pixel of a tile's images, `pairs` two neighbours that share each tile of filters.
An image in space-to-depth layout, and the weight beside it, is a convolution of stride 1 over
blocks of pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import HWCN, Layout
from graphnet.lowering.launch.codegen import Index, Ref
from graphnet.lowering.launch.config import (
    ITEMSIZE,
    PROCESSORS,
    SHARED_BYTES,
    Config,
    cdiv,
    distinct,
    next_power,
    tile,
)
from graphnet.lowering.launch.conv import (
    ROWS,
    RUN,
    badly_filled,
    in_blocks,
    named,
    not_by_tap,
    not_in_blocks,
    outputs,
)
from graphnet.lowering.launch.moments import moments
from graphnet.lowering.launch.steps import Box, Launch, Table, arguments, make, source
from graphnet.lowering.launch.variants import Problem, Variant, no_descriptors
from graphnet.lowering.launch.work import Work
from graphnet.passes.templates import anchors_of

DEPTH = {"bf16": 64, "tf32": 32}  # of a block: 128 bytes, the widest swizzle
ROOM = SHARED_BYTES - 1024  # beside the barriers
MOST = 128  # accumulators a thread
# How many of them go out at once, 0 for all: fp32 results spill above 64 (Triton 3.6 and 3.7).
OUT = {"bf16": 0, "tf32": 32, "ieee": 0}
OUT_BESIDE_TWO = 32  # where the code behind reads two tensors like the result: a sum and a mask


@dataclass(frozen=True)
class Geometry:
    """A convolution as the kernel sees it: C summed and K result channels of each of G groups.

    Tap (r, s) of result pixel (oh, ow) is pixel (oh SH + OFFH + r STEPH, ow SW + OFFW + s STEPW).
    A program makes PIXELS neighbours.
    FILTERS  how they lie: "forward", a row of taps as one run or tap by tap; for the gradient
             "gradient", as stored; "turned", the summed channels innermost, which TF32 needs
    """

    N: int
    C: int
    H: int
    W: int
    K: int
    OH: int
    OW: int
    R: int
    S: int
    SH: int
    SW: int
    OFFH: int
    OFFW: int
    STEPH: int
    STEPW: int
    G: int
    FILTERS: str
    PIXELS: int

    @property
    def span(self) -> bool:
        """Whether a row of taps is one run of values in the image and in the filters."""
        return self.FILTERS == "forward" and self.G == self.STEPW == self.PIXELS == 1

    @property
    def run(self) -> int:
        """The longest run of values that are summed up."""
        return self.S * self.C if self.span else self.C

    def constants(self) -> dict[str, Any]:
        """All of it by name, with SPAN."""
        return {**vars(self), "SPAN": self.span}

    def taps(self) -> tuple[list[int], list[int]]:
        """Taps that meet the image: down, of each row of pixels; across, of each group of
        neighbours."""
        heights, widths = range(self.H), range(1 - self.PIXELS, self.W)
        down = [
            sum(o * self.SH + self.OFFH + r * self.STEPH in heights for r in range(self.R))
            for o in range(self.OH)
        ]
        across = [
            sum(o * self.SW + self.OFFW + s * self.STEPW in widths for s in range(self.S))
            for o in range(0, self.OW, self.PIXELS)
        ]
        return down, across

    def depth(self, block: int) -> int:
        """Summed values of all pixels of an image, in whole blocks."""
        down, across = self.taps()
        runs = [a * self.C for a in across] if self.span else [self.C] * sum(across)
        return sum(down) * sum(cdiv(run, block) * block for run in runs)


def of_problem(p: Problem, pixels: int = 1) -> Geometry:
    """The geometry by shape alone."""
    z = p.sizes
    n, c, h, w, k, r, s, g = (z[a] for a in "NCHWKRSG")
    oh, ow = outputs(z)
    if p.op == "conv2d_dgrad":
        return Geometry(
            n, k // g, oh, ow, c // g, h, w, r, s, 1, 1, z["PT"], z["PL"], -z["DH"], -z["DW"], g,
            "turned" if p.dtype == "tf32" else "gradient", pixels,
        )  # fmt: skip
    b = z["SH"]
    if in_blocks(p):
        h, w, r, s = (cdiv(size, b) for size in (h, w, r, s))
        return Geometry(n, c * b * b, h, w, k, oh, ow, r, s, 1, 1, 0, 0, 1, 1, 1, "forward", pixels)
    return Geometry(
        n, c // g, h, w, k // g, oh, ow, r, s, b, z["SW"], -z["PT"], -z["PL"], z["DH"], z["DW"], g,
        "forward", pixels,
    )  # fmt: skip


def of_work(work: Work, pixels: int) -> Geometry:
    """The geometry of an equation, by what its image and filters store."""
    e, a = work.anchor, work.anchor.attrs
    image, filters = (work.type(v) for v in e.inputs[:2])
    n, c, h, w = image.shape
    o, i, r, s = filters.shape
    _, _, oh, ow = e.out.type.shape
    g, (dh, dw), (sh, sw) = a.groups, a.dilation, a.stride  # type: ignore[attr-defined]
    top, _, left, _ = a.padding  # type: ignore[attr-defined]
    if e.op == "conv2d_dgrad":
        lie = "turned" if filters.layout.order == "hwcn" else "gradient"
        return Geometry(
            n, o // g, h, w, i, oh, ow, r, s, 1, 1, top, left, -dh, -dw, g, lie, pixels
        )
    if image.layout.s2d:
        _, h, w, c = image.layout.stored(image.shape)
        _, r, s, _ = filters.layout.stored(filters.shape)
        return Geometry(n, c, h, w, o, oh, ow, r, s, 1, 1, 0, 0, 1, 1, 1, "forward", pixels)
    return Geometry(
        n, i, h, w, o // g, oh, ow, r, s, sh, sw, -top, -left, dh, dw, g, "forward", pixels
    )


@cache
def order(g: Geometry) -> Table | None:
    """The pixels with the most taps first; None where all have as many."""
    down, across = g.taps()
    taps = [d * a for d in down for a in across]
    if len(set(taps)) == 1:
        return None
    return Table(tuple(sorted(range(len(taps)), key=lambda p: -taps[p])))


# ---- the variants ----------------------------------------------------------------------------


class _Images(Variant):
    """What both variants share. pixels: neighbours that a program makes."""

    ops: tuple[str, ...] = ("conv2d", "conv2d_dgrad")
    moments = True
    pixels: int

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        why = no_descriptors(arch) or not_by_tap(eqn, layouts) or not_in_blocks(eqn, layouts)
        if why:
            return why
        (e,) = anchors_of(eqn)
        w = e.inputs[1]
        if layouts[w].s2d:
            return None
        turned = e.op == "conv2d_dgrad" and dtype == "tf32"
        if layouts[w].order != ("hwcn" if turned else "nhwc"):
            return f"the filters lie {named(layouts[w])}"
        if w.type.shape[1] % RUN:
            return f"the channels of a filter ({w.type.shape[1]}) are no multiple of {RUN}"
        return None

    def wants(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str
    ) -> Mapping[Value, Layout]:
        """TF32 products take the summed axis innermost: for the gradient the filters' results."""
        (e,) = anchors_of(eqn)
        return {e.inputs[1]: HWCN} if e.op == "conv2d_dgrad" and dtype == "tf32" else {}

    def writes(self, eqn: Eqn, layout: Layout) -> bool:
        """A tile is one pixel of many images: whole runs of them."""
        return layout == HWCN and self.pixels == 1

    def cut(self, config: Config, problem: Problem) -> Config:
        g = of_problem(problem, self.pixels)
        return replace(
            config, BM=tile(g.N * self.pixels, config.BM), BN=tile(g.K, config.BN),
            BK=tile(g.run, config.BK), BT=config.BT if g.K > config.BN else 0,
        )  # fmt: skip

    def launch(self, work: Work, config: Config) -> list[Launch]:
        e, c, g = work.anchor, config, of_work(work, self.pixels)
        x, w = (work.ref(v) for v in e.inputs[:2])
        across = cdiv(g.OW, g.PIXELS)
        keep = moments(work, cdiv(g.N, c.BM // g.PIXELS) * g.OH * across)
        shape = e.out.type.shape
        epi = work.epilogue(e.out, Index(shape), bias=work.bias, returns=keep.value)
        operands = (
            _image(x, g, c), filters_box(w, g, c.BN, c.BK),
            filters_box(w, g, c.BT, c.BK) if c.BT else None, order(g) if c.LPT else None,
        )  # fmt: skip
        constants = {
            **g.constants(), "BM": c.BM, "BN": c.BN, "BT": c.BT, "BK": c.BK,
            **keep.at_once(c.num_warps, at_once(work.problem.dtype, work.held)),
            "PRECISION": work.problem.dtype, **keep.constants, "EPILOGUE": source(epi),
        }  # fmt: skip
        tiles = cdiv(g.K, c.BN + c.BT) * cdiv(g.N, c.BM // g.PIXELS)
        return [
            make(
                "conv2d_rows", "conv_rows", (*operands, keep.args, arguments(epi)), constants,
                (tiles * g.OH * across, g.G), reads=(x.name, w.name, *keep.reads), **keep.rest,
                epilogues=(epi,), num_warps=c.num_warps, num_stages=c.num_stages,
                padded=2 * tiles * g.G * c.BM * (c.BN + c.BT) * g.depth(c.BK),
            )
        ]  # fmt: skip


def _image(x: Ref, g: Geometry, c: Config) -> Box:
    """Boxes of images by values of a row, or of pairs of pixels by images by channels."""
    row = g.W * g.G * g.C
    if g.PIXELS == 1:
        return Box(x, (g.H, g.N, row), (1, c.BM, c.BK), (row, g.H * row, 1))
    block = (1, g.PIXELS, c.BM // g.PIXELS, c.BK)
    return Box(x, (g.H, g.W, g.N, g.C), block, (row, g.C, g.H * row, 1))


def filters_box(w: Ref, g: Geometry, width: int, depth: int) -> Box:
    """Boxes of filters by values of a run, or of a tap by its channels."""
    if g.FILTERS == "forward":
        rows = g.R if g.span else g.R * g.S
        size = (rows, g.G * g.K, g.run)
        return Box(w, size, (1, width, depth), (g.run, rows * g.run, 1))
    if g.FILTERS == "turned":
        summed = g.G * g.C
        strides = (g.K * summed, g.C, summed, 1)
        return Box(w, (g.R * g.S, g.G, g.K, g.C), (1, 1, width, depth), strides)
    filter = g.R * g.S * g.K
    return Box(w, (g.G, g.C, filter), (1, depth, width), (g.C * filter, filter, 1))


class Rows(_Images):
    """One pixel of BM images."""

    name = "rows"
    pixels = 1

    def suits(self, problem: Problem) -> str | None:
        return badly_filled(problem, of_problem(problem).K)

    def configs(self, problem: Problem) -> Iterator[Config]:
        g, dtype = of_problem(problem), problem.dtype
        if dtype == "ieee":
            yield from _fma(g)
            return
        heights = [bm for bm in (128, ROWS) if bm <= max(ROWS, next_power(g.N))]
        tiles = [_tile(g, bm, *width, dtype) for bm in heights for width in _columns(g.K)]
        held = [c for c in tiles if c.accumulators <= MOST]
        first, *others = sorted(held, key=lambda c: cost_of(g, c))
        yield from distinct(
            [first, *_changed(g, first, dtype), *others[:3], *(c for c in held if c.BN == 256)]
        )  # fmt: skip


class Pairs(_Images):
    """Two neighbouring pixels of BM / 2 images share a tile of filters."""

    name = "pairs"
    pixels = 2

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        if why := super().accepts(eqn, layouts, dtype, arch):
            return why
        (e,) = anchors_of(eqn)
        a: Any = e.attrs
        if a.groups > 1:
            return "boxes of pairs hold the channels of one group"
        if a.stride != (1, 1) and not layouts[e.inputs[0]].s2d:
            return "neighbours of a strided convolution do not share taps"
        return None

    def suits(self, problem: Problem) -> str | None:
        g = of_problem(problem)
        if problem.dtype != "bf16" or g.FILTERS == "forward":
            return "pairs were measured for input gradients in bf16 alone"
        if not 64 < g.K <= 128:
            return f"{g.K} columns: pairs pay where one tile of 128 holds them and half does not"
        if 16 * (g.OW % 2) > g.OW:
            return f"the last pair of each row of {g.OW} pixels would be half empty"
        return badly_filled(problem, g.K, 128)

    def configs(self, problem: Problem) -> Iterator[Config]:
        g, dtype = of_problem(problem, 2), problem.dtype
        if dtype == "ieee":
            yield from _fma(g)
            return
        bm = 256 if g.N > ROWS else 128
        tiles = [Config(bm, bn, BT=bt) for bn, bt in ((128, 0), (64, 32), (64, 0))]
        tiles = [replace(c, BK=_depth(g, dtype), num_warps=8, num_stages=4) for c in tiles]
        first, *others = [c for c in tiles if c.accumulators <= MOST]
        yield from distinct([first, *_changed(g, first, dtype), *others])


def _changed(g: Geometry, c: Config, dtype: str) -> Iterator[Config]:
    """The pixels in the order of storage; a stage more or less; twice as many blocks of half the
    depth; twice as many warps."""
    more = [replace(c, LPT=0)] if order(g) else []
    more += [replace(c, num_stages=c.num_stages + step) for step in (-1, 1)]
    if c.BK >= 32:
        more.append(replace(c, BK=c.BK // 2, num_stages=2 * c.num_stages - 1))
    more.append(replace(c, num_warps=8, num_stages=4))
    yield from (c for c in more if c.shared_bytes(ITEMSIZE[dtype]) <= ROOM)


def _columns(k: int) -> list[tuple[int, int]]:
    """(BN, BT) worth a look for k columns."""
    tiles = [(16, 0), (32, 0), (32, 16), (64, 0), (64, 32), (128, 0), (256, 0)]
    return [tile for tile in tiles if sum(tile) <= max(16, next_power(k))]


def _tile(g: Geometry, bm: int, bn: int, bt: int, dtype: str) -> Config:
    """Four warps where they can hold the accumulators: two programs share a processor."""
    warps = 4 if bm * (bn + bt) <= 128 * MOST else 8
    stages = 3 if warps == 4 else 4
    return Config(bm, bn, _depth(g, dtype), BT=bt, num_warps=warps, num_stages=stages)


def _depth(g: Geometry, dtype: str) -> int:
    """Zeros at the end of a run cost their share, blocks of half the depth a quarter (measured:
    1.36 times of AlexNet's first layer, 1.2 of its second)."""
    most = min(DEPTH[dtype], max(16, next_power(g.run)))

    def cost(bk: int) -> float:
        return cdiv(g.run, bk) * bk * (1.0 if bk == most else 1.25)

    return min((bk for bk in (most, most // 2) if bk >= 16), key=cost)


def at_once(dtype: str, held: int) -> int:
    """How many accumulators of a thread go out at once beside `held` operands of the epilogue."""
    most = OUT[dtype]
    return OUT_BESIDE_TWO if held > 1 and dtype == "bf16" else most


def cost_of(g: Geometry, c: Config) -> float:
    """Work of the busiest processor. Thin tiles read their operands more often."""
    width = c.BN + c.BT
    programs = cdiv(g.K, width) * g.OH * g.OW * cdiv(g.N, c.BM) * g.G
    thin = (1 + 24 / width) * (1 + 24 / c.BM)
    return cdiv(programs, PROCESSORS) * c.BM * width * thin


def _fma(g: Geometry) -> Iterator[Config]:
    """fp32: what fits registers without a spill."""
    width = min(64, max(16, next_power(g.K)))
    yield Config(64, width, 16, num_stages=2)
    yield Config(32, width, 16, num_stages=2)
