"""Dropout of elements and of channels."""

from __future__ import annotations

import zlib
from typing import Any, ClassVar

from graphnet.errors import ConfigError, number
from graphnet.frontends.dsl import Module
from graphnet.frontends.symbolic import Symbol, images
from graphnet.frontends.tracer import active_tracer


class Dropout(Module):
    """Zeroes elements with probability p in training.

    mode "inverted" divides what is kept by 1 - p and does nothing in inference; "vanilla" leaves
    it alone in training and multiplies by 1 - p in inference.
    """

    kind: ClassVar[str] = "drop"

    def __init__(
        self, p: float = 0.5, inplace: bool = False, *, mode: str = "inverted", name: str = ""
    ) -> None:
        if number("Dropout", "p", p) >= 1:
            raise ConfigError(
                f"Dropout: p={p!r} is not in [0, 1)", help="it is the share that is dropped"
            )
        if mode not in ("inverted", "vanilla"):
            raise ConfigError(f"unknown dropout mode {mode!r}", help='"inverted" or "vanilla"')
        self.p = float(p)
        self.mode = mode
        self.name = name

    def forward(self, x: Symbol) -> Symbol:
        tracer = active_tracer("Dropout")
        if self.p == 0.0 or (self.mode == "inverted" and not tracer.training):
            return x
        call = tracer.calls[self]
        # Each further call of a shared layer draws from a stream of its own.
        label = tracer.names[self] + (f"#{call}" if call > 1 else "")
        counts = [v for k in ("seed", "step", "first_row") if (v := tracer.lazy.get(k)) is not None]
        return tracer.emit(
            "dropout", [x, *(Symbol(tracer, v) for v in counts)],
            p=self.p, mode=self.mode, stream=zlib.crc32(label.encode()),
            training=tracer.training, global_batch=tracer.global_batch,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"p={self.p}" + (', mode="vanilla"' if self.mode == "vanilla" else "")


class Dropout2d(Dropout):
    """`Dropout` of whole channels of [N, C, H, W]."""

    def forward(self, x: Symbol) -> Symbol:
        images(type(self).__name__, x)
        if not x.tracer.training or self.p == 0.0:
            return super().forward(x)
        ones: dict[str, Any] = {"value": 1.0, "shape": (*x.shape[:2], 1, 1), "dtype": "f32"}
        return x * super().forward(x.tracer.emit("full", [], **ones))
