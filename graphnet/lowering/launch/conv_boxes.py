"""Convolutions tap by tap whose operands are boxes (kernels/conv_tma.py): the rows of a tile are
images at one pixel, and the copy engine fetches them by tensor descriptors.

Boxes leave out the taps beyond the border, where masked copies multiply zeros, and take fewer
registers. They serve any stride, dilation and number of groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import Layout, TensorType
from graphnet.lowering.launch.config import Config, cdiv, next_power
from graphnet.lowering.launch.conv import images, matrix, not_by_tap
from graphnet.lowering.launch.conv_taps import Taps, TapsWgrad, walk, wgrad_walk
from graphnet.lowering.launch.products import blocks, product, weight_gradient
from graphnet.lowering.launch.steps import Arg, Box, Launch, source
from graphnet.lowering.launch.variants import Problem
from graphnet.lowering.launch.work import Work
from graphnet.passes.templates import anchors_of

LEAST_BLOCK = 16  # of a reduction: the least that `tl.dot` takes
ROWS = 64  # of a tile on wgmma; here they are images
FEW_COLUMNS = 32


def not_boxed(eqn: Eqn, layouts: Mapping[Value, Layout], arch: int, summed: bool) -> str | None:
    """Why no boxes of images can be fetched; None where they can.

    summed  the reduction runs over the channels, so that its blocks must divide them
    """
    if arch < 90:
        return f"sm_{arch} has no tensor descriptors"
    if why := not_by_tap(eqn, layouts):
        return why
    (e,) = anchors_of(eqn)
    for v in images(eqn):
        channels = v.type.shape[1] // e.attrs.groups  # type: ignore[attr-defined]
        if block := layouts[v].s2d:
            return f"the image lies in blocks of {block} x {block} pixels"
        if summed and channels % LEAST_BLOCK:
            return f"the channels of a group ({channels}) are no multiple of {LEAST_BLOCK}"
    return None


def badly_filled(p: Problem, columns: int) -> str | None:
    """Why tiles of images suit a problem badly: few images, or few columns of the result. None
    where they do not."""
    count = p.sizes["N"]
    empty = -count % ROWS
    if 8 * empty > count:
        return f"{empty} of {count + empty} rows would be empty"
    return f"it has {columns} columns, which are few" if columns < FEW_COLUMNS else None


class Boxes(Taps):
    """Forward and input gradient."""

    name = "boxes"

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        return not_boxed(eqn, layouts, arch, summed=True)

    def suits(self, problem: Problem) -> str | None:
        return badly_filled(problem, self.size(problem)[1])

    def by_rule(self, p: Problem, m: int, n: int, k: int, groups: int) -> Config:
        return self._over_images(super().by_rule(p, m, n, k, groups), p)

    def cut(self, config: Config, problem: Problem) -> Config:
        return self._over_images(super().cut(config, problem), problem)

    def _over_images(self, c: Config, p: Problem) -> Config:
        """The tile with images as rows, and a depth that divides the channels."""
        k = self.size(p)[2]
        # An ieee product takes its operands from registers: boxes 32 deep spill 300 bytes.
        bk = min(c.BK, 16) if p.dtype == "ieee" else c.BK
        while k % bk:
            bk //= 2
        return replace(c, BM=max(16, min(c.BM, next_power(p.sizes["N"]))), BK=bk)

    def _fits(self, c: Config, p: Problem) -> bool:
        return super()._fits(c, p) and self._over_images(c, p) == c

    def launch(self, work: Work, config: Config) -> list[Launch]:
        constants, _, epi = walk(work)
        n, g, pixels = constants["N"], constants["G"], constants["OH"] * constants["OW"]
        forward = work.anchor.op == "conv2d"
        x, w = (work.type(v) for v in work.anchor.inputs[:2])
        c = config
        operands = _operands(work, x, w, c, forward)
        reached = reach(constants)
        constants = {key: v for key, v in constants.items() if not key.startswith("X")}
        constants |= {
            "BOXED": isinstance(operands[1], Box), "TURNED": forward, "BM": c.BM, "BN": c.BN,
            "BT": c.BT, "BK": c.BK, "PRECISION": work.problem.dtype, "EPILOGUE": source(epi),
        }  # fmt: skip
        rows = cdiv(n, c.BM)
        count = rows * cdiv(constants["K"], c.BN + c.BT) * g * reached
        return [
            product(
                work, "conv2d_tma", "conv_tma", c, constants,
                (rows * c.BM * pixels, constants["K"], g), epi, length=constants["C"],
                operands=operands, programs=count,
            )
        ]  # fmt: skip


def _operands(
    work: Work, x: TensorType, w: TensorType, c: Config, turned: bool
) -> tuple[Arg, ...]:  # fmt: skip
    """The image and the filters, those of the second accumulator apart.

    turned  the stored filters are columns of the result
    """
    rx, rw = (work.ref(v) for v in work.anchor.inputs[:2])
    image = Box(rx, matrix(x), (c.BM, c.BK))
    if w.layout.order != "nhwc":  # a tile of it is no box
        return image, rw, rw if c.BT else None

    def filters(width: int) -> Box:
        return Box(rw, matrix(w), (width, c.BK) if turned else (c.BK, width))

    return image, filters(c.BN), filters(c.BT) if c.BT else None


class BoxesWgrad(TapsWgrad):
    """The weight gradient: sums over images first, then over the pixels that its tap reaches."""

    name = "boxes"

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        return not_boxed(eqn, layouts, arch, summed=False)

    def suits(self, problem: Problem) -> str | None:
        return badly_filled(problem, self.size(problem)[1])

    def launch(self, work: Work, config: Config) -> list[Launch]:
        c = config
        xt, dt = (work.type(v) for v in work.anchor.inputs)
        rx, rdy = (work.ref(v) for v in work.anchor.inputs)
        constants, w, _ = wgrad_walk(work, c)
        g, r, s, channels, k = (constants[key] for key in "GRSCK")

        def image(width: int) -> Box:
            return Box(rx, matrix(xt), (c.BK, width))

        operands = (
            image(c.BN), image(c.BT) if c.BT else None, Box(rdy, matrix(dt), (c.BK, c.BM))
        )  # fmt: skip

        def shape(has_bias: bool) -> tuple[tuple[int, int], int, int]:
            across = cdiv(channels, c.BN + c.BT)
            count = cdiv(k, c.BM) * across * g * reach(constants)
            padded = 2 * count * c.BM * (c.BN + c.BT) * blocks(constants["N"], c.BK)
            grid = cdiv(k, c.BM), r * s * across + has_bias
            return grid, r * s * channels + has_bias, padded

        return weight_gradient(
            work, "conv2d_wgrad_tma", "conv_tma", constants, w, g, c, shape, operands=operands
        )  # fmt: skip


def reach(c: dict[str, Any]) -> int:
    """Pairs of a pixel of the result and a filter tap whose pixel of the image exists."""

    def along(size: str, out: str, taps: str, stride: str, offset: int, step: int) -> int:
        starts = (o * c[stride] + offset for o in range(c[out]))
        return sum(0 <= s + t * step < c[size] for s in starts for t in range(c[taps]))

    if "PT" in c:
        steps = (-c["PT"], c["DH"]), (-c["PL"], c["DW"])
    else:
        steps = (c["OFFH"], c["STEPH"]), (c["OFFW"], c["STEPW"])
    return along("H", "OH", "R", "SH", *steps[0]) * along("W", "OW", "S", "SW", *steps[1])
