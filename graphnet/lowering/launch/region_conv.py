"""Stages of a region: convolutions with what follows them (kernels/region_conv.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.launch.codegen import Index
from graphnet.lowering.launch.config import cdiv, next_power
from graphnet.lowering.launch.pool import window
from graphnet.lowering.launch.region import Body, Stage
from graphnet.lowering.launch.work import Work, strides
from graphnet.passes.templates import anchors_of

CHANNELS = 64  # of either side; more fill a matrix product
PIXELS = 9  # of a pool's window, whose sums one lane holds
SUMS = 32  # of a lane
RUN = 8  # pixels of a row at most that a lane holds where no pool follows


class Tile(NamedTuple):
    """Of one image."""

    tiles: int
    pixels: int
    across: int  # pixels of the image that a lane loads for a row of the filter


def not_small(e: Eqn, channels: int) -> str | None:
    """Why a convolution of so many channels, or a gradient of one, is none for FMAs; None where it
    is."""
    a: Any = e.attrs
    if a.groups != 1:
        return f"a convolution of {a.groups} groups has no stage"
    if channels > CHANNELS:
        return f"{channels} channels are a matrix product's, a stage takes at most {CHANNELS}"
    return None


def clocks(filters: int, kb: int, tile: Tile, taps: int, block: int) -> float:
    """What a filter row of an image takes where a lane holds `kb` output channels of a tile.

    A warp's load of pixels touches about 4 lines and one of a weight 1, and a processor serves a
    line a clock. Its four schedulers issue an instruction a clock each, for all warps of the
    program, those without a live lane, too; 40 and half of one for a load were counted besides
    products and loads. A warp alone waits about 100 for its loads.
    """
    lanes = tile.tiles * cdiv(filters, kb)
    live, turns = cdiv(lanes, 32), cdiv(lanes, block)
    loads, products = tile.across + taps * kb, tile.pixels * taps * kb
    one = products + 1.5 * loads + 40
    lines = live * (4 * tile.across + 1.5 * taps * kb)
    return max(lines, turns * block / 32 / 4 * one, turns * (100 + loads + products))


def channels_of_a_lane(filters: int, tile: Tile, taps: int, block: int) -> int:
    """How many output channels a lane holds: the fewest clocks."""
    most = max(1, min(next_power(filters), SUMS // tile.pixels))
    return min(
        (1 << k for k in range(most.bit_length())),
        key=lambda kb: clocks(filters, kb, tile, taps, block),
    )


class Convolution(Stage):
    """conv2d with its elementwise code and, where `ops` says so, the pool behind it."""

    def __init__(self, *ops: str) -> None:
        self.ops = ops

    def share(self) -> float:
        return 1.0 if len(self.ops) > 1 else 0.6

    def refusal(self, members: Sequence[Eqn], kept: set[Value]) -> str | None:
        conv, *pools = (anchors_of(m)[0] for m in members)
        if why := not_small(conv, max(v.type.shape[1] for v in (conv.inputs[0], conv.out))):
            return why
        for pool in pools:
            if pool.inputs[0] not in members[0].results:
                return f"{pool.op} does not read the result of {conv.op}"
            if why := _not_pooled(members[0], pool, kept):
                return why
        return None

    def write(self, body: Body, works: Sequence[Work]) -> None:
        conv, *pools = (w.anchor for w in works)
        x, k = conv.inputs[0], conv.out.type.shape[1]
        about = _forward(works[0]) if conv.op == "conv2d" else _gradient(works[0])
        block, pool = body.config.BLOCK, pools[0] if pools else None

        def best(tile: dict[str, Any]) -> tuple[float, int]:
            """The fewest clocks, and for how many channels."""
            across = (tile["TW"] - 1) * about["SW"] + (about["S"] - 1) * about["DW"] + 1
            rows = tile["TH"]
            measures = Tile(tile["OH"] * tile["OW"], rows * tile["TW"], rows * across)
            kb = channels_of_a_lane(k, measures, about["S"], block)
            return clocks(k, kb, measures, about["S"], block), kb

        tile = min(_tiles(pool, *conv.out.type.shape[2:]), key=best)
        kb = best(tile)[1]
        pooled = "None"
        if pools:
            roots = {pools[0].out: "acc"}
            if len(pools[0].outputs) > 1 and pools[0].outputs[1] is not None:
                roots[pools[0].outputs[1]] = "aux"
            pooled = body.epilogue(works[1], roots, Index(pools[0].out.type.shape))
        operands = [body.read(v) for v in conv.inputs]
        behind = body.epilogue(
            works[0], {conv.out: "acc"}, Index(conv.out.type.shape),
            returns=pools[0].inputs[0] if pools else None,
        )  # fmt: skip
        constants = {
            "N": x.type.shape[0], "IMAGES": body.config.BM, "C": x.type.shape[1],
            "H": x.type.shape[2], "W": x.type.shape[3], "K": k, "CH": conv.out.type.shape[2],
            "CW": conv.out.type.shape[3], **about, **strides("X", works[0].type(x)),
            "HAS_BIAS": len(operands) > 2, **tile, "KB": kb, "BLOCK": block,
            "EPILOGUE": behind, "POOLED": pooled,
        }  # fmt: skip
        body.call("conv", [*operands, "None"][:3], constants)
        body.notes += [w.note for w in works]


def _forward(work: Work) -> dict[str, int]:
    """The constants of the loop over x."""
    w, a = work.anchor.inputs[1], work.anchor.attrs
    return {**_filter(w, a), **strides("W", work.type(w)), "WAT": 0}


def _gradient(work: Work) -> dict[str, int]:
    """Those of the loop over dy: the filter turned around, channels and filters exchanged, and a
    stride's zeros between the pixels."""
    w = work.anchor.inputs[1]
    k, c, r, s = work.type(w).strides
    about = _filter(w, work.anchor.attrs)
    rows, columns = about["R"] - 1, about["S"] - 1
    return about | {
        "SH": 1, "SW": 1, "UH": about["SH"], "UW": about["SW"],
        "PT": rows * about["DH"] - about["PT"], "PL": columns * about["DW"] - about["PL"],
        "WS0": c, "WS1": k, "WS2": -r, "WS3": -s, "WAT": rows * r + columns * s,
    }  # fmt: skip


