"""Every optimizer beside torch.optim, or its formula as the lecture writes it, in float64.

The net is one linear layer under a hinge whose margin no score can reach: each gradient is a
constant of the batch, whatever the weights. So nothing amplifies a rounding, and 100 steps in fp32
must agree with float64 to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import graphnet as gn

ROWS, WIDTH, CLASSES, MARGIN = 6, 7, 5, 1e4
STEPS = 100


class Formula(torch.optim.Optimizer):
    """Updates that torch.optim lacks: `rule(p, g, state, lr)` returns the new parameter."""

    def __init__(self, params: Any, lr: float, rule: Callable[..., torch.Tensor]) -> None:
        super().__init__(params, {"lr": lr})
        self.rule = rule

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.rule(p, p.grad, self.state[p], group["lr"]))


def classic(rho: float, nesterov: bool = False, decay: float = 0.0) -> Callable[..., torch.Tensor]:
    """v' = rho v - lr g; x += v', or Nesterov's x += -rho v + (1 + rho) v'."""

    def rule(x: torch.Tensor, g: torch.Tensor, state: dict, lr: float) -> torch.Tensor:
        v = state.get("v", torch.zeros_like(x))
        state["v"] = rho * v - lr * (g + decay * x)
        if nesterov:
            return x - rho * v + (1 + rho) * state["v"]
        return x + state["v"]

    return rule


def penalty(l2: float, l1: float) -> Callable[..., torch.Tensor]:
    """Plain descent on the loss + l2/2 sum x^2 + l1 sum |x|."""
    return lambda x, g, state, lr: x - lr * (g + l2 * x + l1 * x.sign())


def adam_l1(l1: float) -> Callable[..., torch.Tensor]:
    """Adam as its paper writes it, on the loss + l1 sum |x|."""

    def rule(x: torch.Tensor, g: torch.Tensor, state: dict, lr: float) -> torch.Tensor:
        g = g + l1 * x.sign()
        t = state["t"] = state.get("t", 0) + 1
        m = state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
        v = state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g * g
        return x - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    return rule


def _sgd(**options: Any) -> Callable[..., Any]:
    return lambda p, lr: torch.optim.SGD(p, lr, **options)


def _rule(rule: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    return lambda p, lr: Formula(p, lr, rule)


# name: our spec, and torch's optimizer (or the formula) for parameters and a rate
TABLE: dict[str, tuple[Any, Callable[..., Any]]] = {
    "sgd": (gn.SGD(0.1), _sgd()),
    "l2": (gn.SGD(0.1, weight_decay=0.05), _sgd(weight_decay=0.05)),
    "l1": (gn.SGD(0.1, l1=0.03), _rule(penalty(0.0, 0.03))),
    # The lecture's beta sum x^2 + sum |x|, times lambda 0.02, with beta 1.5.
    "elastic": (gn.SGD(0.1, weight_decay=0.06, l1=0.02), _rule(penalty(0.06, 0.02))),
    "momentum": (gn.SGD(0.1, 0.9, weight_decay=0.01), _sgd(momentum=0.9, weight_decay=0.01)),
    "nesterov": (gn.SGD(0.1, 0.9, weight_decay=0.01, nesterov=True),
                 _sgd(momentum=0.9, weight_decay=0.01, nesterov=True)),
    "maximize": (gn.SGD(0.01, 0.9, weight_decay=0.5, maximize=True),
                 _sgd(momentum=0.9, weight_decay=0.5, maximize=True)),
    "dampening": (gn.SGD(0.1, 0.9, 0.4, 0.01),
                  _sgd(momentum=0.9, dampening=0.4, weight_decay=0.01)),
    "classic": (gn.SGD(0.1, 0.9, weight_decay=0.01, form="classic"),
                _rule(classic(0.9, decay=0.01))),
    "classic_nesterov": (gn.SGD(0.1, 0.99, form="classic", nesterov=True),
                         _rule(classic(0.99, nesterov=True))),
    "adam": (gn.Adam(0.02), lambda p, lr: torch.optim.Adam(p, lr)),
    "adam_l2": (gn.Adam(0.02, (0.8, 0.95), 1e-6, 0.1),
                lambda p, lr: torch.optim.Adam(p, lr, (0.8, 0.95), 1e-6, 0.1)),
    # A rate at which few weights reach 0, where a rounding decides the sign.
    "adam_l1": (gn.Adam(0.001, l1=0.1), _rule(adam_l1(0.1))),
    "adamw": (gn.AdamW(0.02), lambda p, lr: torch.optim.AdamW(p, lr)),
    # Averages short enough that squares often fall below their maximum.
    "amsgrad": (gn.Adam(0.02, (0.8, 0.9), weight_decay=0.1, amsgrad=True),
                lambda p, lr: torch.optim.Adam(p, lr, (0.8, 0.9), 1e-8, 0.1, True)),
    "amsgradw": (gn.AdamW(0.02, (0.8, 0.9), amsgrad=True),
                 lambda p, lr: torch.optim.AdamW(p, lr, (0.8, 0.9), amsgrad=True)),
}  # fmt: skip


class Race:
    """Our step and its twin from the same start."""

    def __init__(self, spec: Any, make: Callable[..., Any], target: str, **options: Any) -> None:
        torch.manual_seed(1)
        self.net = gn.Sequential(gn.Linear(WIDTH, CLASSES))
        self.twin = nn.Sequential(nn.Linear(WIDTH, CLASSES)).double()
        self.twin.load_state_dict({k: v.double() for k, v in self.net.state_dict().items()})
        multipliers = options.pop("multipliers", None)
        groups: Any = self.twin.parameters()
        if multipliers:  # as torch says it: a parameter group each
            self.net.set_multipliers("*bias", *multipliers)
            lr, decay = multipliers
            weight, bias = groups
            groups = [{"params": [weight]}, {"params": [bias], "lr": spec.lr * lr,
                      "weight_decay": spec.weight_decay * decay}]  # fmt: skip
        self.other = make(groups, spec.lr)
        self.step: Any = gn.compile(
            self.net, (ROWS, WIDTH), target=target, precision="fp32",
            loss=gn.MultiMarginLoss(margin=MARGIN), optimizer=spec, **options,
        )  # fmt: skip
        self.draw = torch.Generator().manual_seed(2)

    def batch(self, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(rows, WIDTH, generator=self.draw)
        return x, torch.randint(0, CLASSES, (rows,), generator=self.draw)

    def turn(self, rows: int = ROWS) -> None:
        """One step of both on a new batch."""
        x, y = self.batch(rows)
        self.step(x, y)
        self.teach(x, y)

    def teach(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """One step of the twin."""
        self.other.zero_grad()
        nn.functional.multi_margin_loss(self.twin(x.double()), y, margin=MARGIN).backward()
        self.other.step()

    def drop(self, factor: float = 0.1) -> None:
        self.step.optimizer.lr *= factor
        for group in self.other.param_groups:
            group["lr"] *= factor

    def error(self) -> float:
        """The largest error of a parameter, relative to the largest entry of its tensor."""
        mine = self.net.state_dict()
        return max(
            float((mine[k].double() - v).abs().max() / v.abs().max())
            for k, v in self.twin.state_dict().items()
        )


def many_steps(name: str, target: str, steps: int = STEPS) -> Race:
    """Runs a row of TABLE with a drop of the rate in the middle; asserts rtol 1e-5 throughout."""
    race = Race(*TABLE[name], target)
    for at in range(steps):
        if at == steps // 2:
            race.drop()
        race.turn(ROWS if at % 3 else ROWS - 2)  # also batches that are not full
        assert race.error() <= 1e-5, (name, at)
    return race
