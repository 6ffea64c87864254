"""LeNet-5 in float64 torch, and the two checks that hold a target against it.

Teacher-forced: before each step the target gets the twin's parameters and momentum, so that
rounding does not pile up and every step stands alone. Free-running: both go their own way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

import graphnet as gn
from graphnet.train.data import load

MOMENTUM, DECAY = 0.9, 5e-4


def lenet5_twin() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load("digits", "train")
    return data.normalised(data.images), data.labels


def batch_of(at: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = digits()
    pick = torch.arange(at * rows, (at + 1) * rows) % len(images)
    return images[pick], labels[pick]


@dataclass(frozen=True)
class Row:
    """Errors of one step: of the loss, of the worst gradient and of the worst momentum buffer."""

    loss: float
    gradient: float
    momentum: float

    @property
    def exact(self) -> bool:
        return self.loss <= 1e-6 and self.gradient <= 1e-5 and self.momentum <= 1e-5


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The twin stays on the CPU; what it is compared with may lie on a GPU."""
    off = got.to(want.device, torch.float64) - want
    return float(off.norm() / want.norm().clamp_min(1e-30))


class Twins:
    """A net on a target beside its float64 twin, from the same weights."""

    def __init__(self, target: str, rows: int, lr: float, *, decay: float = DECAY) -> None:
        torch.manual_seed(0)
        self.twin = lenet5_twin()
        self.net, self.rows = gn.models.lenet5(), rows
        self.net.load_state_dict(self.twin.state_dict())
        self.twin.double()
        self.sgd = torch.optim.SGD(
            self.twin.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=DECAY
        )
        common: dict[str, Any] = {
            "target": target, "precision": "fp32", "loss": gn.CrossEntropyLoss()
        }  # fmt: skip
        optimizer = gn.SGD(lr=lr, momentum=MOMENTUM, weight_decay=decay)
        shape = (rows, 1, 28, 28)
        self.step: Any = gn.compile(self.net, shape, optimizer=optimizer, **common)
        self.grads: Any = gn.compile(self.net, shape, grads=True, **common)

    def _twin_step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        loss = nn.functional.cross_entropy(self.twin(x.double()), y)
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return loss.item()

    def _teach(self) -> None:
        self.net.load_state_dict({k: v.float() for k, v in self.twin.state_dict().items()})
        state = self.step.optimizer.state_dict()
        for key, p in self.twin.named_parameters():
            buffer = self.sgd.state[p].get("momentum_buffer")
            if buffer is not None:
                state[f"{key}.momentum_buffer"] = buffer.float()
        self.step.optimizer.load_state_dict(state)

    def teacher_forced(self, steps: int) -> list[Row]:
        rows = []
        for at in range(steps):
            x, y = batch_of(at, self.rows)
            self._teach()
            loss, grads = self.grads(x, y)
            again = float(self.step(x, y))
            want = self._twin_step(x, y)
            buffers = self.step.optimizer.state_dict()
            rows.append(
                Row(
                    max(abs(float(loss) - want), abs(again - want)) / abs(want),
                    max(relative(grads[k], p.grad) for k, p in self.twin.named_parameters()),
                    max(
                        relative(
                            buffers[f"{k}.momentum_buffer"], self.sgd.state[p]["momentum_buffer"]
                        )
                        for k, p in self.twin.named_parameters()
                    ),
                )
            )
        return rows

    def free_running(self, steps: int) -> None:
        for at in range(steps):
            x, y = batch_of(at, self.rows)
            want = self._twin_step(x, y)
            torch.testing.assert_close(
                float(self.step(x, y)), want, rtol=1e-4, atol=0.0, msg=f"loss of step {at}"
            )
        for key, p in self.net.state_dict().items():
            torch.testing.assert_close(
                p.double(), self.twin.state_dict()[key], rtol=1e-4, atol=1e-5, msg=key
            )


def hold(rows: list[Row], exact: float = 0.9) -> None:
    """A share of the steps is exact to rounding; a flipped tie may move the others by little."""
    assert sum(r.exact for r in rows) >= exact * len(rows), rows
    assert max(max(r.loss, r.gradient, r.momentum) for r in rows) <= 1e-2, rows
