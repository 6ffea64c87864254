"""Launches of pooling and of local response normalization, alone and in one kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.launch.codegen import Index, Ref
from graphnet.lowering.launch.config import cdiv, choose
from graphnet.lowering.launch.steps import Launch, arguments, make, source
from graphnet.lowering.launch.work import Work, strides


def _window(a: Any) -> dict[str, int]:
    (kh, kw), (sh, sw), (top, _, left, _) = a.kernel, a.stride, a.padding
    return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PT": top, "PL": left}


def _dilated(a: Any) -> dict[str, int]:
    """The window of a max-pool; those of a mean have no dilation."""
    return {**_window(a), "DH": a.dilation[0], "DW": a.dilation[1]}


def _pool(work: Work) -> list[Launch]:
    """All six: forward runs over the output's pixels, a gradient over the input's."""
    if len(work.anchors) == 2:
        return _pooled_norm(work)
    e, a = work.anchor, work.anchor.attrs
    backward = e.op.endswith("_grad")
    first, out = e.inputs[0].type.shape, e.out.type.shape
    (h, w), (oh, ow) = (out[2:], first[2:]) if backward else (first[2:], out[2:])
    constants: dict[str, Any] = {"N": out[0], "C": out[1], "H": h, "W": w, "OH": oh, "OW": ow}
    if e.op.startswith("max"):
        constants |= _dilated(a)
    if e.op.startswith("avg"):
        _, b, _, r = a.padding  # type: ignore[attr-defined]
        constants |= {
            **_window(a),
            "PB": b, "PR": r, "COUNT_PAD": a.count_include_pad,  # type: ignore[attr-defined]
            "DIVISOR": a.divisor_override,  # type: ignore[attr-defined]
        }  # fmt: skip
    operands = list(zip("DI" if backward else "X", e.inputs, strict=False))
    for prefix, v in operands:
        constants |= strides(prefix, work.type(v))
    c = choose(e.op, (prod(out),))
    index = e.outputs[1] if len(e.outputs) > 1 else None
    epi = work.epilogue(e.out, Index(out), also=index)
    nhwc = work.stores[0][1].type.layout.order == "nhwc"
    constants |= {"NHWC": nhwc, "BLOCK": c.BLOCK, "EPILOGUE": source(epi)}
    refs = tuple(work.ref(v) for _, v in operands)
    return [
        make(
            e.op, "pool", (*refs, arguments(epi)), constants, (cdiv(prod(out), c.BLOCK),),
            reads=tuple(r.name for r in refs), epilogues=(epi,), num_warps=c.num_warps,
        )
    ]  # fmt: skip


# ---- local response normalization ------------------------------------------------------------


def _formula(a: Any) -> dict[str, Any]:
    return {"LOW": a.below, "HIGH": a.above, "K": a.k, "A": a.scale, "BETA": a.beta}


def _image(v: Value) -> dict[str, int]:
    return dict(zip("NCHW", v.type.shape, strict=True))


def _lrn(work: Work) -> list[Launch]:
    """lrn and lrn_grad alone; with a pool behind them, see `_pooled_norm`."""
    if len(work.anchors) == 2:
        return _pooled_norm(work)
    e = work.anchor
    out = e.out.type.shape
    c = choose("lrn", (prod(out) // out[1], out[1]), e.inputs[0].type.dtype.name)
    epi = work.epilogue(e.out, Index(out))
    constants: dict[str, Any] = _image(e.out)
    for prefix, v in zip("XD", e.inputs, strict=False):
        constants |= strides(prefix, work.type(v))
    constants |= {**_formula(e.attrs), "BP": c.BM, "BC": c.BN, "EPILOGUE": source(epi)}
    refs = tuple(work.ref(v) for v in e.inputs)
    grid = (cdiv(prod(out) // out[1], c.BM),)
    return [
        make(
            e.op, "lrn", (*refs, arguments(epi)), constants, grid,
            reads=tuple(r.name for r in refs), epilogues=(epi,), num_warps=c.num_warps,
        )
    ]  # fmt: skip


def _pooled_norm(work: Work) -> list[Launch]:
    """A pool and a normalization, one after the other."""
    first, second = work.anchors
    launch = {
        "maxpool2d": _pool_then_lrn, "lrn": _lrn_then_pool,
        "lrn_grad": _backward, "maxpool2d_grad": _backward,
    }[first.op](work, first, second)  # fmt: skip
    moved = sum(v.type.bytes for v in {*work.eqn.inputs, *work.eqn.results})
    return [replace(launch, bytes=moved)]  # scratch stays in cache


def _shared(pool: Eqn, norm: Eqn, image: Value, small: Value) -> dict[str, Any]:
    """Constexprs of all four kernels; `image` is the pool's input, `small` its output."""
    oh, ow = small.type.shape[2:]
    return {**_image(image), "OH": oh, "OW": ow, **_dilated(pool.attrs), **_formula(norm.attrs)}


