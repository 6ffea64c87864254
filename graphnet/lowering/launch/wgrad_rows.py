"""The weight gradient of convolutions by filter rows: kernels/wgrad_rows.py and its second pass.

The host decides here which program sums what: every tile is cut into segments in proportion to its
work, so that all programs finish together, and the table of segments is a constant of the plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import Layout
from graphnet.lowering.launch.codegen import Index, Ref
from graphnet.lowering.launch.config import PROCESSORS, Config, cdiv, next_power
from graphnet.lowering.launch.conv import in_blocks, named, not_in_blocks, outputs
from graphnet.lowering.launch.products import channel_sum
from graphnet.lowering.launch.steps import Box, Launch, Table, arguments, make, source
from graphnet.lowering.launch.variants import Problem, Variant, no_descriptors
from graphnet.lowering.launch.work import Work
from graphnet.passes.templates import anchors_of

LEAST_STEPS = 4  # of a segment: fewer do not fill the pipeline
MOST_WASTE = 2.0  # products of all tiles over those that count
STEP = {"bf16": 64, "tf32": 32}  # images of one: 128 bytes
UNROLL = 12  # segments that the second pass has on their way at once


@dataclass(frozen=True)
class Rows:
    """A weight gradient as products of dy's channels with columns that lie side by side in x.

    A group has k channels of dy and c of the xc of a stored pixel. units are the filter rows,
    `cols` columns each, or the taps of `across` to a row where those are apart. The rest as in the
    kernel; (cg, fr, fs) is the filter and block its space-to-depth, 1 for none.
    """

    n: int
    k: int
    c: int
    xc: int
    h: int
    w: int
    oh: int
    ow: int
    rows: int
    across: int
    cols: int
    sh: int
    sw: int
    pt: int
    pl: int
    dh: int
    dw: int
    g: int
    cg: int
    fr: int
    fs: int
    block: int

    @property
    def units(self) -> int:
        return self.rows * self.across

    def reach(self, unit: int) -> tuple[int, int]:
        """(first, number) of the result's rows whose pixel lies in the image."""
        offset = unit // self.across * self.dh - self.pt
        inside = [o for o in range(self.oh) if 0 <= o * self.sh + offset < self.h]
        return (inside[0], len(inside)) if inside else (0, 0)

    @property
    def carrier(self) -> int:
        """The unit whose tiles also sum dy: for that they visit all rows, so the one that misses
        the fewest."""
        return max(range(self.units), key=lambda u: (self.reach(u)[1], -u))


def rows_of(z: Mapping[str, int], block: int) -> Rows:
    """z  sizes by name, as `Problem.sizes`; block: of the image's space-to-depth, 0 for none."""
    oh, ow = outputs(z)
    c, g, k = z["C"] // z["G"], z["G"], z["K"] // z["G"]
    fixed = {"n": z["N"], "k": k, "oh": oh, "ow": ow, "g": g, "cg": c, "fr": z["R"], "fs": z["S"]}
    if block:
        xc = c * block * block
        return Rows(
            c=xc, xc=xc, h=cdiv(z["H"], block), w=cdiv(z["W"], block), rows=cdiv(z["R"], block),
            across=1, cols=cdiv(z["S"], block) * xc, sh=1, sw=1, pt=0, pl=0, dh=1, dw=1,
            block=block, **fixed,
        )  # fmt: skip
    together = g == 1 and z["DW"] == 1
    return Rows(
        c=c, xc=z["C"], h=z["H"], w=z["W"], rows=z["R"], across=1 if together else z["S"],
        cols=z["S"] * c if together else c, sh=z["SH"], sw=z["SW"], pt=z["PT"], pl=z["PL"],
        dh=z["DH"], dw=z["DW"], block=1, **fixed,
    )  # fmt: skip


# ---- who sums what ---------------------------------------------------------------------------


def tile_size(c: Config) -> tuple[int, int]:
    """(channels of dy, columns) of a tile."""
    return (c.BN + c.BT, c.BM) if c.SWAP else (c.BM, c.BN + c.BT)


@dataclass(frozen=True)
class Cut:
    """The segments of all tiles.

    table  (slot, tile, first step, steps) of each program
    first  slot of each tile's first segment, and their number at the end
    """

    table: tuple[tuple[int, int, int, int], ...]
    first: tuple[int, ...]

    @property
    def segments(self) -> int:
        return len(self.table)

    @property
    def most(self) -> int:
        """The segments of one tile, at the most."""
        return max(b - a for a, b in zip(self.first, self.first[1:], strict=False))


