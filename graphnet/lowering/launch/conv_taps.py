"""Convolutions tap by tap over channels-last images (kernels/conv_taps.py), whose tiles come by
masked 16-byte asynchronous copies.

An image in space-to-depth layout, and the weight beside it, is a convolution of stride 1 over
blocks of pixels; in it the block columns of a filter row are one contiguous run.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import Layout, TensorType
from graphnet.lowering.launch.codegen import Index
from graphnet.lowering.launch.config import (
    LEAST_PART,
    PROCESSORS,
    Config,
    cdiv,
    columns,
    depth,
    tile,
)
from graphnet.lowering.launch.conv import (
    in_blocks,
    not_by_tap,
    not_in_blocks,
    outputs,
    pixels,
)
from graphnet.lowering.launch.moments import moments
from graphnet.lowering.launch.products import (
    Product,
    Size,
    blocks,
    plain_product,
    plain_wgrad,
    product,
    weight_gradient,
)
from graphnet.lowering.launch.steps import Launch, source
from graphnet.lowering.launch.variants import Problem
from graphnet.lowering.launch.work import Work

PAIRS = ((64, 32), (128, 16), (128, 64))


class ByTap(Product):
    """What both tap-wise families share."""

    pairs = PAIRS

    def accepts(
        self, eqn: Eqn, layouts: Mapping[Value, Layout], dtype: str, arch: int
    ) -> str | None:
        return not_by_tap(eqn, layouts) or not_in_blocks(eqn, layouts)


class Taps(ByTap):
    """Forward and input gradient."""

    name, ops = "taps", ("conv2d", "conv2d_dgrad")
    moments = True

    def size(self, p: Problem) -> Size:
        """The reduction is that of one tap."""
        s = p.sizes
        c, k, g = s["C"] // s["G"], s["K"] // s["G"], s["G"]
        if p.op == "conv2d_dgrad":
            return s["N"] * s["H"] * s["W"], c, k, g
        run = cdiv(s["S"], s["SW"]) * s["SW"] * s["SH"] * c if in_blocks(p) else c
        return s["N"] * prod(outputs(s)), k, run, g

    def by_rule(self, p: Problem, m: int, n: int, k: int, groups: int) -> Config:
        if p.dtype == "ieee":
            return plain_product(m, n, k, groups, p.dtype)
        low = p.dtype == "bf16"
        bm = tile(m, 128 if low else 64)
        bn, bt = columns(n, 128, 128)
        while cdiv(m, bm) * cdiv(n, bn + bt) * groups < PROCESSORS and bm > 64:
            bm //= 2
        bk = depth(k, 64 if low else 32)
        return Config(bm, bn, bk, BT=bt, num_stages=3 if bk >= 64 else 4)

    def launch(self, work: Work, config: Config) -> list[Launch]:
        c = config
        constants, m = _walk(work)
        n, k, g = (constants[key] for key in "KCG")
        keep, out = moments(work, cdiv(m, c.BM)), work.anchor.out
        epi = work.epilogue(out, Index(out.type.shape), bias=work.bias, returns=keep.value)
        constants |= {
            "BM": c.BM, "BN": c.BN, "BT": c.BT, "BK": c.BK, "PRECISION": work.problem.dtype,
            "EPILOGUE": source(epi),
        }  # fmt: skip
        length = constants["R"] * constants["S"] * blocks(k, c.BK)
        return [
            product(
                work, "conv2d_taps", "conv_taps", c, constants, (m, n, g), epi, length=length,
                keep=keep,
            )
        ]  # fmt: skip


def _walk(work: Work) -> tuple[dict[str, Any], int]:
    """(constexprs of a walk over the taps, pixels of the result) of a forward pass or an input
    gradient."""
    e, a = work.anchor, work.anchor.attrs
    out = e.out.type.shape
    first, w = (work.type(v) for v in e.inputs[:2])
    if e.op == "conv2d_dgrad":
        constants = _dgrad(first, w, out, a)
    elif first.layout.s2d:
        constants = _blocks(first, w, out)
    else:
        constants = _forward(first, w, out, a)
    return constants, out[0] * out[2] * out[3]


def _forward(x: TensorType, w: TensorType, y: tuple[int, ...], a: Any) -> dict[str, Any]:
    c, k = x.shape[1] // a.groups, y[1] // a.groups
    s = w.strides
    return {
        "N": y[0], "C": c, "H": x.shape[2], "W": x.shape[3], "K": k, "OH": y[2], "OW": y[3],
        "R": w.shape[2], "S": w.shape[3], "SH": a.stride[0], "SW": a.stride[1],
        "OFFH": -a.padding[0], "OFFW": -a.padding[2], "STEPH": a.dilation[0],
        "STEPW": a.dilation[1], "G": a.groups, **pixels("X", x), "XG": c,
        "WO": s[0], "WI": s[1], "WR": s[2], "WS": s[3], "WG": k * s[0],
    }  # fmt: skip


def _blocks(x: TensorType, w: TensorType, y: tuple[int, ...]) -> dict[str, Any]:
    """Space-to-depth: rows of the filter are taps, and what is one run are its channels."""
    _, hb, wb, c = x.layout.stored(x.shape)
    k, rows, cols, _ = w.layout.stored(w.shape)
    return {
        "N": y[0], "C": cols * c, "H": hb, "W": wb, "K": k, "OH": y[2], "OW": y[3],
        "R": rows, "S": 1, "SH": 1, "SW": 1, "OFFH": 0, "OFFW": 0, "STEPH": 1, "STEPW": 1,
        "G": 1, **pixels("X", x, blocks=True), "XG": 0,
        "WO": rows * cols * c, "WI": 1, "WR": cols * c, "WS": 0, "WG": 0,
    }  # fmt: skip


def _dgrad(dy: TensorType, w: TensorType, x: tuple[int, ...], a: Any) -> dict[str, Any]:
    """Tap (r, s) of input pixel (h, w) is output pixel (h + PT - r DH, ...)."""
    k, c = dy.shape[1] // a.groups, x[1] // a.groups
    s = w.strides
    return {
        "N": x[0], "C": k, "H": dy.shape[2], "W": dy.shape[3], "K": c, "OH": x[2], "OW": x[3],
        "R": w.shape[2], "S": w.shape[3], "SH": 1, "SW": 1, "OFFH": a.padding[0],
        "OFFW": a.padding[2], "STEPH": -a.dilation[0], "STEPW": -a.dilation[1], "G": a.groups,
        **pixels("X", dy), "XG": k,
        "WO": s[1], "WI": s[0], "WR": s[2], "WS": s[3], "WG": k * s[0],
    }  # fmt: skip


class TapsWgrad(ByTap):
    """The weight gradient."""

    name, ops, split = "taps", ("conv2d_wgrad",), True

    def size(self, p: Problem) -> Size:
        """Columns are the channels of one tap; "groups" counts the taps of all groups."""
        s = p.sizes
        k, c, g = s["K"] // s["G"], s["C"] // s["G"], s["G"]
        r, taps = s["R"], s["S"]
        if in_blocks(p):
            r, taps, c = cdiv(r, s["SH"]), 1, cdiv(taps, s["SW"]) * s["SW"] * s["SH"] * c
        return k, c, s["N"] * prod(outputs(s)), g * r * taps

    def by_rule(self, p: Problem, m: int, n: int, k: int, groups: int) -> Config:
        if p.dtype == "ieee":
            return plain_wgrad(m, n, k, groups, p.dtype, p.held)
        bn, bt = columns(n, *(128, 144) if p.dtype == "bf16" else (64, 96))
        bm = tile(m, 64 if bt else 128)  # two accumulators of 128 rows spill
        tiles = cdiv(m, bm) * cdiv(n, bn + bt) * groups
        # Two waves of tiles; the update is done by the second pass, which the first one needs for
        # its large accumulators anyway.
        parts = max(2, min(2 * PROCESSORS // tiles, k // (4 * LEAST_PART)))
        split = 1 << (parts.bit_length() - 1)
        # 128 x 128 holds its operands' addresses beside 128 accumulators: Triton 3.6 spills at 4
        # warps.
        warps = 8 if bm * (bn + bt) > 128 * 96 else 4
        stages = 4 if p.dtype == "bf16" else 3
        return Config(bm, bn, 32, BT=bt, SPLIT=split, num_warps=warps, num_stages=stages)

    def launch(self, work: Work, config: Config) -> list[Launch]:
        xt, dt = (work.type(v) for v in work.anchor.inputs)
        constants, w, block = _wgrad_walk(work, config)
        g, r, s, c, k = (constants[key] for key in "GRSCK")
        constants |= {
            **pixels("X", xt, blocks=block > 1), **pixels("D", dt), "CG": w[1], "FR": w[2],
            "FS": w[3], "BLOCK": block,
        }  # fmt: skip
        length = constants["N"] * constants["OH"] * constants["OW"]

        def shape(has_bias: bool) -> tuple[tuple[int, int], int, int]:
            cols = r * s * cdiv(c, config.BN + config.BT)
            rows = blocks(cdiv(blocks(length, config.BK), config.SPLIT), config.BK)
            count = cdiv(k, config.BM) * cols * g * config.SPLIT
            padded = 2 * count * config.BM * (config.BN + config.BT) * rows
            return (cdiv(k, config.BM), cols + has_bias), r * s * c + has_bias, padded

        return weight_gradient(
            work, "conv2d_wgrad_taps", "conv_taps", constants, w, g, config, shape, block
        )  # fmt: skip


def _wgrad_walk(work: Work, config: Config) -> tuple[dict[str, Any], tuple[int, ...], int]:
    """(constexprs of a weight gradient's walk over the taps, shape of the weight, its block)."""
    e, a = work.anchor, work.anchor.attrs
    x, dy = (work.type(v) for v in e.inputs)
    n, _, oh, ow = dy.shape
    z = work.problem.sizes
    g = z["G"]
    w = (z["K"], z["C"] // g, z["R"], z["S"])
    block = x.layout.s2d
    if block:
        _, hb, wb, c = x.layout.stored(x.shape)
        r, s, c = cdiv(w[2], block), 1, cdiv(w[3], block) * c
        image = {"C": c, "H": hb, "W": wb, "SH": 1, "SW": 1, "PT": 0, "PL": 0, "DH": 1, "DW": 1}
    else:
        _, c, r, s = w
        image = {
            "C": c, "H": z["H"], "W": z["W"], "SH": z["SH"], "SW": z["SW"],
            "PT": a.padding[0], "PL": a.padding[2],  # type: ignore[attr-defined]
            "DH": z["DH"], "DW": z["DW"],
        }  # fmt: skip
    constants: dict[str, Any] = {
        "N": n, **image, "K": w[0] // g, "OH": oh, "OW": ow, "R": r, "S": s, "G": g,
        "BT": config.BT,
    }  # fmt: skip
    return constants, w, block or 1
