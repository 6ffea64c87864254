"""Launches of batch normalization: sums in parts, a launch that joins them, one that uses them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from graphnet.ir.graph import Value
from graphnet.lowering.launch.codegen import Index, Ref
from graphnet.lowering.launch.config import PROCESSORS, Config, cdiv, distinct, next_power
from graphnet.lowering.launch.steps import Launch, arguments, make, source
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.lowering.launch.work import Work

CHANNELS = 64  # of a tile, where they lie innermost
JOINED = (64, 32)  # parts by channels that a joining program takes at once


class BatchNorms(Variant):
    """batch_norm and batch_norm_grad: BLOCK elements a tile, SPLIT parts of a sum at the most."""

    name = "parts"
    ops = ("batch_norm", "batch_norm_grad")

    def configs(self, problem: Problem) -> Iterator[Config]:
        first = Config(BLOCK=4096, SPLIT=4 * PROCESSORS)
        more = (
            replace(first, BLOCK=block, SPLIT=parts * PROCESSORS, num_warps=warps)
            for block in (2048, 4096, 8192)
            for parts in (2, 4, 8)
            for warps in (4, 8)
        )
        yield from distinct([first], more)

    def launch(self, work: Work, config: Config) -> list[Launch]:
        make_all = _backward if work.anchor.op == "batch_norm_grad" else _forward
        return make_all(_Parts(work, config))


class _Parts:
    """What the three launches of one equation share."""

    def __init__(self, work: Work, config: Config) -> None:
        e = work.anchor
        self.work, self.e, self.config = work, e, config
        self.attrs: Any = e.attrs
        self.x = e.inputs[1 if e.op == "batch_norm_grad" else 0]
        n, channels, h, w = (*self.x.type.shape, 1, 1)[:4]
        self.channels, self.pixels = channels, n * h * w
        innermost = work.type(self.x).strides[1] == 1
        self.bc = min(CHANNELS, next_power(channels)) if innermost else 1
        self.bp = max(1, min(config.BLOCK // self.bc, next_power(self.pixels)))
        blocks = cdiv(channels, self.bc)
        self.parts = max(1, min(cdiv(self.pixels, self.bp), config.SPLIT // blocks))
        self.image = {"C": channels, "H": h, "W": w, "PIXELS": self.pixels}
        self.tile = {"BP": self.bp, "BC": self.bc}
        self.blocks = blocks
        br, bc = JOINED
        self.join = {"BR": min(br, next_power(self.parts)), "BC": min(bc, next_power(channels))}
        self.joins = cdiv(channels, self.join["BC"])
        self.outside = dict(work.stores)

    def strides(self, prefix: str, v: Value) -> dict[str, int]:
        s = self.work.type(v).strides
        return {f"{prefix}S{d}": (*s, 0, 0)[d] for d in (0, 1, 3)}

    def result(self, k: int) -> tuple[Ref, tuple[tuple[str, int], ...]]:
        """The vector of a result, and scratch for it where nobody reads it."""
        v = self.e.outputs[k]
        outer = self.outside.get(v) if v is not None else None
        if outer is not None:
            return Ref(self.work.name[outer], outer.type.dtype.name), ()
        ref = Ref(f".vector{k}{self.work.eqn.results[0]}", "f32")
        return ref, ((ref.name, 4 * self.channels),)

    def vectors(self, values: tuple[Value, ...]) -> tuple[Ref | None, ...]:
        return tuple(self.work.ref(v) for v in values)

    def partial(self, each: int) -> tuple[Ref, tuple[tuple[str, int], ...]]:
        ref = Ref(f".parts{self.work.eqn.results[0]}", "f32")
        return ref, ((ref.name, 4 * each * self.parts * self.channels),)

    def launch(
        self, kernel: str, args: tuple, constants: dict[str, Any], grid: tuple[int, ...],
        reads: tuple, writes: tuple, **rest: Any,
    ) -> Launch:  # fmt: skip
        names = lambda refs: tuple(r.name for r in refs if r is not None)
        return make(
            kernel, "batch_norm", args, constants, grid, reads=names(reads), writes=names(writes),
            num_warps=self.config.num_warps, **rest,
        )  # fmt: skip

    def whole(self) -> tuple[int, int]:
        """The programs of a pass over all pixels."""
        return cdiv(self.pixels, self.bp), self.blocks


def _forward(s: _Parts) -> list[Launch]:
    e, a = s.e, s.attrs
    x, live = s.work.ref(s.x), s.work.ref(e.inputs[1])
    rest = s.vectors(e.inputs[2:])
    weight, bias = rest[:2] if a.affine else (None, None)
    old = rest[2 * a.affine :] if a.track else (None,) * 3
    parts, scratch = s.partial(3)
    (mean, more), (var, most) = s.result(1), s.result(2)
    track = a.track and any(v is not None for v in e.outputs[3:])
    new: tuple[Ref | None, ...] = (None,) * 3
    if track:
        made = [s.result(k) for k in (3, 4)]
        new = (*(ref for ref, _ in made), _batches(s))
        more += tuple(t for _, extra in made for t in extra)
    image = s.strides("X", s.x)
    first = s.launch(
        "statistics", (x, live, parts), {**s.image, **image, "PARTS": s.parts, **s.tile},
        (s.parts, s.blocks), (x, live), (parts,), scratch=scratch + more + most,
    )  # fmt: skip
    old = old if track else (None,) * 3
    joined = s.launch(
        "join_statistics", (x, parts, mean, var, *old, *new),
        {"C": s.channels, "XS1": image["XS1"], "PARTS": s.parts, "TRACK": track,
         "MOMENTUM": a.momentum, "CUMULATIVE": a.cumulative, **s.join},
        (s.joins,), (parts, *old), (mean, var, *new),
        bytes=4 * s.channels * (3 * s.parts + 2 + 4 * track),
    )  # fmt: skip
    # Where every program reads the number of batches, one must not count it on meanwhile.
    safe = 2 if a.cumulative else 3
    pairs = tuple(
        (o.name, n.name) for o, n in zip(old[:safe], new[:safe], strict=True)
        if o is not None and n is not None
    )  # fmt: skip
    joined = replace(joined, reads=(*joined.reads, x.name), inplace=pairs)
    y = e.out
    epi = s.work.epilogue(y, Index(y.type.shape))
    if epi is None:
        return [first, joined]
    last = s.launch(
        "batch_norm", (x, mean, var, weight, bias, arguments(epi)),
        {**s.image, **image, "EPS": a.eps, "AFFINE": a.affine, **s.tile, "EPILOGUE": source(epi)},
        s.whole(), (x, mean, var, weight, bias), (), epilogues=(epi,),
    )  # fmt: skip
    return [first, joined, last]


def _batches(s: _Parts) -> Ref | None:
    v = s.e.outputs[5]
    outer = s.outside.get(v) if v is not None else None
    return Ref(s.work.name[outer], "i64") if outer is not None else None


def _backward(s: _Parts) -> list[Launch]:
    e, a = s.e, s.attrs
    dy = e.inputs[0]
    g, x, mean, var, live = s.vectors(e.inputs[:5])
    weight = s.work.ref(e.inputs[5]) if a.affine else None
    parts, scratch = s.partial(2)
    (dweight, more), (dbias, most) = s.result(1), s.result(2)
    images = {**s.strides("D", dy), **s.strides("X", s.x)}
    first = s.launch(
        "gradient_sums", (g, x, mean, var, live, parts),
        {**s.image, **images, "EPS": a.eps, "PARTS": s.parts, **s.tile}, (s.parts, s.blocks),
        (g, x, mean, var, live), (parts,), scratch=scratch + more + most,
    )  # fmt: skip
    joined = s.launch(
        "join_sums", (parts, dweight, dbias), {"C": s.channels, "PARTS": s.parts, **s.join},
        (s.joins,), (parts,), (dweight, dbias), bytes=4 * s.channels * (2 * s.parts + 2),
    )  # fmt: skip
    dx = e.outputs[0]
    epi = s.work.epilogue(dx, Index(dx.type.shape)) if dx is not None else None
    if epi is None:
        return [first, joined]
    last = s.launch(
        "batch_norm_grad", (g, x, mean, var, live, weight, dweight, dbias, arguments(epi)),
        {**s.image, **images, "EPS": a.eps, "AFFINE": a.affine, **s.tile,
         "EPILOGUE": source(epi)},
        s.whole(), (g, x, mean, var, live, weight, dweight, dbias), (), epilogues=(epi,),
    )  # fmt: skip
    return [first, joined, last]
