"""Before anything is timed, both sides must learn the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphnet.bench.twin import torch_twin
from graphnet.frontends.layers import Dropout

TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 5e-2}
BATCHES = 8


@dataclass(frozen=True)
class Parity:
    """Losses of the same steps from the same weights; dropout is off on both sides, because
    the two draw different masks.

    error  largest relative difference of a step's losses
    """

    steps: int
    error: float
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
            f"(torch {self.last[1]:.4f}), largest relative difference {self.error:.1e}: {verdict}"
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
    twin = torch_twin(ours).to(device).train()
    optimizer = torch.optim.SGD(
        twin.parameters(), lr=sgd.lr, momentum=sgd.momentum, weight_decay=sgd.weight_decay,
        nesterov=sgd.nesterov,
    )  # fmt: skip
    step = compiled(ours)
    g = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(BATCHES):
        y = torch.randint(0, classes, shape[:1], generator=g)
        x = torch.randn(shape, generator=g) + (y / classes - 0.5).view(-1, 1, 1, 1)
        batches.append((x.to(device), y.to(device)))
    mine, theirs = [], []
    for k in range(steps):
        x, y = batches[k % BATCHES]
        mine.append(float(step(x, y)))
        loss = nn.functional.cross_entropy(twin(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    error = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(mine, theirs, strict=True))
    return Parity(steps, error, TOLERANCE[precision], mine[0], (mine[-1], theirs[-1]))
