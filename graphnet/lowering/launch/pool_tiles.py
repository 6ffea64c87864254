"""Max-pools whose image is channels-last and whose pooled side is row-major, as a flatten has it
(kernels/pool_tiles.py)."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from graphnet.ir.graph import Eqn
from graphnet.lowering.launch.chunks import (
    Layouts,
    beyond_blocks,
    blocks,
    not_in_chunks,
    not_row_major,
    results,
)
from graphnet.lowering.launch.codegen import Index
from graphnet.lowering.launch.config import Config, cdiv, next_power
from graphnet.lowering.launch.norm import image
from graphnet.lowering.launch.pool import window
from graphnet.lowering.launch.steps import Launch, arguments, make, source
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.lowering.launch.work import Work
from graphnet.passes.templates import anchors_of

PIXELS = 128  # of a pooled image that a program of the gradient holds


class PoolTiles(Variant):
    """Forward: BM pixels by BN channels a program."""

    name = "tiles"
    ops: tuple[str, ...] = ("maxpool2d",)

    def accepts(self, eqn: Eqn, layouts: Layouts, dtype: str, arch: int) -> str | None:
        (e,) = anchors_of(eqn)
        written = results(eqn, layouts)
        images = [v for v in written if v.type.dtype.is_float]
        return not_in_chunks(layouts, e.inputs[0]) or not_row_major(written, *images)

    def configs(self, problem: Problem) -> Iterator[Config]:
        for channels, warps in ((64, 8), (32, 8), (32, 4), (16, 2)):
            yield Config(BM=64, BN=channels, num_warps=warps)

    def launch(self, work: Work, config: Config) -> list[Launch]:
        e = work.anchor
        n, c, oh, ow = e.out.type.shape
        bm = min(config.BM, max(16, next_power(oh * ow)))
        bn = min(config.BN, next_power(c))
        epi = work.epilogue(e.out, Index(e.out.type.shape), also=e.outputs[1])
        constants = {
            **image(e.inputs[0]), "OH": oh, "OW": ow, **window(e.attrs), "BM": bm,
            "BN": bn, "EPILOGUE": source(epi),
        }  # fmt: skip
        ref = work.ref(e.inputs[0])
        return [
            make(
                "maxpool2d_tiles", "pool_tiles", (ref, arguments(epi)), constants,
                (n * cdiv(c, bn), cdiv(oh * ow, bm)), reads=(ref.name,),
                epilogues=(epi,), num_warps=config.num_warps,
            )
        ]  # fmt: skip


class PoolGradTiles(Variant):
    """Backward: all pixels by BN channels of an image a program."""

    name = "tiles"
    ops: tuple[str, ...] = ("maxpool2d_grad",)

    def accepts(self, eqn: Eqn, layouts: Layouts, dtype: str, arch: int) -> str | None:
        (e,) = anchors_of(eqn)
        dy, index = e.inputs
        why = not_row_major(layouts, dy) or not_in_chunks(layouts, index) or beyond_blocks(e)
        if why:
            return why
        pixels = _held(e)
        if pixels > PIXELS:
            return f"a program holds an image of at most {PIXELS} pooled pixels, here {pixels}"
        return None

    def configs(self, problem: Problem) -> Iterator[Config]:
        for channels, warps in ((16, 4), (32, 4), (64, 8)):
            yield Config(BN=channels, num_warps=warps)

    def launch(self, work: Work, config: Config) -> list[Launch]:
        e = work.anchor
        n, c, _, _ = e.out.type.shape
        oh, ow = e.inputs[0].type.shape[2:]
        bn = min(config.BN, next_power(c))
        epi = work.epilogue(e.out, Index(e.out.type.shape))
        constants = {
            **image(e.out), "OH": oh, "OW": ow, **window(e.attrs, dilated=False),
            "BM": max(16, next_power(_held(e))), "BN": bn, "EPILOGUE": source(epi),
        }  # fmt: skip
        refs = tuple(work.ref(v) for v in e.inputs)
        return [
            make(
                "maxpool2d_grad_tiles", "pool_tiles", (*refs, arguments(epi)), constants,
                (n * cdiv(c, bn),), reads=tuple(r.name for r in refs), epilogues=(epi,),
                num_warps=config.num_warps,
            )
        ]  # fmt: skip


def _held(e: Eqn) -> int:
    """Pixels that a program covers: those of dy, or the blocks of the result."""
    return max(prod(e.inputs[0].type.shape[2:]), prod(blocks(e)))