def cut(r: Rows, c: Config, carry: bool) -> Cut:
    """Tiles in parts, as nearly in proportion to their work as whole parts allow.

    carry  the carrier's first column tiles visit all pixels, because they also sum dy
    """
    kt, xt = tile_size(c)
    blocks = cdiv(r.n, c.BK)
    work: list[tuple[int, int, float]] = []  # first step, steps and what they take
    for unit in [*range(r.units)] * r.g:
        a, count = r.reach(unit)
        for part in range(cdiv(r.cols, xt)):
            carries = carry and unit == r.carrier and part == 0
            row, high = (0, r.oh) if carries else (a, count)
            steps = high * r.ow * blocks
            takes = steps * (_cycles(c) + _sum_cycles(c) * carries)
            work += [(row * r.ow * blocks, steps, takes)] * cdiv(r.k, kt)
    parts = _parts([(steps, takes) for _, steps, takes in work], c.PROGRAMS)
    table, first = [], [0]
    for tile, ((start, steps, _), count) in enumerate(zip(work, parts, strict=True)):
        for p in range(count):
            a, b = steps * p // count, steps * (p + 1) // count
            table.append((p / count, (first[-1] + p, tile, start + a, b - a)))
        first.append(first[-1] + count)
    if len(table) > c.PROGRAMS:  # in waves: the longest first
        table.sort(key=lambda row: -row[1][3])
    else:  # programs that run side by side read the same pixels
        table.sort()
    return Cut(tuple(row for _, row in table), tuple(first))


def _parts(work: list[tuple[int, float]], programs: int) -> list[int]:
    """Parts of each tile; in all a multiple of `programs` where there is work enough."""
    parts = [1] * len(work)
    queue = [(-takes, i) for i, (_, takes) in enumerate(work)]
    heapq.heapify(queue)
    free = cdiv(len(work), programs) * programs - len(work)
    while free and queue:
        _, i = heapq.heappop(queue)
        steps, takes = work[i]
        if steps >= LEAST_STEPS * (parts[i] + 1):
            parts[i] += 1
            free -= 1
            heapq.heappush(queue, (-takes / parts[i], i))
    return parts


# ---- configurations --------------------------------------------------------------------------


def _form(
    rows: str, bm: int, bn: int, bt: int, stages: int, warps: int = 8, each: int = 1,
    bk: int = STEP["bf16"],
) -> Config:
    """rows  "d" for dy's channels, "x" for columns; each: programs on one processor"""
    return Config(
        bm, bn, bk, BT=bt, num_stages=stages, num_warps=warps, SWAP=int(rows == "x"),
        PROGRAMS=each * PROCESSORS,
    )  # fmt: skip


# Measured on an H100, for one layer of AlexNet or another.
_BF16 = (
    _form("x", 128, 256, 0, 4), _form("x", 128, 256, 128, 3), _form("d", 128, 256, 0, 4),
    _form("d", 256, 128, 0, 4), _form("d", 256, 128, 64, 3), _form("x", 256, 128, 64, 3),
    _form("d", 128, 128, 0, 3, 4, 2), _form("d", 128, 128, 64, 4), _form("d", 128, 128, 32, 4),
    _form("d", 128, 128, 16, 4), _form("d", 256, 64, 32, 4),
)  # fmt: skip
# Not measured: others of the kind, and some for few channels.
_NEW = (
    _form("d", 128, 256, 128, 3), _form("d", 128, 256, 64, 3), _form("x", 128, 256, 64, 3),
    _form("x", 128, 128, 64, 4), _form("x", 128, 128, 0, 3, 4, 2),
)  # fmt: skip
_SMALL = (
    _form("d", 128, 64, 0, 4, 4, 2), _form("x", 128, 64, 0, 4, 4, 2),
    _form("d", 64, 64, 0, 4, 4, 2), _form("d", 64, 128, 0, 4, 4, 2),
    _form("d", 64, 64, 32, 4, 4, 2),
)  # fmt: skip
_BY_SIZE = (_BF16, _NEW), _SMALL
FEW = 64  # channels or columns that ask for a small tile

_TF32 = tuple(
    _form(*form, bk=STEP["tf32"])
    for form in (
        # Measured on an H100, for one layer of AlexNet or another.
        ("x", 128, 256, 0, 4), ("x", 256, 128, 64, 4), ("d", 256, 128, 64, 4),
        ("d", 256, 128, 32, 4), ("x", 128, 256, 128, 3), ("d", 128, 128, 64, 4),
        ("d", 128, 128, 16, 4),
        # Not measured.
        ("d", 128, 256, 0, 4), ("d", 128, 128, 0, 4), ("x", 128, 128, 0, 4), ("d", 256, 64, 0, 4),
    )
)  # fmt: skip
_TF32_SMALL = (
    _form("d", 64, 64, 0, 4, 4, 2, 32), _form("d", 64, 32, 0, 4, 4, 2, 32),
    _form("x", 64, 32, 0, 4, 4, 2, 32),
)  # fmt: skip
_IEEE = (_form("d", 64, 32, 0, 2, 4, 2, 16), _form("d", 32, 32, 0, 2, 4, 2, 16))


