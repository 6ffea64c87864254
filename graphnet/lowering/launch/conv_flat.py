"""Convolutions over one flattened reduction (kernels/conv.py): any strides, any channels."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import Layout
from graphnet.lowering.launch.codegen import Index
from graphnet.lowering.launch.config import Config, cdiv
from graphnet.lowering.launch.conv import geometry, outputs
from graphnet.lowering.launch.moments import moments
from graphnet.lowering.launch.products import (
    Product,
    Size,
    blocks,
    plain_product,
    plain_wgrad,
    product,
    tiles,
    weight_gradient,
)
from graphnet.lowering.launch.steps import Launch, source
from graphnet.lowering.launch.variants import Problem
from graphnet.lowering.launch.work import Work, strides
from graphnet.passes.templates import anchors_of

GATHERED = 8  # channels: of fewer a tile gathers its pixels one by one


def _not_flat(eqn: Eqn, layouts: Mapping[Value, Layout]) -> str | None:
    (e,) = anchors_of(eqn)
    if any(layouts[v].s2d for v in e.inputs):
        return "an operand lies in blocks of pixels"
    return None


class Flat(Product):
    """Forward and input gradient."""

    name, ops = "flat", ("conv2d", "conv2d_dgrad")
    moments = True

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        return _not_flat(eqn, layouts)

    def keeps(self, problem: Problem) -> str | None:
        channels = problem.sizes["C"] // problem.sizes["G"]
        if channels < GATHERED:
            return f"flat holds the places of {channels} channels in all its registers"
        return super().keeps(problem)

    def size(self, p: Problem) -> Size:
        s = p.sizes
        c, k, taps, g = s["C"] // s["G"], s["K"] // s["G"], s["R"] * s["S"], s["G"]
        if p.op == "conv2d":
            return s["N"] * prod(outputs(s)), k, c * taps, g
        return s["N"] * s["H"] * s["W"], c, k * taps, g

    def by_rule(self, p: Problem, m: int, n: int, k: int, groups: int) -> Config:
        return plain_product(m, n, k, groups, p.dtype)

    def launch(self, work: Work, config: Config) -> list[Launch]:
        e, c = work.anchor, config
        forward = e.op == "conv2d"
        first, w, out = (v.type.shape for v in (*e.inputs[:2], e.out))
        x, y = (first, out) if forward else (out, first)
        m, n, k, g = self.size(work.problem)
        keep = moments(work, cdiv(m, c.BM)) if forward else None
        epi = work.epilogue(e.out, Index(out), bias=work.bias, returns=keep and keep.value)
        constants = {
            **geometry(x, w, y, e.attrs),
            **strides("X" if forward else "D", work.type(e.inputs[0])),
            **strides("W", work.type(e.inputs[1])), **tiles(c), "PRECISION": work.problem.dtype,
            "EPILOGUE": source(epi),
        }  # fmt: skip
        kernel = "conv2d_forward" if forward else "conv2d_dgrad"
        return [
            product(
                work, kernel, "conv", c, constants, (m, n, g), epi, length=blocks(k, c.BK),
                keep=keep,
            )
        ]  # fmt: skip


class FlatWgrad(Product):
    """The weight gradient."""

    name, ops, split = "flat", ("conv2d_wgrad",), True

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        return _not_flat(eqn, layouts)

    def size(self, p: Problem) -> Size:
        s = p.sizes
        columns = s["C"] // s["G"] * s["R"] * s["S"]
        return s["K"] // s["G"], columns, s["N"] * prod(outputs(s)), s["G"]

    def by_rule(self, p: Problem, m: int, n: int, k: int, groups: int) -> Config:
        return plain_wgrad(m, n + 1, k, groups, p.dtype, p.held)  # a column for the bias

    def launch(self, work: Work, config: Config) -> list[Launch]:
        e, c = work.anchor, config
        x, dy = (v.type.shape for v in e.inputs)
        m, n, length, g = self.size(work.problem)
        s = work.problem.sizes
        w = (s["K"], s["C"] // g, s["R"], s["S"])
        constants = {
            **geometry(x, w, dy, e.attrs), **strides("X", work.type(e.inputs[0])),
            **strides("D", work.type(e.inputs[1])),
        }  # fmt: skip

        def shape(has_bias: bool) -> tuple[tuple[int, int], int, int]:
            grid = cdiv(m, c.BM), cdiv(n + has_bias, c.BN)
            rows = blocks(cdiv(blocks(length, c.BK), c.SPLIT), c.BK)
            padded = 2 * grid[0] * grid[1] * g * c.SPLIT * c.BM * c.BN * rows
            return grid, n + has_bias, padded

        return weight_gradient(work, "conv2d_wgrad", "conv", constants, w, g, c, shape)
