"""Launches of pooling: one thread an element (kernels/pool.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product as combinations
from math import prod
from typing import Any

from graphnet.lowering.launch.codegen import Index
from graphnet.lowering.launch.config import Config, cdiv, distinct, next_power, tile
from graphnet.lowering.launch.steps import Launch, arguments, make, source
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.lowering.launch.work import Work, strides


def window(a: Any, dilated: bool = True) -> dict[str, int]:
    """The window of a pool as constexprs; of one that is never dilated without dilation."""
    (kh, kw), (sh, sw), (top, _, left, _) = a.kernel, a.stride, a.padding
    out = {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PT": top, "PL": left}
    return out | {"DH": a.dilation[0], "DW": a.dilation[1]} if dilated else out


def by_block(elements: int, most: int = 1024) -> Config:
    """One element a lane."""
    return Config(BLOCK=tile(elements, most, 32))


def block_configs(elements: int) -> Iterator[Config]:
    """The rule's block, then others."""
    first = by_block(elements)
    more = (
        replace(first, BLOCK=block, num_warps=warps)
        for block, warps in combinations((64, 128, 256, 512, 1024, 2048), (1, 2, 4, 8))
        if block <= max(32, next_power(elements)) and block >= 32 * warps
    )
    yield from distinct([first], more)


class Pools(Variant):
    """All six: forward runs over the output's pixels, a gradient over the input's."""

    name = "elements"
    ops = tuple(
        f"{p}{g}" for p in ("maxpool2d", "avgpool2d", "adaptive_avgpool2d") for g in ("", "_grad")
    )

    def configs(self, problem: Problem) -> Iterator[Config]:
        s = problem.sizes
        yield from block_configs(s["N"] * s["C"] * s["H"] * s["W"])

    def launch(self, work: Work, config: Config) -> list[Launch]:
        e, a = work.anchor, work.anchor.attrs
        backward = e.op.endswith("_grad")
        first, out = e.inputs[0].type.shape, e.out.type.shape
        (h, w), (oh, ow) = (out[2:], first[2:]) if backward else (first[2:], out[2:])
        constants: dict[str, Any] = {"N": out[0], "C": out[1], "H": h, "W": w, "OH": oh, "OW": ow}
        if not e.op.startswith("adaptive"):
            constants |= window(a, dilated=e.op.startswith("max"))
        if e.op.startswith("avg"):
            _, b, _, r = a.padding  # type: ignore[attr-defined]
            constants |= {
                "PB": b, "PR": r, "COUNT_PAD": a.count_include_pad,  # type: ignore[attr-defined]
                "DIVISOR": a.divisor_override,  # type: ignore[attr-defined]
            }  # fmt: skip
        operands = list(zip("DI" if backward else "X", e.inputs, strict=False))
        for prefix, v in operands:
            constants |= strides(prefix, work.type(v))
        index = e.outputs[1] if len(e.outputs) > 1 else None
        epi = work.epilogue(e.out, Index(out), also=index)
        nhwc = work.stores[0][1].type.layout.order == "nhwc"
        constants |= {"NHWC": nhwc, "BLOCK": config.BLOCK, "EPILOGUE": source(epi)}
        refs = tuple(work.ref(v) for _, v in operands)
        return [
            make(
                e.op, "pool", (*refs, arguments(epi)), constants,
                (cdiv(prod(out), config.BLOCK),), reads=tuple(r.name for r in refs),
                epilogues=(epi,), num_warps=config.num_warps,
            )
        ]  # fmt: skip
