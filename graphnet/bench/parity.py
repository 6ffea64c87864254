"""Before anything is timed, both sides must compute the same.

In training that is the loss of every step while both learn; in inference the logits of one batch;
for forward and backward alone the loss and the gradients of one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from graphnet.bench.peers import LAYOUTS, Work, autocast
from graphnet.bench.twin import torch_twin
from graphnet.frontends.layers import Dropout

TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 5e-2}
SPREAD, MOST = 3.0, 0.1  # times torch's own difference between layouts, and the end of that
BATCHES = 8


@dataclass(frozen=True)
class Parity:
    """Losses of the same steps from the same weights; dropout is off on both sides, because
    the two draw different masks.

    error   largest relative difference: of a step's losses; of logits or gradients by norm
    spread  the same between torch's two layouts: rounding alone, grown by the training
    first, last  losses of the first step, and of the last one on both sides; None in inference
    """

    what: str
    steps: int
    error: float
    spread: float
    tolerance: float
    first: float | None = None
    last: tuple[float, float] | None = None

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        last = None if self.last is None else list(self.last)
        return {**asdict(self), "last": last, "ok": self.ok}

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "THE TWO DIFFER"
        losses = ""
        if self.last is not None:
            losses = f"loss {self.first:.4f} to {self.last[0]:.4f} (torch {self.last[1]:.4f}), "
        count = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        return (
            f"parity of {self.what} over {count}: {losses}largest relative difference "
            f"{self.error:.1e} (torch's layouts: {self.spread:.1e}; allowed "
            f"{self.tolerance:.1e}): {verdict}"
        )


def without_dropout(net: Any) -> Any:
    """A copy of the net whose dropout layers do nothing."""
    made = net.copy()
    for m in made.modules():
        if isinstance(m, Dropout):
            m.p = 0.0
    return made


def _found(what: str, precision: str, mine: list[Any], theirs: list[list[Any]],
           **losses: Any) -> Parity:  # fmt: skip
    """`theirs` holds what torch gets in each layout."""
    error, spread = _apart(mine, theirs[0]), _apart(theirs[1], theirs[0])
    tolerance = max(TOLERANCE[precision], min(SPREAD * spread, MOST))
    return Parity(what, losses.pop("steps", 1), error, spread, tolerance, **losses)


def _apart(a: list[Any], b: list[Any]) -> float:
    """The largest relative difference; NaN where anything is no number."""
    worst = torch.zeros(())
    for p, q in zip(a, b, strict=True):
        p, q = (torch.as_tensor(t).detach().double().cpu() for t in (p, q))
        worst = torch.maximum(worst, (p - q).norm() / q.norm().clamp_min(1e-3))
    return float(worst)


def check(work: Work, program: Callable[[Work], Any], steps: int) -> Parity:
    """`program(work)` makes ours; `steps` counts in training only."""
    if work.mode != "train":
        return _once(work, program)
    ours = without_dropout(work.net)
    work = Work(ours, work.x, work.y, work.mode, work.sgd, work.precision)
    twins = [_Twin(work, layout) for layout in LAYOUTS.values()]
    step = program(work)
    mine: list[float] = []
    theirs: list[list[float]] = [[], []]
    batches = _batches(work)
    for k in range(steps):
        x, y = batches[k % BATCHES]
        mine.append(float(step(x, y)))
        for twin, losses in zip(twins, theirs, strict=True):
            losses.append(twin.step(x, y))
    return _found(
        "losses", work.precision, mine, theirs, steps=steps, first=mine[0],
        last=(mine[-1], theirs[0][-1]),
    )  # fmt: skip


def _batches(work: Work) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The images carry their label in their brightness, so there is something to learn."""
    g = torch.Generator().manual_seed(0)
    classes = work.net.summary((1, *work.x.shape[1:])).rows[-1].output[-1]
    out = []
    for _ in range(BATCHES):
        y = torch.randint(0, classes, work.y.shape, generator=g)
        x = torch.randn(work.x.shape, generator=g) + (y / classes - 0.5).view(-1, 1, 1, 1)
        out.append((x.to(work.device), y.to(work.device)))
    return out


def _once(work: Work, program: Callable[[Work], Any]) -> Parity:
    work = Work(without_dropout(work.net), work.x, work.y, work.mode, None, work.precision)
    twins = [_Twin(work, layout) for layout in LAYOUTS.values()]
    if work.mode == "infer":
        mine = [program(work)(work.x)]
        return _found("logits", work.precision, mine, [[t.logits(work.x)] for t in twins])
    loss, grads = program(work)(work.x, work.y)
    theirs = [t.gradients(work.x, work.y) for t in twins]
    return _found("loss and gradients", work.precision, [loss, *grads.values()], theirs)


class _Twin:
    """The net in torch, with torch's SGD, in the precision of the work."""

    def __init__(self, work: Work, layout: Any) -> None:
        module: Any = torch_twin(work.net).to(work.device)
        self.module, self.layout = module.to(memory_format=layout), layout
        self.module.train(work.mode != "infer")
        self.form = "autocast" if work.precision == "bf16" else ""
        if work.sgd is not None:
            s = work.sgd
            self.optimizer = torch.optim.SGD(
                self.module.parameters(), lr=s.lr, momentum=s.momentum,
                weight_decay=s.weight_decay, nesterov=s.nesterov,
            )  # fmt: skip

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        with autocast(self.form, x.device):
            return self.module(x.contiguous(memory_format=self.layout)).float()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self._forward(x)

    def gradients(self, x: torch.Tensor, y: torch.Tensor) -> list[Any]:
        """The loss, then the gradients in the order of the state_dict."""
        loss = nn.functional.cross_entropy(self._forward(x), y)
        loss.backward()
        return [loss, *(p.grad for p in self.module.parameters())]

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        loss = nn.functional.cross_entropy(self._forward(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
