"""What the launches of all convolutions share: geometry and strides as constexprs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import Layout, TensorType
from graphnet.lowering.launch.variants import Problem
from graphnet.passes.templates import anchors_of

RUN = 8  # channels of a 16-byte copy in bf16
ROWS = 64  # of a tile on wgmma
FEW_COLUMNS = 32
THIN = 4  # channels up to which an image lies in blocks of pixels; more fill a run by themselves


def outputs(sizes: Mapping[str, int]) -> tuple[int, int]:
    """Height and width of the result of a convolution of these sizes (`Problem.sizes`)."""
    s = sizes
    high = (s["H"] + s["PT"] + s["PB"] - s["DH"] * (s["R"] - 1) - 1) // s["SH"] + 1
    wide = (s["W"] + s["PL"] + s["PR"] - s["DW"] * (s["S"] - 1) - 1) // s["SW"] + 1
    return high, wide


def in_blocks(p: Problem) -> bool:
    """Whether the problem is one whose image lies in blocks: few channels, strided."""
    s = p.sizes
    return s["SH"] == s["SW"] > 1 and s["C"] <= THIN


def geometry(x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...], a: Any) -> dict[str, int]:
    """Sizes of image, filter and result, stride, padding, dilation and groups."""
    t, _, le, _ = a.padding
    return {
        "N": x[0], "C": x[1], "H": x[2], "W": x[3], "K": y[1], "OH": y[2], "OW": y[3],
        "R": w[2], "S": w[3], "SH": a.stride[0], "SW": a.stride[1], "PT": t, "PL": le,
        "DH": a.dilation[0], "DW": a.dilation[1], "G": a.groups,
    }  # fmt: skip


def pixels(prefix: str, type: TensorType, blocks: bool = False) -> dict[str, int]:
    """Strides of image, row and column; of the stored blocks in a space-to-depth layout."""
    if blocks:
        _, h, w, c = type.layout.stored(type.shape)
        return {f"{prefix}S0": h * w * c, f"{prefix}S2": w * c, f"{prefix}S3": c}
    s = type.strides
    return {f"{prefix}S0": s[0], f"{prefix}S2": s[2], f"{prefix}S3": s[3]}


def named(layout: Layout) -> str:
    """A layout as sentences call it."""
    return "row-major" if layout.order == "row" else f"as {{{layout}}}"


def images(eqn: Eqn) -> tuple[Value, ...]:
    """The images that a convolution reads: x; dy; or both for the weight gradient."""
    (e,) = anchors_of(eqn)
    return e.inputs[:2] if e.op == "conv2d_wgrad" else e.inputs[:1]


def not_by_tap(eqn: Eqn, layouts: Mapping[Value, Layout]) -> str | None:
    """Why a convolution cannot go tap by tap, in runs of channels; None where it can."""
    (e,) = anchors_of(eqn)
    a = e.attrs
    for v in images(eqn):
        channels = v.type.shape[1] // a.groups  # type: ignore[attr-defined]
        if layouts[v].s2d:
            continue
        if channels % RUN:
            return f"the channels of a group ({channels}) are no multiple of {RUN}"
        if layouts[v].order != "nhwc":
            return f"an image lies {named(layouts[v])}"
    if e.op == "conv2d_dgrad" and a.stride != (1, 1):  # type: ignore[attr-defined]
        step = a.stride[0]  # type: ignore[attr-defined]
        return f"a pixel of the input is reached by every {step} x {step}th tap only"
    return None


def not_in_blocks(eqn: Eqn, layouts: Mapping[Value, Layout]) -> str | None:
    """Why the image of a first layer cannot lie in blocks of pixels (space-to-depth); None where
    it can, or where no image does."""
    (e,) = anchors_of(eqn)
    block = layouts[e.inputs[0]].s2d
    if not block:
        return None
    a: Any = e.attrs
    if e.op == "conv2d_dgrad":
        return "an input gradient is not written in blocks"
    plain = a.groups == 1 and a.dilation == (1, 1) and not any(a.padding)
    if not plain or a.stride != (block, block):
        return f"blocks of {block} x {block} pixels need that stride, and no padding or groups"
    # The result's channels are read channels-last by the weight gradient.
    made = e.inputs[1].type.shape[1 if e.op == "conv2d_wgrad" else 0]
    c = e.inputs[0].type.shape[1]
    if made % RUN or c > THIN or c * block * block % 16:
        return f"{c} channels in blocks of {block} x {block} for {made} filters are no runs"
    if e.op == "conv2d" and layouts[e.inputs[1]].s2d != block:
        return "the filters do not lie in the blocks of the image"
    return None


def badly_filled(p: Problem, columns: int, rows: int = ROWS) -> str | None:
    """Why tiles of `rows` images suit a problem badly: few images, or few columns of the result.
    None where they do not."""
    count = p.sizes["N"]
    empty = -count % rows
    if 8 * empty > count:
        return f"{empty} of {count + empty} rows would be empty"
    return f"it has {columns} columns, which are few" if columns < FEW_COLUMNS else None
