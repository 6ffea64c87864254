"""Launches of batch normalization: sums in parts, a launch that joins them, one that uses them.

The parts of the statistics may have been kept by a convolution's kernel (moments.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from graphnet.ir.graph import Value
from graphnet.lowering.launch.codegen import Index, Ref
from graphnet.lowering.launch.config import PROCESSORS, Config, cdiv, distinct, next_power
from graphnet.lowering.launch.moments import size
from graphnet.lowering.launch.steps import Launch, arguments, make, source
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.lowering.launch.work import Work

CHANNELS = 64  # of a tile, where they lie innermost
JOINED = (64, 32)  # parts by channels that a joining program takes at once
MOST_PARTS = 1024  # that few programs join; more become FEWER first
FEWER = 128


class BatchNorms(Variant):
    """batch_norm and batch_norm_grad: BLOCK elements a tile, SPLIT parts of a sum at the most."""

    name = "parts"
    ops: tuple[str, ...] = ("batch_norm", "batch_norm_grad")

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
        return make_all(Parts(work, config))


class Parts:
    """What the launches of one equation share. A gradient has its image as its second operand."""

    def __init__(self, work: Work, config: Config) -> None:
        e = work.anchor
        self.work, self.e, self.config = work, e, config
        self.attrs: Any = e.attrs
        self.x = e.inputs[1 if e.op.startswith("batch_norm_grad") else 0]
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
        self.join, self.joins = self.joining(self.parts)
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

    def joining(self, parts: int) -> tuple[dict[str, int], int]:
        """(tile of a program that joins so many parts, programs for all channels)."""
        br, bc = JOINED
        tile = {"BR": min(br, next_power(parts)), "BC": min(bc, next_power(self.channels))}
        return tile, cdiv(self.channels, tile["BC"])

    def partial(self, each: int) -> tuple[Ref, tuple[tuple[str, int], ...]]:
        ref = Ref(f".parts{self.work.eqn.results[0]}", "f32")
        return ref, ((ref.name, 4 * each * self.parts * self.channels),)

    def launch(
        self, kernel: str, args: tuple, constants: dict[str, Any], grid: tuple[int, ...],
        reads: tuple, writes: tuple, module: str = "batch_norm", **rest: Any,
    ) -> Launch:  # fmt: skip
        names = lambda refs: tuple(r.name for r in refs if r is not None)
        return make(
            kernel, module, args, constants, grid, reads=names(reads), writes=names(writes),
            num_warps=self.config.num_warps, **rest,
        )  # fmt: skip

    def whole(self) -> tuple[int, int]:
        """The programs of a pass over all pixels."""
        return cdiv(self.pixels, self.bp), self.blocks


def _forward(s: Parts) -> list[Launch]:
    e, a = s.e, s.attrs
    x, live = s.work.ref(s.x), s.work.ref(e.inputs[1])
    rest = s.vectors(e.inputs[2:])
    weight, bias = rest[:2] if a.affine else (None, None)
    old = rest[2 * a.affine :] if a.track else (None,) * 3
    (mean, more), (var, most) = s.result(1), s.result(2)
    track = a.track and any(v is not None for v in e.outputs[3:])
    new: tuple[Ref | None, ...] = (None,) * 3
    if track:
        made = [s.result(k) for k in (3, 4)]
        new = (*(ref for ref, _ in made), _batches(s))
        more += tuple(t for _, extra in made for t in extra)
    old = old if track else (None,) * 3
    vectors = mean, var, *old, *new
    how = {"TRACK": track, "MOMENTUM": a.momentum, "CUMULATIVE": a.cumulative}
    costs: dict[str, Any] = {"scratch": more + most, "bytes": 4 * s.channels * (2 + 4 * track)}
    if s.work.kept is not None:
        steps, parts, count = _few(s, *s.work.kept)
        tile, programs = s.joining(count)
        costs["bytes"] += size(count, s.channels)
        joined = s.launch(
            "join_moments", (parts, *vectors), {"C": s.channels, "PARTS": count, **how, **tile},
            (programs,), (parts, *old), (mean, var, *new), **costs,
        )  # fmt: skip
    else:
        parts, scratch = s.partial(3)
        steps = [statistics(s, x, live, parts, scratch)]
        costs["bytes"] += 12 * s.channels * s.parts
        constants = {
            "C": s.channels, "XS1": s.strides("X", s.x)["XS1"], "PARTS": s.parts, **how, **s.join
        }  # fmt: skip
        joined = s.launch(
            "join_statistics", (x, parts, *vectors), constants, (s.joins,), (parts, x, *old),
            (mean, var, *new), **costs,
        )  # fmt: skip
    # Where every program reads the number of batches, one must not count it on meanwhile.
    safe = 2 if a.cumulative else 3
    pairs = tuple(
        (o.name, n.name) for o, n in zip(old[:safe], new[:safe], strict=True)
        if o is not None and n is not None
    )  # fmt: skip
    joined = replace(joined, inplace=pairs)
    return [*steps, joined, *normalised(s, (x, mean, var, weight, bias))]


def _few(s: Parts, work: Ref, parts: int) -> tuple[list[Launch], Ref, int]:
    """(launches, workspace, parts): moments in no more parts than few programs join."""
    if parts <= MOST_PARTS:
        return [], work, parts
    each = cdiv(parts, FEWER)
    count = cdiv(parts, each)
    tile, programs = s.joining(each)
    fewer = Ref(f".fewer{s.work.eqn.results[0]}", "f32")
    bytes = size(count, s.channels)
    constants = {"C": s.channels, "PARTS": parts, "COUNT": each, "FEWER": count, **tile}
    step = s.launch(
        "join_parts", (work, fewer), constants, (count, programs), (work,), (fewer,),
        scratch=((fewer.name, bytes),), bytes=size(parts, s.channels) + bytes,
    )  # fmt: skip
    return [step], fewer, count


def statistics(
    s: Parts, x: Ref | None, live: Ref | None, parts: Ref, scratch: tuple[tuple[str, int], ...]
) -> Launch:
    """The parts of the statistics of an image."""
    return s.launch(
        "statistics", (x, live, parts),
        {**s.image, **s.strides("X", s.x), "PARTS": s.parts, **s.tile}, (s.parts, s.blocks),
        (x, live), (parts,), scratch=scratch,
    )  # fmt: skip


def normalised(s: Parts, operands: tuple[Ref | None, ...]) -> list[Launch]:
    """The pass over an image that normalizes it, from x, mean, var, weight and bias; none where
    nobody reads the result."""
    y = s.e.out
    epi = s.work.epilogue(y, Index(y.type.shape))
    if epi is None:
        return []
    constants = {
        **s.image, **s.strides("X", s.x), "EPS": s.attrs.eps, "AFFINE": s.attrs.affine, **s.tile,
        "EPILOGUE": source(epi),
    }  # fmt: skip
    args = (*operands, arguments(epi))
    return [s.launch("batch_norm", args, constants, s.whole(), operands, (), epilogues=(epi,))]


def _batches(s: Parts) -> Ref | None:
    v = s.e.outputs[5]
    outer = s.outside.get(v) if v is not None else None
    return Ref(s.work.name[outer], "i64") if outer is not None else None


def _backward(s: Parts) -> list[Launch]:
    e = s.e
    g, x, mean, var, live = s.vectors(e.inputs[:5])
    weight = s.work.ref(e.inputs[5]) if s.attrs.affine else None
    first, joined, dweight, dbias = sums(s, 1)
    dx = e.outputs[0]
    if dx is None:
        return [first, joined]
    return [first, joined, *shifted(s, dx, (g, x, mean, var, live, None, weight, dweight, dbias))]


def sums(s: Parts, at: int) -> tuple[Launch, Launch, Ref, Ref]:
    """(the parts of the sums of dy xhat and of dy, their sums, and where those are): results `at`
    and `at` + 1 of an equation of dy, x, mean, var and live."""
    g, x, mean, var, live = s.vectors(s.e.inputs[:5])
    parts, scratch = s.partial(2)
    (dweight, more), (dbias, most) = s.result(at), s.result(at + 1)
    first = s.launch(
        "gradient_sums", (g, x, mean, var, live, parts),
        {**s.image, **_images(s), "EPS": s.attrs.eps, "PARTS": s.parts, **s.tile},
        (s.parts, s.blocks), (g, x, mean, var, live), (parts,), scratch=scratch,
    )  # fmt: skip
    joined = s.launch(
        "join_sums", (parts, dweight, dbias), {"C": s.channels, "PARTS": s.parts, **s.join},
        (s.joins,), (parts,), (dweight, dbias), bytes=4 * s.channels * (2 * s.parts + 2),
        scratch=more + most,
    )  # fmt: skip
    return first, joined, dweight, dbias


def shifted(s: Parts, dx: Value, operands: tuple[Ref | None, ...]) -> list[Launch]:
    """The pass over an image that makes its gradient, from dy, x, mean, var, live, the rows that
    the mean is over if not these, weight, dweight and dbias; none where nobody reads it."""
    epi = s.work.epilogue(dx, Index(dx.type.shape))
    if epi is None:
        return []
    constants = {
        **s.image, **_images(s), "EPS": s.attrs.eps, "AFFINE": s.attrs.affine, **s.tile,
        "EPILOGUE": source(epi),
    }  # fmt: skip
    args = (*operands, arguments(epi))
    return [s.launch("batch_norm_grad", args, constants, s.whole(), operands, (), epilogues=(epi,))]


def _images(s: Parts) -> dict[str, int]:
    return {**s.strides("D", s.e.inputs[0]), **s.strides("X", s.x)}
