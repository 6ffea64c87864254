"""Launches of fully connected layers, whose operands come by pointer."""

from __future__ import annotations

from graphnet.lowering.launch.codegen import Index
from graphnet.lowering.launch.config import Config, cdiv
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


class Matmul(Product):
    """Forward and input gradient: one kernel, by strides alone."""

    name, ops = "pointers", ("linear", "linear_dgrad")

    def size(self, p: Problem) -> Size:
        n, c, k = p.shape
        return (n, k, c, 1) if p.op == "linear" else (n, c, k, 1)

    def by_rule(self, p: Problem, m: int, n: int, k: int, groups: int) -> Config:
        return plain_product(m, n, k, groups, p.dtype)

    def launch(self, work: Work, config: Config) -> list[Launch]:
        e, c = work.anchor, config
        forward = e.op == "linear"
        m, n, k, _ = self.size(work.problem)
        bias = e.inputs[2] if len(e.inputs) > 2 else None
        epi = work.epilogue(e.out, Index((m, n)), bias=bias)
        a, b = (work.type(v).strides for v in e.inputs[:2])
        b = (b[1], b[0]) if forward else b
        constants = {
            "M": m, "N": n, "K": k, "AS0": a[0], "AS1": a[1], "BS0": b[0], "BS1": b[1], **tiles(c),
            "PRECISION": work.problem.dtype, "EPILOGUE": source(epi),
        }  # fmt: skip
        return [
            product(work, "matmul", "gemm", c, constants, (m, n, 1), epi, length=blocks(k, c.BK))
        ]  # fmt: skip


class LinearWgrad(Product):
    """The weight gradient, its update in the epilogue."""

    name, ops, split = "pointers", ("linear_wgrad",), True

    def size(self, p: Problem) -> Size:
        n, c, k = p.shape
        return k, c, n, 1

    def by_rule(self, p: Problem, m: int, n: int, k: int, groups: int) -> Config:
        return plain_wgrad(m, n + 1, k, groups, p.dtype, p.held)  # a column for the bias

    def launch(self, work: Work, config: Config) -> list[Launch]:
        x, dy = work.anchor.inputs
        n, c, k = work.problem.shape
        constants = {
            "N": n, "C": c, "K": k, **strides("X", work.type(x)), **strides("D", work.type(dy)),
        }  # fmt: skip

        def shape(has_bias: bool) -> tuple[tuple[int, int], int, int]:
            grid = cdiv(k, config.BM), cdiv(c + has_bias, config.BN)
            alone = has_bias and c % config.BN == 0  # programs that multiply nothing
            rows = blocks(cdiv(blocks(n, config.BK), config.SPLIT), config.BK)
            count = grid[0] * (grid[1] - alone) * config.SPLIT
            return grid, c + has_bias, 2 * count * config.BM * config.BN * rows

        return weight_gradient(
            work, "linear_wgrad", "gemm", constants, (k, c), 1, config, shape
        )  # fmt: skip
