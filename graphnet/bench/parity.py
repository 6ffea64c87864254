"""Before anything is timed, both sides must compute the same.

In training that is the loss of every step while both learn, and what the step does to the weights.
Torch gets our weights before each step and keeps its own momentum: two runs that are left alone
part by any amount once a rounding has flipped a maximum of a pool, while an error of ours (a weight
copy left behind, a decay forgotten) shows in the step that it is made in. In inference it is the
logits of one batch; for forward and backward alone the loss and the gradients of one batch.
"""

from __future__ import annotations

import math
import statistics
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
SMALL = 1e-2  # share of a step's whole change below which a parameter is not looked at by itself
BATCHES = 8


@dataclass(frozen=True)
class Parity:
    """How far apart the two are; dropout is off on both sides, because they draw other masks.

    error   largest relative difference: of a step's losses; of logits or gradients by norm
    spread  the same between torch's two layouts: rounding alone
    update  relative difference of what a step changes in a parameter, by norm: the worst parameter,
            the median of all steps (a maximum that flips makes one step differ, an error all)
    first, last  losses of the first step, and of the last one on both sides
    """

    what: str
    steps: int
    error: float
    spread: float
    tolerance: float
    first: float | None = None
    last: tuple[float, float] | None = None
    update: float | None = None
    update_spread: float | None = None
    update_tolerance: float | None = None

    @property
    def ok(self) -> bool:
        if self.error > self.tolerance or math.isnan(self.error):
            return False
        return self.update is None or self.update <= (self.update_tolerance or 0.0)

    def as_dict(self) -> dict[str, Any]:
        last = None if self.last is None else list(self.last)
        return {**asdict(self), "last": last, "ok": self.ok}

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "THE TWO DIFFER"
        losses = changed = ""
        if self.last is not None:
            losses = f"loss {self.first:.4f} to {self.last[0]:.4f} (torch {self.last[1]:.4f}), "
        if self.update is not None:
            changed = (
                f"; in what a step changes {self.update:.1e} ({self.update_spread:.1e}; "
                f"{self.update_tolerance:.1e})"
            )
        count = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        return (
            f"parity of {self.what} over {count}: {losses}largest relative difference "
            f"{self.error:.1e} (torch's layouts: {self.spread:.1e}; allowed "
            f"{self.tolerance:.1e}){changed}: {verdict}"
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
    allowed = _allowed(precision, spread)
    return Parity(what, losses.pop("steps", 1), error, spread, allowed, **losses)


def _allowed(precision: str, spread: float) -> float:
    return max(TOLERANCE[precision], min(SPREAD * spread, MOST))


def _apart(a: list[Any], b: list[Any]) -> float:
    """The largest relative difference; NaN where anything is no number."""
    worst = torch.zeros(())
    for p, q in zip(a, b, strict=True):
        p, q = (torch.as_tensor(t).detach().double().cpu() for t in (p, q))
        worst = torch.maximum(worst, (p - q).norm() / q.norm().clamp_min(1e-3))
    return float(worst)


def _moved(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest relative difference of two changes of the same parameters. One that hardly moves
    beside the others (a bias behind relus that are off) is measured by all of them."""
    norms = [float(q.norm()) for q in b]
    least = max(SMALL * math.hypot(*norms), 1e-30)
    pairs = zip(a, b, norms, strict=True)
    return max(float((p - q).norm()) / max(n, least) for p, q, n in pairs)


def _weights(net: Any, device: torch.device) -> list[torch.Tensor]:
    """A snapshot of the parameters, ours or torch's, where the work is done."""
    return [p.data.detach().to(device, copy=True) for p in net.parameters()]


def check(work: Work, program: Callable[[Work], Any], steps: int) -> Parity:
    """`program(work)` makes ours, which trains `work.net`; `steps` counts in training only."""
    if work.mode != "train":
        return _once(work, program)
    ours = without_dropout(work.net)
    work = Work(ours, work.x, work.y, work.mode, work.sgd, work.precision)
    twins = [_Twin(work, layout) for layout in LAYOUTS.values()]
    step = program(work)
    mine: list[float] = []
    theirs: list[list[float]] = [[], []]
    updates: list[tuple[float, float]] = []
    batches = _batches(work)
    for k in range(steps):
        x, y = batches[k % BATCHES]
        before = _weights(ours, work.device)
        for twin, losses in zip(twins, theirs, strict=True):
            twin.take(before)
            losses.append(twin.step(x, y))
        mine.append(float(step(x, y)))
        sides = [_weights(net, work.device) for net in (ours, *(t.module for t in twins))]
        change, *others = [
            [after - v for after, v in zip(side, before, strict=True)] for side in sides
        ]
        updates.append((_moved(change, others[0]), _moved(others[1], others[0])))
    error, spread = (statistics.median(u) for u in zip(*updates, strict=True))
    return _found(
        "losses", work.precision, mine, theirs, steps=steps, first=mine[0],
        last=(mine[-1], theirs[0][-1]), update=error, update_spread=spread,
        update_tolerance=_allowed(work.precision, spread),
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

    def take(self, weights: list[torch.Tensor]) -> None:
        """The parameters from now on, in their order; momentum stays."""
        with torch.no_grad():
            for p, value in zip(self.module.parameters(), weights, strict=True):
                p.copy_(value)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        loss = nn.functional.cross_entropy(self._forward(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
