"""Stages of a region's backward pass (kernels/region_grad.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import NHWC
from graphnet.lowering.launch.codegen import Index, Ref
from graphnet.lowering.launch.config import cdiv, next_power
from graphnet.lowering.launch.pool import window
from graphnet.lowering.launch.region import Body, Stage
from graphnet.lowering.launch.region_conv import not_small
from graphnet.lowering.launch.steps import Launch, arguments, make, source
from graphnet.lowering.launch.work import Work, strides
from graphnet.passes.templates import anchors_of

UNROLLED = 64  # taps times pixels of straight-line code
FILTERS = 2  # of a lane
MOST_PARTS = 16  # of a program
REDUCED = 32  # columns of a program of the second pass
AT_ONCE = 64  # parts that it loads


class PoolGrad(Stage):
    """The gradient of a max or average pool with its elementwise code."""

    def __init__(self, op: str) -> None:
        self.ops = (op,)

    def refusal(self, members: Sequence[Eqn], kept: set[Value]) -> str | None:
        a: Any = anchors_of(members[0])[0].attrs
        if a.dilation != (1, 1):
            return f"a window dilated by {a.dilation[0]} x {a.dilation[1]} has no stage"
        if len(members[0].results) > 1:
            return "the code behind the pool's gradient has several results"
        return None

    def write(self, body: Body, works: Sequence[Work]) -> None:
        (work,) = works
        e, a = work.anchor, work.anchor.attrs
        (n, c, h, w), (oh, ow) = e.out.type.shape, e.inputs[0].type.shape[2:]
        (out,) = work.eqn.results
        readers = [o for o in body.work.anchors if out in o.inputs and o.op == "conv2d_wgrad"]
        twin = bool(readers) and body.places[out].type.layout != NHWC
        operands = [body.read(v) for v in e.inputs]
        _, b, _, r = a.padding  # type: ignore[attr-defined]
        constants: dict[str, Any] = {
            "N": n, "IMAGES": body.config.BM, "C": c, "H": h, "W": w, "OH": oh, "OW": ow,
            **window(a, dilated=False), "PB": b, "PR": r,
            "COUNT_PAD": getattr(a, "count_include_pad", True),
            "DIVISOR": getattr(a, "divisor_override", 0), **strides("D", work.type(e.inputs[0])),
            **strides("I", work.type(e.inputs[-1])), "MAX": e.op.startswith("max"), "TWIN": twin,
            "BLOCK": body.config.BLOCK,
            "EPILOGUE": body.epilogue(work, {e.out: "acc"}, Index(e.out.type.shape), out),
        }  # fmt: skip
        last = body.twin(out) if twin else "None"
        body.call("pool_grad", [*(operands * 2)[:2], last], constants)
        body.notes.append(work.note)


class WeightGrad(Stage):
    """The parts of a weight gradient; their sum, with the update, is a launch behind the region."""

    ops = ("conv2d_wgrad",)
    second_pass = ("parts_reduce",)

    def refusal(self, members: Sequence[Eqn], kept: set[Value]) -> str | None:
        e = anchors_of(members[0])[0]
        if e.outputs[0] is None:
            return "the bias gradient alone has no stage"
        channels = max(v.type.shape[1] for v in e.inputs)
        return not_small(e, channels)

    def write(self, body: Body, works: Sequence[Work]) -> None:
        (work,) = works
        e, a = work.anchor, work.anchor.attrs
        x, dy = e.inputs
        (n, c, h, w), (k, oh, ow) = x.type.shape, dy.type.shape[1:]
        dw, db = e.outputs
        assert dw is not None
        r, s = dw.type.shape[2:]
        images, block = body.config.BM, body.config.BLOCK
        held = body.twins.get(dy, body.places[dy])
        kb = min(FILTERS, next_power(k))
        columns = cdiv(k, kb) * c * r
        parts = max(1, min(block // columns, images * oh, MOST_PARTS))
        programs, width = cdiv(n, images), r * s * c + (db is not None)
        name = body.own(f"parts.{dw.name}")
        operands = [body.read(x), body.read_twin(dy)]
        operands.append(body.extra(name, "f32", 4 * programs * parts * k * width))
        constants = {
            "N": n, "IMAGES": images, "C": c, "H": h, "W": w, "K": k, "OH": oh, "OW": ow,
            "R": r, "S": s, "SH": a.stride[0], "SW": a.stride[1],  # type: ignore[attr-defined]
            "PT": a.padding[0], "PL": a.padding[2],  # type: ignore[attr-defined]
            "DH": a.dilation[0], "DW": a.dilation[1],  # type: ignore[attr-defined]
            **strides("X", work.type(x)), **strides("D", held.type), "HAS_BIAS": db is not None,
            "KB": kb, "QW": _even(ow, max(1, UNROLLED // s)), "PARTS": parts, "BLOCK": block,
        }  # fmt: skip
        body.call("wgrad", operands, constants)
        body.after.append(_sum(work, Ref(name, "f32"), programs * parts, dw, db))
        body.notes.append(work.note)


def _even(pixels: int, most: int) -> int:
    """The width of equal runs of a row, at most `most` wide."""
    return cdiv(pixels, cdiv(pixels, most))


def _sum(work: Work, parts: Ref, count: int, dw: Value, db: Value | None) -> Launch:
    """The ordered second pass of a weight gradient, with its update."""
    k, c, r, s = dw.type.shape
    epi = work.epilogue(dw, Index(dw.type.shape))
    epi2 = work.epilogue(db, Index(db.type.shape), widen=True) if db is not None else None
    constants = {
        "SPLIT": count, "K": k, "CG": c, "R": r, "S": s, "HAS_BIAS": db is not None,
        "ROWS": min(AT_ONCE, next_power(count)), "BLOCK": REDUCED, "EPILOGUE": source(epi),
        "EPILOGUE2": source(epi2),
    }  # fmt: skip
    return make(
        "parts_reduce", "reduce", (parts, arguments(epi), arguments(epi2)), constants,
        (cdiv(k * (r * s * c + (db is not None)), REDUCED),), reads=(parts.name,),
        epilogues=(epi, epi2),
    )  # fmt: skip


STAGES: tuple[Stage, ...] = (
    PoolGrad("maxpool2d_grad"),
    PoolGrad("avgpool2d_grad"),
    WeightGrad(),
)
