"""Gradients of a net against central differences, on the float64 oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphnet.errors import NumericsError
from graphnet.frontends.dsl import Module
from graphnet.frontends.tracing import trace
from graphnet.passes import pipeline


@dataclass(frozen=True)
class GradientRow:
    """One parameter: the slope along a random direction, by the graph and by differences."""

    key: str
    analytic: float
    numeric: float
    error: float  # relative to the larger of the two, of the gradient's mean slope, and of a slope
    #               in which the rounding of the loss is the tolerance


@dataclass(frozen=True)
class GradientReport:
    """The outcome of `check_gradients`; prints one line per parameter."""

    rows: tuple[GradientRow, ...]
    tolerance: float

    @property
    def ok(self) -> bool:
        return all(r.error <= self.tolerance for r in self.rows)

    def __str__(self) -> str:
        return "\n".join(
            f"{'ok ' if r.error <= self.tolerance else 'BAD'} {r.key:24} "
            f"{r.analytic:+.9e} {r.numeric:+.9e}  error {r.error:.1e}"
            for r in self.rows
        )


def check_gradients(
    net: Module,
    shape: Sequence[int],
    seed: int = 0,
    *,
    loss: Any = None,
    eps: float = 1e-6,
    tolerance: float = 1e-5,
) -> GradientReport:
    """Compares the graph's gradients with central differences in float64, on the oracle.

    Each trainable parameter moves along one random direction; dropout keeps one mask. Raises
    NumericsError with the whole table where a slope differs by more than `tolerance`.
    """
    from graphnet.ops.evaluate import evaluate
    from graphnet.ops.loss import CrossEntropyLoss

    traced = trace(net, shape, loss=loss or CrossEntropyLoss(), training=True)
    buffers = {k: v.data.detach().cpu() for k, v in net.named_buffers()}
    kept = {k: v.double() if v.is_floating_point() else v for k, v in buffers.items()}
    params = {k: p.data.detach().to("cpu", torch.float64) for k, p in net.named_parameters()}
    keys = [k for k, p in net.named_parameters() if p.trainable]
    joint = pipeline.run(traced, precision="fp32", grads=True, trainable=keys).joint
    classes = traced.eqns[-1].inputs[0].type.shape[1]
    rng = torch.Generator().manual_seed(seed)
    feed: dict[str, torch.Tensor] = {
        "x": torch.randn(*shape, generator=rng, dtype=torch.float64),
        "labels": torch.randint(0, classes, (shape[0],), generator=rng),
        "live": torch.tensor(shape[0], dtype=torch.int32),
        "seed": torch.tensor(seed),
        "step": torch.tensor(0),
    }
    _, *gradients = evaluate(joint, {**feed, **kept, **params})
    rows = []
    for key, gradient in zip(keys, gradients, strict=True):
        direction = torch.randn(params[key].shape, generator=rng, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            moved = {**params, key: params[key] + sign * eps * direction}
            ends.append(float(evaluate(traced, {**feed, **kept, **moved})[0]))
        numeric = (ends[0] - ends[1]) / (2 * eps)
        analytic = float((gradient.double() * direction).sum())
        # A bias in front of a batch normalization has no slope but the rounding of two losses.
        hidden = max(map(abs, ends)) * 2.0**-50 / eps
        norm = float(gradient.double().norm())
        scale = max(abs(numeric), abs(analytic), norm, hidden / tolerance, 1e-12)
        rows.append(GradientRow(key, analytic, numeric, abs(numeric - analytic) / scale))
    report = GradientReport(tuple(rows), tolerance)
    if not report.ok:
        raise NumericsError(f"gradients differ from finite differences:\n{report}")
    return report
