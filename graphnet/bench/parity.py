"""Before anything is timed, both sides must learn the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphnet.bench.peers import LAYOUTS
from graphnet.bench.twin import torch_twin
from graphnet.frontends.layers import Dropout

TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 5e-2}
SPREAD, MOST = 3.0, 0.1  # times torch's own difference between layouts, and the end of that
BATCHES = 8


@dataclass(frozen=True)
class Parity:
    """Losses of the same steps from the same weights; dropout is off on both sides, because
    the two draw different masks.

    error   largest relative difference of a step's losses
    spread  the same between torch's two layouts: rounding alone, grown by the training
    """

    steps: int
    error: float
    spread: float
    tolerance: float
    first: float
    last: tuple[float, float]

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "THE TWO DIFFER"
        return (
            f"parity over {self.steps} steps: loss {self.first:.4f} to {self.last[0]:.4f} "
            f"(torch {self.last[1]:.4f}), largest relative difference {self.error:.1e} "
            f"(torch's layouts: {self.spread:.1e}): {verdict}"
        )


def without_dropout(net: Any) -> Any:
    """A copy of the net whose dropout layers do nothing."""
    made = net.copy()
    for m in made.modules():
        if isinstance(m, Dropout):
            m.p = 0.0
    return made


def check(net: Any, shape: tuple[int, ...], compiled: Any, sgd: Any, precision: str,
          steps: int, classes: int, device: Any) -> Parity:  # fmt: skip
    """Trains a copy of the net and its twin; `compiled(net)` makes the step.

    The images carry their label in their brightness, so there is something to learn.
    """
    ours = without_dropout(net)
    twins = [_Twin(ours, sgd, device, layout) for layout in LAYOUTS.values()]
    step = compiled(ours)
    g = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(BATCHES):
        y = torch.randint(0, classes, shape[:1], generator=g)
        x = torch.randn(shape, generator=g) + (y / classes - 0.5).view(-1, 1, 1, 1)
        batches.append((x.to(device), y.to(device)))
    mine: list[float] = []
    theirs: list[list[float]] = [[], []]
    for k in range(steps):
        x, y = batches[k % BATCHES]
        mine.append(float(step(x, y)))
        for twin, losses in zip(twins, theirs, strict=True):
            losses.append(twin.step(x, y))
    error, spread = _apart(mine, theirs[0]), _apart(theirs[1], theirs[0])
    tolerance = max(TOLERANCE[precision], min(SPREAD * spread, MOST))
    return Parity(steps, error, spread, tolerance, mine[0], (mine[-1], theirs[0][-1]))


def _apart(a: list[float], b: list[float]) -> float:
    return max(abs(p - q) / max(abs(q), 1e-3) for p, q in zip(a, b, strict=True))


class _Twin:
    """The net in torch, in training, with torch's SGD."""

    def __init__(self, net: Any, sgd: Any, device: Any, layout: Any) -> None:
        module: Any = torch_twin(net).to(device)
        self.module, self.layout = module.to(memory_format=layout).train(), layout
        self.optimizer = torch.optim.SGD(
            self.module.parameters(), lr=sgd.lr, momentum=sgd.momentum,
            weight_decay=sgd.weight_decay, nesterov=sgd.nesterov,
        )  # fmt: skip

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        x = x.contiguous(memory_format=self.layout)
        loss = nn.functional.cross_entropy(self.module(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
