"""Batch normalization as torch has it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from graphnet.errors import ConfigError, ShapeError, number
from graphnet.frontends.dsl import Module
from graphnet.frontends.held import Buffer, Parameter
from graphnet.frontends.symbolic import Symbol


class _BatchNorm(Module):
    kind: ClassVar[str] = "bn"
    drawn: ClassVar[bool] = False
    takes: ClassVar[tuple[int, str]]
    running_mean: Buffer
    running_var: Buffer
    num_batches_tracked: Buffer

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        name: str = "",
    ) -> None:
        if not isinstance(num_features, int) or isinstance(num_features, bool) or num_features < 1:
            raise ConfigError(f"num_features is a positive int, not {num_features!r}")
        self.num_features = num_features
        self.eps = number(type(self).__name__, "eps", eps, above=True)
        self.momentum = (
            None if momentum is None else number(type(self).__name__, "momentum", momentum)
        )
        self.affine, self.track_running_stats = bool(affine), bool(track_running_stats)
        self.name = name
        self.frozen = False
        self.weight = Parameter(torch.ones(num_features)) if affine else None
        self.bias = Parameter(torch.zeros(num_features)) if affine else None
        if track_running_stats:
            self.register_buffer("running_mean", torch.zeros(num_features))
            self.register_buffer("running_var", torch.ones(num_features))
            self.register_buffer("num_batches_tracked", torch.tensor(0))

    @property
    def running(self) -> list[Buffer]:
        """The running mean, the running variance (unbiased) and how many batches they have seen."""
        if not self.track_running_stats:
            return []
        return [self.running_mean, self.running_var, self.num_batches_tracked]

    def forward(self, x: Symbol) -> Symbol:
        rank, shape = self.takes
        if x.ndim != rank or x.shape[1] != self.num_features:
            raise ShapeError(
                f"{self.num_features} channels expected as {shape}, got {list(x.shape)}"
            )
        tracer, scale = x.tracer, [p for p in (self.weight, self.bias) if p is not None]
        if self.track_running_stats and (self.frozen or not tracer.training):
            return tracer.emit(
                "normalize", [x, *self.running[:2], *scale], eps=self.eps, affine=self.affine
            )
        live = Symbol(tracer, tracer.lazy["live"])
        running: dict[str, Any] = {
            "track": self.track_running_stats, "momentum": self.momentum or 0.0,
            "cumulative": self.momentum is None,
        }  # fmt: skip
        if (ranks := tracer.joint_ranks) > 1:
            own = tracer.emit("batch_norm_stats", [x, live])
            known = tracer.emit("all_gather", [own], ranks=ranks)
            mean, var, *new = tracer.emit_all(
                "batch_norm_gather_stats", [known, *self.running], optional=True, **running
            )
            y = tracer.emit(
                "batch_norm_elemt",
                [x, mean, var, live, Symbol(tracer, tracer.lazy["live_all"]), *scale],
                eps=self.eps, affine=self.affine, ranks=ranks,
            )  # fmt: skip
        else:
            y, _, _, *new = tracer.emit_all(
                "batch_norm", [x, live, *scale, *self.running], optional=True, eps=self.eps,
                affine=self.affine, **running,
            )  # fmt: skip
        for buffer, value in zip(self.running, new, strict=True):
            buffer.update(value)
        return y

    def extra_repr(self) -> str:
        given: dict[str, Any] = {
            "eps": (self.eps, 1e-5), "momentum": (self.momentum, 0.1),
            "affine": (self.affine, True),
            "track_running_stats": (self.track_running_stats, True),
            "frozen": (self.frozen, False),
        }  # fmt: skip
        said = [f"{k}={v!r}" for k, (v, default) in given.items() if v != default]
        return ", ".join([str(self.num_features), *said])


class BatchNorm2d(_BatchNorm):
    """Each channel of [N, C, H, W] to mean `bias` and deviation `weight`.

    In training by the mean and the biased variance of the live rows; the running statistics take
    a share `momentum` of them (None: all batches count alike), the variance unbiased. In inference
    by the running ones, where the convolution before it takes it up. Over several ranks each has
    the statistics of its own rows, or with `sync_bn` all have those of all rows.

    frozen  True uses the running statistics in training, too, in programs compiled from then on
    """

    takes = (4, "[N, C, H, W]")


class BatchNorm1d(_BatchNorm):
    """`BatchNorm2d` of [N, C]: over the rows alone."""

    takes = (2, "[N, C]")
