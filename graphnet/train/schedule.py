"""Learning-rate schedules: pure functions of the step number, set between steps.

A schedule is any callable `step -> lr`, steps counted from 0, or `step -> {knob: value}` where it
turns more than the rate. Nothing is recompiled for it: knobs are scalars on the device.

They compose: `warmup(step(0.1, every=3000), 500)`, `Plateau(warmup(constant(0.1), 500))`. What is
counted in epochs elsewhere is counted in steps here: epochs * len(batches). Behind its end a
schedule stays where it ended (torch's cosine would rise again, its one-cycle would raise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphnet.errors import ConfigError, number

Schedule = Callable[[int], float | dict[str, Any]]
NAMES = ("constant", "cosine", "step", "multistep", "exponential", "onecycle", "plateau")


def _positive(what: str, value: float) -> None:
    number("schedule", what, value, above=True)


def _schedule(of: str, base: Any) -> None:
    """ConfigError where `base` is nothing that gives a rate for a step."""
    if not callable(base):
        raise ConfigError(f"{of} takes a schedule, not {base!r}", help="e.g. constant(0.1)")


def constant(lr: float) -> Schedule:
    """The same rate at every step."""
    _positive("lr", lr)
    return lambda step: lr


def step(lr: float, every: int, gamma: float = 0.1) -> Schedule:
    """lr * gamma^(step // every)."""
    _positive("lr", lr)
    _positive("every", every)
    _positive("gamma", gamma)
    return lambda at: lr * gamma ** (at // every)


def multistep(lr: float, milestones: Sequence[int], gamma: float = 0.1) -> Schedule:
    """lr times gamma for each milestone that has been reached."""
    _positive("lr", lr)
    _positive("gamma", gamma)
    if isinstance(milestones, str) or not isinstance(milestones, Sequence):
        raise ConfigError(f"milestones are a list of steps, not {milestones!r}")
    marks = tuple(number("schedule", "milestone", m) for m in milestones)
    if any(b <= a for a, b in zip(marks, marks[1:], strict=False)):
        raise ConfigError(f"milestones {list(marks)} do not increase")
    return lambda at: lr * gamma ** sum(at >= m for m in marks)


def cosine(lr: float, total: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Linear warm-up over `warmup` steps to lr, then half a cosine down to `final` at `total`."""
    _positive("lr", lr)
    _positive("total", total)
    if number("schedule", "warmup", warmup) >= total:
        raise ConfigError(f"warmup={warmup} is not between 0 and the {total} steps in all")
    if number("schedule", "final", final) > lr:
        raise ConfigError(f"final={final!r} is not between 0 and lr={lr!r}")

    def at(now: int) -> float:
        if now < warmup:
            return lr * (now + 1) / warmup
        done = min(1.0, (now - warmup) / (total - warmup))
        return final + (lr - final) * 0.5 * (1 + math.cos(math.pi * done))

    return at


def exponential(lr: float, gamma: float) -> Schedule:
    """lr * gamma^step."""
    _positive("lr", lr)
    _positive("gamma", gamma)
    return lambda at: lr * gamma**at


def warmup(then: Schedule, steps: int, start: float = 0.1) -> Schedule:
    """Linear from `start` times the first rate of `then` up to it, over `steps`; then `then`,
    whose steps count from there."""
    _schedule("warmup", then)
    if hasattr(then, "observe"):
        raise ConfigError(
            "warmup in front of a schedule that hears losses: nobody would tell it",
            help="put the warm-up inside: Plateau(warmup(base, steps))",
        )
    _positive("steps", steps)
    if number("warmup", "start", start) > 1:
        raise ConfigError(f"start={start!r} is not between 0 and 1")

    def at(now: int) -> float | dict[str, Any]:
        if now >= steps:
            return then(now - steps)
        return scaled(then(0), start + (1 - start) * now / steps)

    return at


def one_cycle(
    lr: float,
    total: int,
    *,
    up: float = 0.3,
    div: float = 25.0,
    final_div: float = 1e4,
    momentum: tuple[float, float] | None = None,
) -> Schedule:
    """From lr / div up to lr over the share `up` of `total` steps, then down to lr / div /
    final_div, both along half a cosine (torch's OneCycleLR).

    momentum  (low, high) of SGD's momentum, which turns the other way: from high to low and back
    """
    for name, value in (("lr", lr), ("total", total), ("div", div), ("final_div", final_div)):
        _positive(name, value)
    if number("one_cycle", "up", up) >= 1 or up * total <= 1 or total < 2:
        raise ConfigError(f"up={up!r} of {total} steps leaves no cycle", help="0.3 of 10 or more")
    if momentum is not None:
        if not isinstance(momentum, Sequence) or len(momentum) != 2:
            raise ConfigError(f"momentum={momentum!r} is no pair (low, high)")
        low, high = (number("one_cycle", "momentum", m, above=True) for m in momentum)
        if low > high:
            raise ConfigError(f"momentum={momentum!r} is no pair (low, high)")
    first, last = up * total - 1, total - 1
    start, end = lr / div, lr / div / final_div

    def between(a: float, b: float, share: float) -> float:
        return b + (a - b) * 0.5 * (1 + math.cos(math.pi * share))

    def at(now: int) -> float | dict[str, Any]:
        rising = now <= first
        share = now / first if rising else min(1.0, (now - first) / (last - first))
        rate = between(start, lr, share) if rising else between(lr, end, share)
        if momentum is None:
            return rate
        turned = between(high, low, share) if rising else between(low, high, share)
        return {"lr": rate, "momentum": turned}

    return at


@dataclass
class Plateau:
    """Divides the rate of `base` when the validation loss has not fallen for a while.

    After each epoch the Trainer calls `observe(loss)`: when the best loss has not been beaten by
    the share `threshold` for more than `patience` epochs, the factor falls (torch's
    ReduceLROnPlateau). `least` bounds the rate from below, `cooldown` epochs after a fall do not
    count. Its state is part of every checkpoint.
    """

    base: Schedule
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    cooldown: int = 0
    least: float = 0.0
    scale: float = 1.0
    best: float = math.inf
    bad: int = 0
    resting: int = 0

    def __post_init__(self) -> None:
        _schedule("Plateau", self.base)
        if number("Plateau", "factor", self.factor, above=True) >= 1:
            raise ConfigError(f"factor={self.factor!r} is not between 0 and 1")
        for name in ("patience", "cooldown", "threshold", "least"):
            number("Plateau", name, getattr(self, name))

    def __call__(self, step: int) -> float | dict[str, Any]:
        out = scaled(self.base(step), self.scale)
        if isinstance(out, dict):
            return {**out, "lr": max(self.least, out["lr"])}
        return max(self.least, out)

    def observe(self, loss: float) -> None:
        """The validation loss of the epoch that has just ended."""
        if loss < self.best * (1 - self.threshold):
            self.best, self.bad = loss, 0
        else:
            self.bad += 1
        if self.resting:
            self.resting, self.bad = self.resting - 1, 0
        if self.bad > self.patience:
            self.scale *= self.factor
            self.resting, self.bad = self.cooldown, 0

    def state(self) -> dict[str, float | int | None]:
        """What it has learned, as JSON."""
        best = None if math.isinf(self.best) else self.best
        return {"scale": self.scale, "best": best, "bad": self.bad, "resting": self.resting}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.scale, self.bad, self.resting = state["scale"], state["bad"], state["resting"]
        self.best = math.inf if state["best"] is None else state["best"]


def scaled(value: float | dict[str, Any], factor: float) -> float | dict[str, Any]:
    """What a schedule gave, its rate multiplied."""
    return {**value, "lr": value["lr"] * factor} if isinstance(value, dict) else value * factor


def turn(optimizer: Any, value: float | dict[str, Any]) -> None:
    """Sets what a schedule gave on the live optimizer."""
    for knob, given in (value if isinstance(value, dict) else {"lr": value}).items():
        setattr(optimizer, knob, given)


def by_name(name: str, lr: float, total: int, *, warm: bool = False) -> Schedule:
    """A schedule over `total` steps: cosine warms up for 5 % of them unless something before it has
    (`warm`), step and multistep divide by 10 at thirds, and at half and three quarters of the way;
    exponential ends at a hundredth; plateau divides by 10 after 2 epochs without a lower validation
    loss."""
    if name == "constant":
        return constant(lr)
    if name == "cosine":
        return cosine(lr, total, 0 if warm else min(total // 20, max(total - 1, 0)))
    if name == "step":
        return step(lr, max(1, -(-total // 3)))
    if name == "multistep":
        half = max(1, total // 2)
        return multistep(lr, (half, max(half + 1, total * 3 // 4)))
    if name == "exponential":
        return exponential(lr, 0.01 ** (1 / max(1, total)))
    if name == "onecycle":
        return one_cycle(lr, total)
    if name == "plateau":
        return Plateau(constant(lr), patience=2)
    raise ConfigError(f"unknown schedule {name!r}", help=f"one of {', '.join(NAMES)}")
