"""Learning-rate schedules: pure functions of the step number, set between steps.

A schedule is any callable `step -> lr`, steps counted from 0. Nothing is recompiled for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from graphnet.errors import ConfigError

Schedule = Callable[[int], float]
NAMES = ("constant", "cosine", "step", "multistep")


def _positive(what: str, value: float) -> None:
    if not value > 0 or math.isinf(value):
        raise ConfigError(f"{what}={value!r} is not a positive number")


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
    marks = tuple(milestones)
    if any(b <= a for a, b in zip(marks, marks[1:], strict=False)):
        raise ConfigError(f"milestones {list(marks)} do not increase")
    return lambda at: lr * gamma ** sum(at >= m for m in marks)


def cosine(lr: float, total: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Linear warm-up over `warmup` steps to lr, then half a cosine down to `final` at `total`."""
    _positive("lr", lr)
    _positive("total", total)
    if not 0 <= warmup < total:
        raise ConfigError(f"warmup={warmup} is not between 0 and the {total} steps in all")
    if not 0 <= final <= lr:
        raise ConfigError(f"final={final!r} is not between 0 and lr={lr!r}")

    def at(now: int) -> float:
        if now < warmup:
            return lr * (now + 1) / warmup
        done = min(1.0, (now - warmup) / (total - warmup))
        return final + (lr - final) * 0.5 * (1 + math.cos(math.pi * done))

    return at


def by_name(name: str, lr: float, total: int) -> Schedule:
    """A schedule over `total` steps: cosine warms up for 5 % of them, step and multistep divide
    by 10 at thirds, and at half and three quarters of the way."""
    if name == "constant":
        return constant(lr)
    if name == "cosine":
        return cosine(lr, total, min(total // 20, max(total - 1, 0)))
    if name == "step":
        return step(lr, max(1, -(-total // 3)))
    if name == "multistep":
        half = max(1, total // 2)
        return multistep(lr, (half, max(half + 1, total * 3 // 4)))
    raise ConfigError(f"unknown schedule {name!r}", help=f"one of {', '.join(NAMES)}")