def _pool_then_lrn(work: Work, pool: Eqn, norm: Eqn) -> Launch:
    x, out = pool.inputs[0], norm.out.type.shape
    if pool.out not in dict(work.stores):  # inference: nobody keeps the pooled image
        name = f".pooled{work.eqn.results[0]}"
        held = Value(name, norm.out.type.with_layout(work.type(x).layout))
        work = replace(
            work, stores=(*work.stores, (pool.out, held)), name={**work.name, held: name}
        )
        scratch: tuple[tuple[str, int], ...] = ((name, held.type.bytes),)
    else:
        held, scratch = dict(work.stores)[pool.out], ()
    c = choose("lrn", (prod(out) // out[1], out[1]), x.type.dtype.name)
    first = work.epilogue(pool.out, Index(out), also=pool.outputs[1])
    second = work.epilogue(norm.out, Index(out))
    constants = {
        **_shared(pool, norm, x, pool.out), **strides("X", work.type(x)),
        **strides("P", held.type), "BP": c.BM, "BC": c.BN, "EPILOGUE": source(first),
        "EPILOGUE2": source(second),
    }  # fmt: skip
    ref = work.ref(x)
    pooled = Ref(work.name[held], held.type.dtype.name)
    return make(
        "maxpool2d_lrn", "lrn", (ref, pooled, arguments(first), arguments(second)), constants,
        (cdiv(prod(out) // out[1], c.BM),), reads=(ref.name,), epilogues=(first, second),
        scratch=scratch, num_warps=c.num_warps,
    )  # fmt: skip


def _lrn_then_pool(work: Work, norm: Eqn, pool: Eqn) -> Launch:
    x, out = norm.inputs[0], pool.out.type.shape
    c = choose("lrn", (prod(out) // out[1], out[1]), x.type.dtype.name)
    epi = work.epilogue(pool.out, Index(out), also=pool.outputs[1])
    constants = {
        **_shared(pool, norm, x, pool.out), **strides("X", work.type(x)), "BP": c.BM, "BC": c.BN,
        "ROUND": norm.out.type.dtype.name, "EPILOGUE": source(epi),
    }  # fmt: skip
    ref = work.ref(x)
    return make(
        "lrn_maxpool2d", "lrn", (ref, arguments(epi)), constants,
        (cdiv(prod(out) // out[1], c.BM),), reads=(ref.name,), epilogues=(epi,),
        num_warps=c.num_warps,
    )  # fmt: skip


def _backward(work: Work, first: Eqn, second: Eqn) -> Launch:
    norm_first = first.op == "lrn_grad"
    norm, pool = (first, second) if norm_first else (second, first)
    x, index = norm.inputs[0], pool.inputs[1]
    dy = norm.inputs[1] if norm_first else pool.inputs[0]
    out, wanted = second.out.type.shape, second.inputs[0 if norm_first else 1]
    n, channels, h, w = out
    c = choose("lrn_grad", (n * h * w, channels), x.type.dtype.name)
    constants: dict[str, Any] = _shared(pool, norm, pool.out, index)
    if norm_first:
        rows = min(c.BK, h)
        reach = (constants["KH"] - 1) * constants["DH"]
        need = (rows - 1 + reach) // constants["SH"] + 1
        tasks, held = n * cdiv(h, rows), need * constants["OW"] * channels
        constants["ROWS"] = rows
    else:
        tasks, held = cdiv(n * h * w, c.BM), c.BM * channels
    programs = min(tasks, c.SPLIT)
    for prefix, v in zip("XDI", (x, dy, index), strict=True):
        constants |= strides(prefix, work.type(v))
    middle = work.middle(first.out, wanted, Index(first.out.type.shape))
    epi = work.epilogue(second.out, Index(out))
    constants |= {
        "PROGRAMS": programs, "BP": c.BM, "BC": c.BN, "MIDDLE": source(middle),
        "EPILOGUE": source(epi),
    }  # fmt: skip
    refs = tuple(work.ref(v) for v in (x, dy, index))
    scratch = Ref(f".between{work.eqn.results[0]}", wanted.type.dtype.name)
    return make(
        f"{first.op}_{second.op}", "lrn",
        (*refs, scratch, arguments(middle), arguments(epi)), constants, (programs,),
        reads=tuple(r.name for r in refs), writes=(scratch.name,), epilogues=(middle, epi),
        scratch=((scratch.name, programs * held * wanted.type.dtype.itemsize),),
        num_warps=c.num_warps,
    )  # fmt: skip


POOLS: dict[str, Callable[[Work], list[Launch]]] = {
    **{
        f"{p}{g}": _pool
        for p in ("maxpool2d", "avgpool2d", "adaptive_avgpool2d") for g in ("", "_grad")
    },
    "lrn": _lrn, "lrn_grad": _lrn,
}  # fmt: skip