def _cycles(c: Config) -> float:
    """Clock cycles of one step of a program that has a processor for itself, fitted to what an
    H100 took (28 of 31 times within 11 %): products, at least the boxes' way from L2."""
    second = max(c.BT, 96) if c.BT else 0  # narrow products take as long
    products = 1.1 * c.BM * (max(c.BN, 64) + second) * c.BK / 2048
    products += (80 if c.BT else 0) + (60 if c.BM > 128 else 0)
    return max(products, 2 * (c.BM + c.BN + c.BT) * c.BK / 50)


def _sum_cycles(c: Config) -> float:
    """What a step takes more that also sums dy: shared memory gives 128 bytes of it a cycle."""
    return tile_size(c)[0] * c.BK / 64


def predicted(r: Rows, c: Config) -> float:
    """Clock cycles of both passes on an H100: the longest segment, the partial tiles' way."""
    plan = cut(r, c, False)
    tile = 4 * c.BM * (c.BN + c.BT)
    longest = max(row[3] for row in plan.table)
    each = cdiv(c.PROGRAMS, PROCESSORS) * cdiv(plan.segments, c.PROGRAMS)
    return each * (3000 + tile / 20 + longest * _cycles(c)) + plan.segments * tile / 6000


def _waste(r: Rows, c: Config) -> float:
    """Products of all tiles over those that count."""
    kt, xt = tile_size(c)
    return cdiv(r.k, kt) * kt * cdiv(r.cols, xt) * xt / (r.k * r.cols)


def by_time(problem: Problem, forms: Iterable[Config]) -> list[Config]:
    """By predicted time."""
    r = _rows(problem)
    return sorted(forms, key=lambda c: (predicted(r, c), _waste(r, c)))


# ---- the variant -----------------------------------------------------------------------------


def _rows(p: Problem) -> Rows:
    """The problem with its image in the layout that the layout pass gives it."""
    return rows_of(p.sizes, p.sizes["SH"] if in_blocks(p) else 0)


