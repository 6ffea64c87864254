"""Launches of local response normalization, alone and in one kernel with a pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product as combinations
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.launch.codegen import Index, Ref
from graphnet.lowering.launch.config import PROCESSORS, Config, cdiv, distinct, next_power, tile
from graphnet.lowering.launch.pool import window
from graphnet.lowering.launch.steps import Launch, arguments, make, source
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.lowering.launch.work import Work, strides


def formula(a: Any) -> dict[str, Any]:
    return {"LOW": a.below, "HIGH": a.above, "K": a.k, "A": a.scale, "BETA": a.beta}


def grouped(e: Eqn) -> dict[str, Any]:
    """The formula of a normalization, and how many channels each of its groups has."""
    a: Any = e.attrs
    return {**formula(a), "PER": e.out.type.shape[1] // a.groups}


def image(v: Value) -> dict[str, int]:
    return dict(zip("NCHW", v.type.shape, strict=True))


class Norms(Variant):
    """What the norm kernels share: tiles of BM pixels by all channels."""

    name = "pixels"

    def configs(self, problem: Problem) -> Iterator[Config]:
        s = problem.sizes
        bn = next_power(s["C"])
        elements = 1024 if problem.dtype == "bf16" else 512  # 16 bytes a thread
        bm = tile(s["N"] * s["H"] * s["W"], max(1, elements // bn), least=1)
        first = Config(bm, bn, BK=8, SPLIT=4 * PROCESSORS)
        more = (
            replace(first, BM=bm, BK=bk, SPLIT=parts * PROCESSORS, num_warps=warps)
            for bm, bk, parts, warps in combinations(
                (1, 2, 4, 8, 16), (4, 8, 16), (2, 4, 8), (4, 8)
            )
            if bm * bn <= 4096
        )
        yield from distinct([first], more)


class Norm(Norms):
    """lrn and lrn_grad alone."""

    ops = ("lrn", "lrn_grad")

    def launch(self, work: Work, config: Config) -> list[Launch]:
        e, c = work.anchor, config
        n, channels, h, w = e.out.type.shape
        epi = work.epilogue(e.out, Index(e.out.type.shape))
        constants: dict[str, Any] = image(e.out)
        for prefix, v in zip("XD", e.inputs, strict=False):
            constants |= strides(prefix, work.type(v))
        constants |= {**grouped(e), "BP": c.BM, "BC": c.BN, "EPILOGUE": source(epi)}
        refs = tuple(work.ref(v) for v in e.inputs)
        return [
            make(
                e.op, "lrn", (*refs, arguments(epi)), constants, (cdiv(n * h * w, c.BM),),
                reads=tuple(r.name for r in refs), epilogues=(epi,), num_warps=c.num_warps,
            )
        ]  # fmt: skip


class PooledNorm(Norms):
    """A pool and a normalization, one after the other, in one kernel."""

    ops = (
        "maxpool2d+lrn", "lrn+maxpool2d", "lrn_grad+maxpool2d_grad", "maxpool2d_grad+lrn_grad",
    )  # fmt: skip

    def launch(self, work: Work, config: Config) -> list[Launch]:
        first, second = work.anchors
        build = {"maxpool2d": _pool_then_lrn, "lrn": _lrn_then_pool}.get(first.op, _backward)
        return [replace(build(work, first, second, config), bytes=work.moved)]


def shared(pool: Eqn, norm: Eqn, large: Value, small: Value) -> dict[str, Any]:
    """Constexprs of all four kernels; `large` is the pool's input, `small` its output."""
    oh, ow = small.type.shape[2:]
    return {**image(large), "OH": oh, "OW": ow, **window(pool.attrs), **grouped(norm)}


def _pool_then_lrn(work: Work, pool: Eqn, norm: Eqn, c: Config) -> Launch:
    x, out = pool.inputs[0], norm.out.type.shape
    # In inference no other kernel stores the pooled image.
    work, held, scratch = work.keeping(pool.out, work.type(x).layout)
    first = work.epilogue(pool.out, Index(out), also=pool.outputs[1])
    second = work.epilogue(norm.out, Index(out))
    constants = {
        **shared(pool, norm, x, pool.out), **strides("X", work.type(x)),
        **strides("P", held.type), "BP": c.BM, "BC": c.BN, "EPILOGUE": source(first),
        "EPILOGUE2": source(second),
    }  # fmt: skip
    ref = work.ref(x)
    pooled = Ref(work.name[held], held.type.dtype.name)
    n, _, oh, ow = out
    return make(
        "maxpool2d_lrn", "lrn", (ref, pooled, arguments(first), arguments(second)), constants,
        (cdiv(n * oh * ow, c.BM),), reads=(ref.name,), epilogues=(first, second),
        scratch=scratch, num_warps=c.num_warps,
    )  # fmt: skip


def _lrn_then_pool(work: Work, norm: Eqn, pool: Eqn, c: Config) -> Launch:
    x, out = norm.inputs[0], pool.out.type.shape
    epi = work.epilogue(pool.out, Index(out), also=pool.outputs[1])
    constants = {
        **shared(pool, norm, x, pool.out), **strides("X", work.type(x)), "BP": c.BM, "BC": c.BN,
        "ROUND": norm.out.type.dtype.name, "EPILOGUE": source(epi),
    }  # fmt: skip
    ref = work.ref(x)
    n, _, oh, ow = out
    return make(
        "lrn_maxpool2d", "lrn", (ref, arguments(epi)), constants, (cdiv(n * oh * ow, c.BM),),
        reads=(ref.name,), epilogues=(epi,), num_warps=c.num_warps,
    )  # fmt: skip


def _backward(work: Work, first: Eqn, second: Eqn, c: Config) -> Launch:
    norm_first = first.op == "lrn_grad"
    norm, pool = (first, second) if norm_first else (second, first)
    x, index = norm.inputs[0], pool.inputs[1]
    dy = norm.inputs[1] if norm_first else pool.inputs[0]
    out, wanted = second.out.type.shape, second.inputs[0 if norm_first else 1]
    n, channels, h, w = out
    constants: dict[str, Any] = shared(pool, norm, pool.out, index)
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
