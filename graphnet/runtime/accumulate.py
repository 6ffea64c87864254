"""Gradient accumulation: two programs on one State, one that sums up and one that applies."""

from __future__ import annotations

from typing import Any

import torch

from graphnet.errors import ConfigError
from graphnet.runtime.program import RING, Program, TrainStep


class Accumulated(TrainStep):
    """step(x, y) -> loss of these rows; every `every`-th call applies the mean gradient over all
    rows since the last time, as one step on all of them would.

    The step counter counts calls. Sums, their number and their rows are state, and saved.
    """

    counts = ("pending", "pending_rows")

    def __init__(self, *, every: int, adding: Any, **kwargs: Any) -> None:
        """adding: stages and plan of the program that only sums up."""
        super().__init__(**kwargs)
        common = {k: v for k, v in kwargs.items() if k not in ("optimizer", "knobs")}
        self.every = every
        self._adding = Program(**common | {"stages": adding.stages, "plan": adding.plan})

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        state = self.state
        last = state.pending + 1 >= self.every
        program: Program = self if last else self._adding
        rows = state.pending_rows + program._feed(x, y)
        if last:
            self._storage["rows"].fill_(rows)
        program._step()
        state.pending, state.pending_rows = (0, 0) if last else (state.pending + 1, rows)
        at = state.steps % RING
        state.steps += 1
        return self._storage["ring"][at]

    def run(self, n: int) -> torch.Tensor:
        """As of every step; each call stands for itself, for the two programs alternate."""
        if self._bound is None:
            raise ConfigError("run without data", help="step.bind(images, labels) first")
        if not isinstance(n, int) or n < 0:
            raise ConfigError(f"run takes a number of steps, not {n!r}")
        losses = torch.empty(n, device=self.device)
        for k in range(n):
            losses[k].copy_(self(*self._bound.next()))
        return losses
