"""The weight gradient of convolutions by filter rows and specialised warps: kernels/gl_wgrad.py.

The table of segments, the workspace and the second pass are those of `rows`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from graphnet.lowering.launch.config import PROCESSORS, Config
from graphnet.lowering.launch.gluon import CONSUMER, HALF, Specialised
from graphnet.lowering.launch.steps import Box, Launch
from graphnet.lowering.launch.variants import Problem
from graphnet.lowering.launch.wgrad_rows import STEP, WgradRows, by_time
from graphnet.lowering.launch.work import Work


def _form(rows: str, bm: int, bn: int, bt: int, stages: int) -> Config:
    """rows  "d" for dy's channels, "x" for columns"""
    return Config(
        bm, bn, STEP["bf16"], BT=bt, num_stages=stages, num_warps=CONSUMER, SWAP=int(rows == "x"),
        PROGRAMS=PROCESSORS,
    )  # fmt: skip


# 256 columns and 128 beside them spill with the bias sums.
_FORMS = (
    _form("x", 128, 256, 0, 4), _form("d", 256, 128, 0, 4), _form("d", 256, 128, 64, 4),
    _form("x", 256, 128, 64, 4), _form("d", 128, 256, 0, 4), _form("x", 256, 128, 0, 4),
    _form("d", 256, 128, 32, 4), _form("d", 128, 128, 16, 5), _form("d", 128, 128, 64, 4),
    _form("x", 128, 128, 64, 4), _form("d", 128, 64, 0, 6),
)  # fmt: skip


class GluonWgrad(Specialised, WgradRows):
    """A warpgroup has half of a tile's rows."""

    name = "gluon_rows"

    def configs(self, problem: Problem) -> Iterator[Config]:
        yield from by_time(problem, _FORMS)

    def cut(self, config: Config, problem: Problem) -> Config:
        c = replace(config, BM=2 * HALF if config.BM < 4 * HALF else 4 * HALF, num_warps=CONSUMER)
        if not c.SWAP:
            return c
        # dy's channels are the columns, and the rows of the product that sums them.
        return replace(c, BN=max(HALF, c.BN), BT=max(HALF, c.BT) if c.BT else 0)

    def launch(self, work: Work, config: Config) -> list[Launch]:
        first, *second = super().launch(work, config)
        return [_specialised(first, config), *second] if second else [first]


def _specialised(launch: Launch, c: Config) -> Launch:
    """The first pass by a loader and two consumers, which have half of the rows each."""
    rows = 0 if c.SWAP else 2  # the argument whose boxes they are
    args = list(launch.args)
    for k, box in enumerate(args):
        if isinstance(box, Box):
            *rest, wide = box.block
            wide = wide // 2 if k == rows else wide
            args[k] = replace(box, block=(*rest, wide), gluon=True)
    constants = {k: v for k, v in launch.constants if k not in ("PRECISION", "TURNED")}
    return replace(
        launch, kernel="conv2d_wgrad_specialised", module="graphnet.kernels.gl_wgrad",
        args=tuple(args), constants=tuple({**constants, "STAGES": c.num_stages}.items()),
        num_warps=CONSUMER,
    )  # fmt: skip
