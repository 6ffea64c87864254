"""The weight gradient of a convolution tap by tap whose operands are boxes (kernels/conv_tma.py):
the copy engine fetches them by tensor descriptors.

Boxes leave out the taps beyond the border, where masked copies multiply zeros, and take fewer
registers. They serve any stride, dilation and number of groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import Layout
from graphnet.lowering.launch.config import Config, cdiv
from graphnet.lowering.launch.conv import badly_filled, images, matrix, not_by_tap
from graphnet.lowering.launch.conv_taps import TapsWgrad, wgrad_walk
from graphnet.lowering.launch.products import blocks, weight_gradient
from graphnet.lowering.launch.steps import Box, Launch
from graphnet.lowering.launch.variants import Problem
from graphnet.lowering.launch.work import Work


class BoxesWgrad(TapsWgrad):
    """The weight gradient: sums over images first, then over the pixels that its tap reaches."""

    name = "boxes"

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        if arch < 90:
            return f"sm_{arch} has no tensor descriptors"
        if why := not_by_tap(eqn, layouts):
            return why
        if block := layouts[images(eqn)[0]].s2d:
            return f"the image lies in blocks of {block} x {block} pixels"
        return None

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

    return along("H", "OH", "R", "SH", -c["PT"], c["DH"]) * along(
        "W", "OW", "S", "SW", -c["PL"], c["DW"]
    )
