"""The problem of an equation: its anchor's full logical shape, whatever its layouts are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graphnet.ir.graph import Eqn
from graphnet.lowering.launch.variants import AXES, Problem


def _conv(e: Eqn) -> dict[str, int]:
    a: Any = e.attrs
    first, second = (v.type.shape for v in e.inputs[:2])
    if e.op == "conv2d_wgrad":  # whose only result may be the bias's
        x, filters, kernel = first, second[1], a.kernel
    else:
        x = first if e.op == "conv2d" else e.out.type.shape
        filters, kernel = second[0], second[2:]
    top, bottom, left, right = a.padding
    return {
        "N": x[0], "C": x[1], "H": x[2], "W": x[3], "K": filters, "R": kernel[0], "S": kernel[1],
        "SH": a.stride[0], "SW": a.stride[1], "PT": top, "PB": bottom, "PL": left, "PR": right,
        "DH": a.dilation[0], "DW": a.dilation[1], "G": a.groups,
    }  # fmt: skip


def _linear(e: Eqn) -> dict[str, int]:
    a, b = (v.type.shape for v in e.inputs[:2])
    if e.op == "linear":
        return {"N": a[0], "C": a[1], "K": b[0]}
    if e.op == "linear_dgrad":
        return {"N": a[0], "C": b[1], "K": a[1]}
    return {"N": a[0], "C": a[1], "K": b[1]}


def _image(e: Eqn) -> dict[str, int]:
    """The image that a pool or norm reads: for a gradient its result, else its operand."""
    image = e.out if e.op.endswith("_grad") else e.inputs[0]
    small = e.inputs[0] if e.op.endswith("_grad") else e.out
    n, c, h, w = image.type.shape
    out = {"N": n, "C": c, "H": h, "W": w, "OH": small.type.shape[2], "OW": small.type.shape[3]}
    a: Any = e.attrs
    if hasattr(a, "kernel"):
        (kh, kw), (sh, sw) = a.kernel, a.stride
        top, bottom, left, right = a.padding
        dh, dw = getattr(a, "dilation", (1, 1))
        out |= {
            "KH": kh, "KW": kw, "SH": sh, "SW": sw, "PT": top, "PB": bottom, "PL": left,
            "PR": right, "DH": dh, "DW": dw,
        }  # fmt: skip
    if hasattr(a, "below"):
        out |= {"LOW": a.below, "HIGH": a.above}
    return out


def _rows(e: Eqn) -> dict[str, int]:
    return dict(zip("NC", e.inputs[0].type.shape, strict=True))


def _augmented(e: Eqn) -> dict[str, int]:
    return dict(zip("NCHW", e.out.type.shape, strict=True))


def _normalised(e: Eqn) -> dict[str, int]:
    """The image that batch_norm reads, or its gradient; rows of a matrix are images of a pixel."""
    return dict(zip("NCHW", (*e.inputs[0].type.shape, 1, 1)[:4], strict=True))


_SIZES: dict[str, Callable[[Eqn], dict[str, int]]] = {
    "conv2d": _conv, "linear": _linear, "maxpool2d": _image, "avgpool2d": _image,
    "adaptive_avgpool2d": _image, "lrn": _image, "cross_entropy": _rows, "multi_margin": _rows,
    "augment": _augmented, "batch_norm": _normalised, "batch_norm_stats": _normalised,
    "batch_norm_elemt": _normalised, "batch_norm_grad_reduce": _normalised,
    "batch_norm_grad_elemt": _normalised,
}  # fmt: skip


def problem_of(anchors: Sequence[Eqn], held: int = 0) -> Problem:
    """The problem of an equation with these anchors; a loss and its gradient are one."""
    first = anchors[0]
    names = [e.op for e in anchors]
    if first.op.removesuffix("_grad") in ("cross_entropy", "multi_margin"):
        names = [first.op.removesuffix("_grad")]
    sizes: dict[str, int] = {}
    for e in anchors:
        base = e.op.removesuffix("_grad").removesuffix("_dgrad").removesuffix("_wgrad")
        own = _SIZES[base](e)
        sizes = sizes | own if "pool" in base else own | sizes  # of two, the pool's image
    op = "+".join(names)
    dtype = getattr(first.attrs, "math", None) or first.inputs[0].type.dtype.name
    shape = tuple(sizes[a] for a in Problem(op, (), dtype).axes)
    return Problem(op, shape, dtype, held)


def problem_of_region(members: Sequence[Sequence[Eqn]]) -> Problem:
    """The problem of a region, whose members have these anchors."""
    each = [problem_of(anchors) for anchors in members]
    shape = tuple(n for p in each for n in p.shape)
    return Problem(f"region:{','.join(p.op for p in each)}", shape, each[0].dtype)


ANCHORS = tuple(AXES) + ("cross_entropy_grad", "multi_margin_grad")
