"""Normalization and pools of channels-last images, 8 channels a thread (kernels/chunks.py).

The backward pass of a pool and a normalization is two launches, with a workspace between them.
Where the pool came first, that is as large as the pooled image, and the second launch reads it
while it is in the second-level cache: on an H100 15 % faster than the best single kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import gcd, prod
from typing import Any

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.types import HWCN, NHWC, Layout
from graphnet.lowering.launch.codegen import Index, Ref
from graphnet.lowering.launch.config import Config, cdiv, next_power
from graphnet.lowering.launch.norm import formula, image
from graphnet.lowering.launch.pool import window
from graphnet.lowering.launch.steps import Launch, arguments, make, source
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.lowering.launch.work import Work
from graphnet.passes.templates import anchors_of

CHUNK = 8  # channels
IMAGES = 8  # whose fp32 values side by side fill a sector of 32 bytes
GROUP = 4  # chunks of one image beside them: 128 bytes of fp32
REACH = 4  # of a normalization's window to either side: a halo is half a chunk
WINDOWS = 4  # of a pool that a thread holds for its block of pixels, as tiles of values and places
PIXELS = 9  # of that block
CACHE = 50 << 20  # bytes of an H100's second level; what a kernel leaves there costs no traffic
Layouts = Mapping[Value, Layout]


def _power(n: int) -> int:
    """A halo of n channels as it is loaded: a power of two, or nothing."""
    return next_power(n) if n else 0


def not_in_chunks(layouts: Layouts, *values: Value) -> str | None:
    """Why images do not lie in chunks of 8 channels; None where they do."""
    for v in values:
        if layouts[v] != NHWC:
            return (
                f"{v} is {_named(layouts[v])}, a thread holds 8 channels of a channels-last image"
            )
    channels = values[0].type.shape[1]
    if channels % CHUNK:
        return f"{channels} channels are no multiple of {CHUNK}"
    return None


def not_row_major(layouts: Layouts, *values: Value) -> str | None:
    """Why values do not lie row-major; None where they do."""
    for v in values:
        if not layouts[v].is_default:
            return f"{v} is {_named(layouts[v])}, not row-major"
    return None


def _named(layout: Layout) -> str:
    if layout == NHWC:
        return "channels-last"
    return "row-major" if layout.is_default else f"stored as {layout}"


def blocks(pool: Eqn) -> tuple[int, int]:
    """Rows and columns of blocks, one stride's pixels each, that cover a max-pool's image."""
    a: Any = pool.attrs
    h, w = pool.out.type.shape[2:]
    return cdiv(h + a.padding[0], a.stride[0]), cdiv(w + a.padding[2], a.stride[1])


def _near(norm: Eqn) -> str | None:
    a: Any = norm.attrs
    if a.groups > 1:
        return f"the windows end at the borders of {a.groups} groups of channels"
    if max(a.below, a.above) > REACH:
        return f"the window of {a.size} channels reaches further than {REACH} to one side"
    return None


def beyond_blocks(pool: Eqn) -> str | None:
    """Why the gradient of these windows is not gathered by blocks of pixels."""
    a: Any = pool.attrs
    (kh, kw), (sh, sw) = a.kernel, a.stride
    if a.dilation != (1, 1):
        return f"windows dilated by {a.dilation[0]} x {a.dilation[1]} leave pixels out"
    windows, pixels = cdiv(kh, sh) * cdiv(kw, sw), sh * sw
    if windows > WINDOWS or pixels > PIXELS:
        return (
            f"windows of {kh} x {kw} at stride {sh} x {sw}: {windows} of them reach a block of"
            f" {pixels} pixels, a thread holds at most {WINDOWS} and {PIXELS}"
        )
    return None


def results(eqn: Eqn, layouts: Layouts) -> dict[Value, Layout]:
    """What the equation writes, with the layouts outside."""
    return {v: layouts.get(v, v.type.layout) for v in eqn.results}


def _configs() -> Iterator[Config]:
    for block, warps in ((128, 4), (256, 8), (64, 2)):
        yield Config(BLOCK=block, num_warps=warps)


def grouped(work: Work, channels: int) -> dict[str, int]:
    """How many images and chunks of a pixel neighbouring threads hold: one image's chunks, unless a
    result lies with its images innermost."""
    if all(o.type.layout.order != "hwcn" for _, o in work.stores):
        return {"IMAGES": 1, "GROUP": 1}
    return {"IMAGES": IMAGES, "GROUP": gcd(channels // CHUNK, GROUP)}


def writes_turned(eqn: Eqn, layout: Layout) -> bool:
    """Whether whole runs go to a copy with the images innermost, and loads are whole runs, too."""
    channels = anchors_of(eqn)[-1].out.type.shape[1]
    return layout == HWCN and channels % (CHUNK * GROUP) == 0


def flat(work: Work) -> bool:
    """Whether one number counts the storage of all that the code around the anchors touches."""
    read = {v for e in work.rest for v in e.inputs if v in work.name}
    types = [work.type(v) for v in read] + [o.type for _, o in work.stores]
    alike = all(t.layout == NHWC for t in types if len(t.shape) == 4)
    return alike and not any(e.op == "dropout" for e in work.rest)


# ---- one launch ------------------------------------------------------------------------------


def lrn(work: Work, e: Eqn, config: Config, dy: Ref | None = None) -> Launch:
    """lrn or lrn_grad over the storage of its image. `dy` stands for the operand."""
    a: Any = e.attrs
    out = e.out.type.shape
    constants: dict[str, Any] = {**image(e.out), **formula(a)}
    if e.op == "lrn":
        constants |= {"BELOW": _power(a.below), "ABOVE": _power(a.above)}
    else:
        reach = a.below + a.above
        constants |= {"XW": _power(reach), "DLOW": _power(a.above), "DHIGH": _power(a.below)}
    alike = flat(work)
    epi = work.epilogue(e.out, Index(out, alike))
    constants |= {"BLOCK": config.BLOCK, "FLAT": alike, "EPILOGUE": source(epi)}
    x, *above = e.inputs
    refs = (work.ref(x), *(dy or work.ref(v) for v in above))
    return make(
        f"{e.op}_chunks", "chunks", (*refs, arguments(epi)), constants,
        (cdiv(prod(out), CHUNK * config.BLOCK),), reads=tuple(r.name for r in refs),
        epilogues=(epi,), num_warps=config.num_warps,
    )  # fmt: skip


def pool(work: Work, e: Eqn, config: Config) -> Launch:
    """maxpool2d over the storage of the pooled image."""
    out = e.out.type.shape
    alike = flat(work)
    epi = work.epilogue(e.out, Index(out, alike), also=e.outputs[1])
    constants = {
        **image(e.inputs[0]), "OH": out[2], "OW": out[3], **window(e.attrs),
        "BLOCK": config.BLOCK, "FLAT": alike, "EPILOGUE": source(epi),
    }  # fmt: skip
    ref = work.ref(e.inputs[0])
    return make(
        "maxpool2d_chunks", "chunks", (ref, arguments(epi)), constants,
        (cdiv(prod(out), CHUNK * config.BLOCK),), reads=(ref.name,), epilogues=(epi,),
        num_warps=config.num_warps,
    )  # fmt: skip


def pool_grad(work: Work, e: Eqn, config: Config, dy: Ref | None = None) -> Launch:
    """maxpool2d_grad, a block of one stride's pixels by 8 channels a thread. `dy` stands for the
    operand."""
    n, c, _, _ = e.out.type.shape
    oh, ow = e.inputs[1].type.shape[2:]
    alike, side = flat(work), grouped(work, c)
    images = side["IMAGES"] * cdiv(n, side["IMAGES"])
    epi = work.epilogue(e.out, Index(e.out.type.shape, alike))
    constants = {
        **image(e.out), "OH": oh, "OW": ow, **window(e.attrs, dilated=False), **side,
        "BLOCK": config.BLOCK, "FLAT": alike, "EPILOGUE": source(epi),
    }  # fmt: skip
    refs = (dy or work.ref(e.inputs[0]), work.ref(e.inputs[1]))
    return make(
        "maxpool2d_grad_chunks", "chunks", (*refs, arguments(epi)), constants,
        (cdiv(images * prod(blocks(e)) * (c // CHUNK), config.BLOCK),),
        reads=tuple(r.name for r in refs), epilogues=(epi,), num_warps=config.num_warps,
    )  # fmt: skip


# ---- variants --------------------------------------------------------------------------------


class Chunks(Variant):
    """One anchor: each thread holds 8 channels."""

    name = "chunks"
    ops = ("lrn", "lrn_grad", "maxpool2d", "maxpool2d_grad")

    def accepts(self, eqn: Eqn, layouts: Layouts, dtype: str, arch: int) -> str | None:
        (e,) = anchors_of(eqn)
        if why := not_in_chunks(layouts, *e.inputs):
            return why
        if e.op.startswith("lrn"):
            return _near(e)
        if e.op == "maxpool2d_grad":
            return beyond_blocks(e)
        written = results(eqn, layouts)
        return not_in_chunks(written, *written)

    def writes(self, eqn: Eqn, layout: Layout) -> bool:
        return anchors_of(eqn)[0].op == "maxpool2d_grad" and writes_turned(eqn, layout)

    def configs(self, problem: Problem) -> Iterator[Config]:
        yield from _configs()

    def launch(self, work: Work, config: Config) -> list[Launch]:
        e = work.anchor
        write = pool if e.op == "maxpool2d" else pool_grad if e.op == "maxpool2d_grad" else lrn
        return [write(work, e, config)]


class PoolThenNorm(Variant):
    """lrn(maxpool2d(x)) in one kernel; a program holds whole pixels."""

    name = "chunks"
    ops = ("maxpool2d+lrn",)

    def accepts(self, eqn: Eqn, layouts: Layouts, dtype: str, arch: int) -> str | None:
        pool, norm = anchors_of(eqn)
        assert eqn.body is not None
        images = [pool.inputs[0], *(v for v in (pool.out,) if v in eqn.body.returns)]
        return not_in_chunks(layouts, *images) or _near(norm)

    def writes(self, eqn: Eqn, layout: Layout) -> bool:
        return writes_turned(eqn, layout)

    def configs(self, problem: Problem) -> Iterator[Config]:
        yield from _configs()

    def launch(self, work: Work, config: Config) -> list[Launch]:
        pool, norm = work.anchors
        a: Any = norm.attrs
        x, (n, c, oh, ow) = pool.inputs[0], norm.out.type.shape
        work, held, scratch = work.keeping(pool.out, NHWC)
        side = grouped(work, c)
        images = side["IMAGES"]
        block = max(config.BLOCK, next_power(images * (c // CHUNK)))
        tile = block // (c // CHUNK) // images * images
        index = Index(norm.out.type.shape, flat(work))
        first = work.epilogue(pool.out, index, also=pool.outputs[1])
        second = work.epilogue(norm.out, index)
        constants = {
            **image(x), "OH": oh, "OW": ow, **window(pool.attrs), **formula(a),
            "BELOW": _power(a.below), "ABOVE": _power(a.above), "TILE": tile, **side,
            "BLOCK": block, "FLAT": index.flat, "EPILOGUE": source(first),
            "EPILOGUE2": source(second),
        }  # fmt: skip
        refs = work.ref(x), Ref(work.name[held], held.type.dtype.name)
        return [
            make(
                "maxpool2d_lrn_chunks", "chunks", (*refs, arguments(first), arguments(second)),
                constants, (cdiv(images * cdiv(n, images) * oh * ow, tile),), reads=(refs[0].name,),
                epilogues=(first, second), scratch=scratch, bytes=work.moved,
                num_warps=max(config.num_warps, block // 32),
            )
        ]  # fmt: skip


class TwoPass(Variant):
    """The gradients of a pool and a normalization, in either order: a launch each. What lies
    between them, elementwise code included, is the first one's epilogue."""

    name = "two_pass"
    ops = ("lrn_grad+maxpool2d_grad", "maxpool2d_grad+lrn_grad")

    def accepts(self, eqn: Eqn, layouts: Layouts, dtype: str, arch: int) -> str | None:
        assert eqn.body is not None
        made = eqn.body.producers
        norm, pool = sorted(anchors_of(eqn), key=lambda e: e.op)
        images = [v for v in (*norm.inputs, *pool.inputs) if v not in made]
        return not_in_chunks(layouts, *images) or _near(norm) or beyond_blocks(pool)

    def writes(self, eqn: Eqn, layout: Layout) -> bool:
        return anchors_of(eqn)[-1].op == "maxpool2d_grad" and writes_turned(eqn, layout)

    def configs(self, problem: Problem) -> Iterator[Config]:
        yield from _configs()

    def launch(self, work: Work, config: Config) -> list[Launch]:
        first, second = work.anchors
        wanted = second.inputs[1 if second.op == "lrn_grad" else 0]
        work, held, scratch = work.keeping(wanted, NHWC)
        write = {"lrn_grad": lrn, "maxpool2d_grad": pool_grad}
        steps = [
            replace(write[first.op](work, first, config), scratch=scratch),
            write[second.op](work, second, config, work.ref(held)),
        ]
        sizes = {work.name[v]: v.type.bytes for v in (*work.eqn.inputs, *work.eqn.results)}
        sizes[held.name] = held.type.bytes if held.type.bytes > CACHE else 0
        return [replace(s, bytes=sum(sizes[b] for b in {*s.reads, *s.writes})) for s in steps]