class WgradRows(Variant):
    """Filter rows as runs of columns, balanced segments, an ordered second pass that updates."""

    name = "rows"
    ops = ("conv2d_wgrad",)

    def wants(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str
    ) -> Mapping[Value, Layout]:
        """TF32 products take the summed axis innermost, which are the images."""
        (anchor,) = anchors_of(eqn)
        if dtype != "tf32":
            return {}
        return {v: replace(layouts[v], order="hwcn") for v in anchor.inputs[:2]}

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        if why := no_descriptors(arch):
            return why
        (anchor,) = anchors_of(eqn)
        for v, what in zip(anchor.inputs, ("image", "gradient"), strict=True):
            layout = layouts[v]
            groups = anchor.attrs.groups  # type: ignore[attr-defined]
            if dtype == "tf32":
                images = v.type.shape[0]
                if layout.order != "hwcn":
                    return f"the {what} does not lie with its images innermost"
                if images * v.type.dtype.itemsize % 16:
                    return f"{images} images of the {what} are no multiple of 16 bytes"
                continue
            channels = v.type.shape[1] * max(layout.s2d, 1) ** 2 // groups
            if not layout.s2d and layout.order != "nhwc":
                return f"the {what} lies {named(layout)}"
            if channels * v.type.dtype.itemsize % 16:
                return f"{channels} channels of the {what} are no multiple of 16 bytes"
        return not_in_blocks(eqn, layouts)

    def suits(self, problem: Problem) -> str | None:
        if problem.dtype == "ieee":
            return "operands of products on FMAs are turned in registers, which is not measured"
        count = problem.sizes["N"]
        empty = -count % STEP[problem.dtype]
        if 8 * empty > count:
            return f"{empty} of {count + empty} images of a step would be empty"
        waste = _waste(_rows(problem), self.rule(problem))
        return f"tiles multiply {waste:.1f} times what counts" if waste > MOST_WASTE else None

    def configs(self, problem: Problem) -> Iterator[Config]:
        """By predicted time; forms that nobody has measured come behind the others."""
        r = _rows(problem)
        if problem.dtype == "ieee":
            yield from _IEEE
            return
        few = min(r.k, r.cols) <= FEW
        large, small = ((_TF32,), _TF32_SMALL) if problem.dtype == "tf32" else _BY_SIZE
        for forms in (small, *large) if few else (*large, small):
            yield from by_time(problem, forms)

    def launch(self, work: Work, config: Config) -> list[Launch]:
        e, c = work.anchor, config
        x, dy = (work.ref(v) for v in e.inputs)
        dw, db = e.outputs
        epi = work.epilogue(dw, Index(dw.type.shape)) if dw is not None else None
        epi2 = work.epilogue(db, Index(db.type.shape)) if db is not None else None
        if epi is None:  # the weight is frozen, its bias is not
            return [channel_sum(work, dy)]
        r = rows_of(work.problem.sizes, work.type(e.inputs[0]).layout.s2d)
        plan = cut(r, c, epi2 is not None)
        kt, xt = tile_size(c)
        carrier = r.carrier if epi2 is not None else -1
        turned = work.type(e.inputs[0]).layout.order == "hwcn"
        parts = Ref(f".parts{work.eqn.results[0]}", "f32")
        constants: dict[str, Any] = {
            "N": r.n, "C": r.c, "XC": r.xc, "K": r.k, "OW": r.ow, "R": r.rows, "S": r.across,
            "COLS": r.cols, "SH": r.sh, "SW": r.sw, "PT": r.pt, "PL": r.pl, "DH": r.dh,
            "DW": r.dw, "G": r.g, "BM": c.BM, "BN": c.BN, "BT": c.BT, "BK": c.BK,
            "SWAP": bool(c.SWAP), "SEGMENTS": plan.segments, "CARRIER": carrier,
            "TURNED": turned, "PRECISION": work.problem.dtype,
        }  # fmt: skip
        table = Table(tuple(v for row in plan.table for v in row))
        first_pass = make(
            "conv2d_wgrad_rows", "wgrad_rows", (*_boxes(r, c, x, dy, turned), parts, table),
            constants, (plan.segments,), reads=(x.name, dy.name), writes=(parts.name,),
            scratch=((parts.name, 4 * plan.segments * kt * (xt + 1)),), num_warps=c.num_warps,
            num_stages=c.num_stages,
            padded=2 * c.BM * (c.BN + c.BT) * c.BK * sum(row[3] for row in plan.table),
        )  # fmt: skip
        return [first_pass, self._second(r, plan, c, carrier, parts, epi, epi2)]

    def _second(
        self, r: Rows, plan: Cut, c: Config, carrier: int, parts: Ref, epi: Any, epi2: Any
    ) -> Launch:
        kt, xt = tile_size(c)
        tiles = len(plan.first) - 1
        # 8 elements a thread, or 4 where programs are few.
        wide = tiles * kt * xt >= 2 * PROCESSORS * 1024
        block = next(b for b in (1024, 512, 256)[not wide :] if kt * xt % b == 0)
        rounds = cdiv(plan.most, UNROLL)
        sums = r.g * cdiv(r.k, kt) if carrier >= 0 else 0
        constants: dict[str, Any] = {
            "K": r.k, "G": r.g, "UNITS": r.units, "COLS": r.cols, "CG": r.cg, "R": r.fr, "S": r.fs,
            "B": r.block, "KT": kt, "XT": xt, "SEGMENTS": plan.segments, "CARRIER": carrier,
            "MOST": plan.most, "UNROLL": cdiv(plan.most, rounds), "BLOCK": block,
            "BIAS_BLOCK": next_power(kt), "EPILOGUE": source(epi), "EPILOGUE2": source(epi2),
        }  # fmt: skip
        return make(
            "segment_reduce", "reduce",
            (parts, Table(plan.first), arguments(epi), arguments(epi2)), constants,
            (tiles * (kt * xt // block) + sums,), reads=(parts.name,),
            epilogues=(epi, epi2),
        )  # fmt: skip


def _boxes(r: Rows, c: Config, x: Ref, dy: Ref, turned: bool) -> tuple[Box | None, ...]:
    """Boxes of BK images: of x, of its second accumulator, of dy, of its second accumulator.

    turned  the images are innermost
    """
    row, pixels = r.w * r.xc, r.oh * r.ow * r.g * r.k

    def image(width: int) -> Box | None:
        if not width:
            return None
        if turned:
            return Box(x, (r.h, row, r.n), (1, width, c.BK))
        return Box(x, (r.h, r.n, row), (1, c.BK, width), (row, r.h * row, 1))

    def gradient(width: int) -> Box | None:
        if not width:
            return None
        if turned:
            return Box(dy, (pixels, r.n), (width, c.BK))
        return Box(dy, (r.n, pixels), (c.BK, width))

    if c.SWAP:
        return image(c.BM), None, gradient(c.BN), gradient(c.BT)
    return image(c.BN), image(c.BT), gradient(c.BM), None