def _filter(w: Value, a: Any) -> dict[str, int]:
    r, s = w.type.shape[2:]
    return {
        "R": r, "S": s, "SH": a.stride[0], "SW": a.stride[1], "PT": a.padding[0],
        "PL": a.padding[2], "DH": a.dilation[0], "DW": a.dilation[1], "UH": 1, "UW": 1,
    }  # fmt: skip


def _not_pooled(member: Eqn, pool: Eqn, kept: set[Value]) -> str | None:
    """Why a pool cannot take the convolution's pixels from registers."""
    a: Any = pool.attrs
    (kh, kw), (h, w), (oh, ow) = a.kernel, pool.inputs[0].type.shape[2:], pool.out.type.shape[2:]
    if a.dilation != (1, 1):
        return f"a window dilated by {a.dilation[0]} x {a.dilation[1]} is no tile"
    if kh * kw > PIXELS:
        return f"a window of {kh} x {kw} has more pixels than a lane holds, {PIXELS}"
    tiled = a.stride == (kh, kw) and not any(a.padding) and oh * kh >= h and ow * kw >= w
    if not tiled and any(v in kept for v in member.results):
        return "the convolution's result is read elsewhere, and the windows are no tiles of it"
    return None


def _tiles(pool: Eqn | None, height: int, width: int) -> list[dict[str, Any]]:
    """The constants of tiles that fit: a pool's windows, or runs of a row's pixels."""
    if pool is None:
        return [
            {
                "OH": height, "OW": cdiv(width, run), "POOL": repr("none"), "TH": 1, "TW": run,
                "TSH": 1, "TSW": run, "TPT": 0, "TPL": 0, "TPB": 0, "TPR": 0, "COUNT_PAD": True,
                "DIVISOR": 0,
            }
            for run in range(1, min(RUN, width) + 1)
        ]  # fmt: skip
    a: Any = pool.attrs
    known = window(a, dilated=False)
    oh, ow = pool.out.type.shape[2:]
    windows = {
        "OH": oh, "OW": ow, "POOL": repr(pool.op.removesuffix("pool2d")),
        "TH": known["KH"], "TW": known["KW"], "TSH": known["SH"], "TSW": known["SW"],
        "TPT": known["PT"], "TPL": known["PL"], "TPB": a.padding[1], "TPR": a.padding[3],
        "COUNT_PAD": getattr(a, "count_include_pad", True),
        "DIVISOR": getattr(a, "divisor_override", 0),
    }  # fmt: skip
    return [windows]


STAGES: tuple[Stage, ...] = (
    Convolution("conv2d", "maxpool2d"),
    Convolution("conv2d", "avgpool2d"),
    Convolution("conv2d"),
    Convolution("conv2d_dgrad"),
)
