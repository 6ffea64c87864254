"""Launches of convolutions, each with the loader that loaders.py chooses.

An image in space-to-depth layout, and the weight beside it, is a convolution of stride 1 over
blocks of pixels; in it the block columns of a filter row are one contiguous run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

from graphnet.ir.types import TensorType
from graphnet.lowering.launch.codegen import Index
from graphnet.lowering.launch.config import Config, cdiv, choose, next_power
from graphnet.lowering.launch.linear import product, tiles, weight_gradient
from graphnet.lowering.launch.loaders import choose_loader
from graphnet.lowering.launch.steps import Arg, Box, Launch, source
from graphnet.lowering.launch.work import Work, strides


def _geometry(x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...], a: Any) -> dict[str, int]:
    t, _, le, _ = a.padding
    return {
        "N": x[0], "C": x[1], "H": x[2], "W": x[3], "K": y[1], "OH": y[2], "OW": y[3],
        "R": w[2], "S": w[3], "SH": a.stride[0], "SW": a.stride[1], "PT": t, "PL": le,
        "DH": a.dilation[0], "DW": a.dilation[1], "G": a.groups,
    }  # fmt: skip


def _pixels(prefix: str, type: TensorType, blocks: bool = False) -> dict[str, int]:
    """Strides of image, row and column; of the stored blocks in a space-to-depth layout."""
    if blocks:
        _, h, w, c = type.layout.stored(type.shape)
        return {f"{prefix}S0": h * w * c, f"{prefix}S2": w * c, f"{prefix}S3": c}
    s = type.strides
    return {f"{prefix}S0": s[0], f"{prefix}S2": s[2], f"{prefix}S3": s[3]}


# ---- forward and input gradient --------------------------------------------------------------


def _conv2d(work: Work) -> list[Launch]:
    e, a = work.anchor, work.anchor.attrs
    x, w, y = (v.type.shape for v in (*e.inputs[:2], e.out))
    xt, wt = work.type(e.inputs[0]), work.type(e.inputs[1])
    g, math = a.groups, a.math  # type: ignore[attr-defined]
    m, n = y[0] * y[2] * y[3], y[1] // g
    bias = e.inputs[2] if len(e.inputs) > 2 else None
    epi = work.epilogue(e.out, Index(y), bias=bias)
    if (choice := choose_loader(e.op, (xt,), g)).loader != "flat":
        constants = _blocks(xt, wt, y) if xt.layout.s2d else _forward_taps(xt, wt, y, a)
        return [_taps(work, constants, m, epi)]
    c = choose("conv2d", (m, n, prod(w[1:]), g), math)
    constants = {
        **_geometry(x, w, y, a), **strides("X", xt), **strides("W", wt), **tiles(c),
        "PRECISION": math, "EPILOGUE": source(epi),
    }  # fmt: skip
    return [product(work, "conv2d_forward", "conv", c, constants, (m, n, g), epi, why=str(choice))]


def _taps(work: Work, constants: dict[str, Any], m: int, epi: Any) -> Launch:
    """Forward or input gradient, tap by tap: the constants of both loaders are the same."""
    e, math = work.anchor, work.anchor.attrs.math  # type: ignore[attr-defined]
    n, k, g = (constants[key] for key in "KCG")
    c = choose("conv2d_taps", (m, n, k, g), math)
    xt, wt = (work.type(v) for v in e.inputs[:2])
    choice = choose_loader(e.op, (xt,), g, wanted=c.loader)
    kernel = "conv2d_taps"
    operands: tuple[Arg, ...] = ()
    if choice.loader == "tma":
        kernel = "conv2d_tma"
        c = _over_images(c, xt.shape[0], k, math)
        m = cdiv(xt.shape[0], c.BM) * c.BM * (m // xt.shape[0])  # every pixel has its own tiles
        operands = _boxes(work, xt, wt, c, e.op == "conv2d")
        constants = {key: v for key, v in constants.items() if not key.startswith("X")}
        constants |= {"BOXED": isinstance(operands[1], Box), "TURNED": e.op == "conv2d"}
    constants |= {
        "BM": c.BM, "BN": c.BN, "BT": c.BT, "BK": c.BK, "PRECISION": math, "EPILOGUE": source(epi)
    }  # fmt: skip
    return product(
        work, kernel, kernel.replace("conv2d", "conv"), c, constants, (m, n, g), epi,
        operands=operands, why=str(choice),
    )  # fmt: skip


def _over_images(c: Config, images: int, k: int, math: str) -> Config:
    """The tile with images as rows, and a depth that divides the k channels."""
    # An ieee product takes its operands from registers: boxes 32 deep spill 300 bytes.
    bk = min(c.BK, 16) if math == "ieee" else c.BK
    while k % bk:
        bk //= 2
    return replace(c, BM=max(16, min(c.BM, next_power(images))), BK=bk)


def _boxes(work: Work, x: TensorType, w: TensorType, c: Config, turned: bool) -> tuple[Arg, ...]:
    """The image and the filters, those of the second accumulator apart.

    turned  the stored filters are columns of the result
    """
    rx, rw = (work.ref(v) for v in work.anchor.inputs[:2])
    image = Box(rx, _matrix(x), (c.BM, c.BK))
    if w.layout.order != "nhwc":  # a tile of it is no box
        return image, rw, rw if c.BT else None

    def filters(width: int) -> Box:
        return Box(rw, _matrix(w), (width, c.BK) if turned else (c.BK, width))

    return image, filters(c.BN), filters(c.BT) if c.BT else None


def _matrix(type: TensorType) -> tuple[int, int]:
    """A channels-last tensor as rows of images or filters."""
    return type.shape[0], prod(type.shape[1:])


def _forward_taps(
    x: TensorType, w: TensorType, y: tuple[int, ...], a: Any
) -> dict[str, Any]:  # fmt: skip
    c, k = x.shape[1] // a.groups, y[1] // a.groups
    s = w.strides
    return {
        "N": y[0], "C": c, "H": x.shape[2], "W": x.shape[3], "K": k, "OH": y[2], "OW": y[3],
        "R": w.shape[2], "S": w.shape[3], "SH": a.stride[0], "SW": a.stride[1],
        "OFFH": -a.padding[0], "OFFW": -a.padding[2], "STEPH": a.dilation[0],
        "STEPW": a.dilation[1], "G": a.groups, **_pixels("X", x), "XG": c,
        "WO": s[0], "WI": s[1], "WR": s[2], "WS": s[3], "WG": k * s[0],
    }  # fmt: skip


def _blocks(x: TensorType, w: TensorType, y: tuple[int, ...]) -> dict[str, Any]:
    """Space-to-depth: rows of the filter are taps, and what is one run are its channels."""
    _, hb, wb, c = x.layout.stored(x.shape)
    k, rows, cols, _ = w.layout.stored(w.shape)
    return {
        "N": y[0], "C": cols * c, "H": hb, "W": wb, "K": k, "OH": y[2], "OW": y[3],
        "R": rows, "S": 1, "SH": 1, "SW": 1, "OFFH": 0, "OFFW": 0, "STEPH": 1, "STEPW": 1,
        "G": 1, **_pixels("X", x, blocks=True), "XG": 0,
        "WO": rows * cols * c, "WI": 1, "WR": cols * c, "WS": 0, "WG": 0,
    }  # fmt: skip


def _conv2d_dgrad(work: Work) -> list[Launch]:
    e, a = work.anchor, work.anchor.attrs
    dy, w, x = (v.type.shape for v in (*e.inputs, e.out))
    dt, wt = work.type(e.inputs[0]), work.type(e.inputs[1])
    g, math = a.groups, a.math  # type: ignore[attr-defined]
    m, n, k = x[0] * x[2] * x[3], x[1] // g, dy[1] // g
    epi = work.epilogue(e.out, Index(x))
    choice = choose_loader(e.op, (dt,), g, a.stride)  # type: ignore[attr-defined]
    if choice.loader != "flat":
        return [_taps(work, _dgrad_taps(dt, wt, x, a), m, epi)]
    c = choose("conv2d_dgrad", (m, n, k * w[2] * w[3], g), math)
    constants = {
        **_geometry(x, w, dy, a), **strides("D", dt), **strides("W", wt), **tiles(c),
        "PRECISION": math, "EPILOGUE": source(epi),
    }  # fmt: skip
    return [product(work, "conv2d_dgrad", "conv", c, constants, (m, n, g), epi, why=str(choice))]


def _dgrad_taps(
    dy: TensorType, w: TensorType, x: tuple[int, ...], a: Any
) -> dict[str, Any]:  # fmt: skip
    """Tap (r, s) of input pixel (h, w) is output pixel (h + PT - r DH, ...)."""
    k, c = dy.shape[1] // a.groups, x[1] // a.groups
    s = w.strides
    return {
        "N": x[0], "C": k, "H": dy.shape[2], "W": dy.shape[3], "K": c, "OH": x[2], "OW": x[3],
        "R": w.shape[2], "S": w.shape[3], "SH": 1, "SW": 1, "OFFH": a.padding[0],
        "OFFW": a.padding[2], "STEPH": -a.dilation[0], "STEPW": -a.dilation[1], "G": a.groups,
        **_pixels("X", dy), "XG": k,
        "WO": s[1], "WI": s[0], "WR": s[2], "WS": s[3], "WG": k * s[0],
    }  # fmt: skip


# ---- weight gradient -------------------------------------------------------------------------


def _conv2d_wgrad(work: Work) -> list[Launch]:
    e, a = work.anchor, work.anchor.attrs
    x, dy = (v.type.shape for v in e.inputs)
    xt, dt = (work.type(v) for v in e.inputs)
    w, g, math = e.out.type.shape, a.groups, a.math  # type: ignore[attr-defined]
    pixels = dy[0] * dy[2] * dy[3]
    if (choice := choose_loader(e.op, (xt, dt), g)).loader != "flat":
        return _wgrad_taps(work, xt, dt, w, a)
    constants = {**_geometry(x, w, dy, a), **strides("X", xt), **strides("D", dt)}

    def shape(has_bias: bool) -> tuple[Config, tuple[int, int], int]:
        columns = prod(w[1:]) + has_bias
        c = choose("conv2d_wgrad", (w[0] // g, columns, pixels, g), math, work.held)
        return c, (cdiv(w[0] // g, c.BM), cdiv(columns, c.BN)), columns

    return weight_gradient(work, "conv2d_wgrad", "conv", constants, w, g, shape, why=str(choice))


def _wgrad_taps(
    work: Work, x: TensorType, dy: TensorType, w: tuple[int, ...], a: Any
) -> list[Launch]:
    n, _, oh, ow = dy.shape
    block = x.layout.s2d
    if block:
        _, hb, wb, c = x.layout.stored(x.shape)
        r, s, c = cdiv(w[2], block), 1, cdiv(w[3], block) * c
        image = {"C": c, "H": hb, "W": wb, "SH": 1, "SW": 1, "PT": 0, "PL": 0, "DH": 1, "DW": 1}
    else:
        _, c, r, s = w
        image = {
            "C": c, "H": x.shape[2], "W": x.shape[3], "SH": a.stride[0], "SW": a.stride[1],
            "PT": a.padding[0], "PL": a.padding[2], "DH": a.dilation[0], "DW": a.dilation[1],
        }  # fmt: skip
    g, k = a.groups, w[0] // a.groups
    config = choose("conv2d_wgrad_taps", (k, c, n * oh * ow, g * r * s), a.math, work.held)
    choice = choose_loader("conv2d_wgrad", (x, dy), g, wanted=config.loader)
    constants: dict[str, Any] = {
        "N": n, **image, "K": k, "OH": oh, "OW": ow, "R": r, "S": s, "G": g, "BT": config.BT
    }  # fmt: skip
    kernel = "conv2d_wgrad_taps"
    operands: tuple[Arg, ...] = ()
    if choice.loader == "tma":
        kernel = "conv2d_wgrad_tma"
        operands = _pixel_boxes(work, x, dy, config)
    else:
        constants |= {
            **_pixels("X", x, blocks=bool(block)), **_pixels("D", dy),
            "CG": w[1], "FR": w[2], "FS": w[3], "BLOCK": block or 1,
        }  # fmt: skip

    def shape(has_bias: bool) -> tuple[Config, tuple[int, int], int]:
        columns = r * s * cdiv(c, config.BN + config.BT) + has_bias
        return config, (cdiv(k, config.BM), columns), r * s * c + has_bias

    return weight_gradient(
        work, kernel, kernel.replace("conv2d_wgrad", "conv"), constants, w, g, shape, block or 1,
        operands=operands, why=str(choice),
    )  # fmt: skip


def _pixel_boxes(work: Work, x: TensorType, dy: TensorType, c: Config) -> tuple[Arg, ...]:
    """Boxes of BK images of a weight gradient: x, that of the second accumulator, dy."""
    rx, rdy = (work.ref(v) for v in work.anchor.inputs)

    def image(width: int) -> Box:
        return Box(rx, _matrix(x), (c.BK, width))

    return image(c.BN), image(c.BT) if c.BT else None, Box(rdy, _matrix(dy), (c.BK, c.BM))


CONVS: dict[str, Callable[[Work], list[Launch]]] = {
    "conv2d": _conv2d, "conv2d_dgrad": _conv2d_dgrad, "conv2d_wgrad": _conv2d_wgrad,
}  # fmt: skip
