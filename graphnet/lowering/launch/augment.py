"""The launch of an augmentation: what a `gn.Augment` asks for becomes constexprs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

from graphnet.lowering.launch.codegen import Index
from graphnet.lowering.launch.config import Config, cdiv
from graphnet.lowering.launch.pool import block_configs
from graphnet.lowering.launch.steps import Launch, arguments, make, source
from graphnet.lowering.launch.variants import Problem, Variant
from graphnet.lowering.launch.work import Work, strides
from graphnet.ops.augment import MOST_CHANNELS, Augment

MOST_PIXELS = 512  # of a program: four a thread keep their places and colours in registers


def _constants(a: Augment, channels: int) -> dict[str, Any]:
    """What is drawn, as the kernel calls it."""
    rest = (0.0,) * (MOST_CHANNELS - channels)
    mean, std = (a.per_channel(n, channels) for n in ("mean", "std"))
    numbers: dict[str, Any] = {
        "STREAM": a.stream, "CROP": a.crop, "PAD": a.pad, "FLIP": int(a.flip * 2**24),
        "FH": a.frame[0], "FW": a.frame[1], "RESIZE": a.resizes, "WARP": a.warps,
        "ZOOM": a.scale[0], "LOG_ZOOM": math.log(a.scale[1] / a.scale[0]),
        "LOG_STRETCH": math.log(a.stretch), "TURN": a.rotate / 180,
        "SLOPE": math.tan(math.radians(a.shear)), "SHIFT": a.translate, "LENS": a.lens,
        "EDGE": a.border == "edge", "COLOUR": a.colours, "BRIGHT": a.brightness,
        "CONTRAST": a.contrast, "PCA": a.pca > 0, "UNIT": 1 / 255 if a.source == "u8" else 1.0,
    }  # fmt: skip
    numbers |= {f"M{c}": m for c, m in enumerate((*mean, *rest))}
    numbers |= {f"R{c}": 1 / s if s else 0.0 for c, s in enumerate((*std, *rest))}
    for c in range(MOST_CHANNELS):
        for k in range(MOST_CHANNELS):
            inside = a.pca > 0 and max(c, k) < channels
            numbers[f"P{c}{k}"] = a.pca * a.components[c * channels + k] if inside else 0.0
    return numbers


class Augmentation(Variant):
    """All channels of a pixel in one program; a result in blocks is padded with zeros."""

    name, ops = "pixels", ("augment",)

    def configs(self, problem: Problem) -> Iterator[Config]:
        for c in block_configs(prod(problem.shape)):
            yield replace(c, BLOCK=min(c.BLOCK, MOST_PIXELS))

    def launch(self, work: Work, config: Config) -> list[Launch]:
        e = work.anchor
        x, out = e.inputs[0].type.shape, e.out.type.shape
        n, c, h, w = out
        block = work.stores[0][1].type.layout.s2d or 1
        ph, pw = cdiv(h, block) * block, cdiv(w, block) * block
        size = min(config.BLOCK, MOST_PIXELS)
        constants: dict[str, Any] = {
            "N": n, "C": c, "H": h, "W": w, "PH": ph, "PW": pw, "SH": x[2], "SW": x[3],
            **strides("X", work.type(e.inputs[0])),
            **_constants(e.attrs, c),  # type: ignore[arg-type]
        }  # fmt: skip
        epi = work.epilogue(e.out, Index(out))
        constants |= {"BLOCK": size, "EPILOGUE": source(epi)}
        refs = tuple(work.ref(v) for v in e.inputs)
        return [
            make(
                "augment", "augment", (*refs, arguments(epi)), constants,
                (n * cdiv(ph * pw, size),), reads=tuple(r.name for r in refs), epilogues=(epi,),
                num_warps=config.num_warps,
            )
        ]  # fmt: skip
