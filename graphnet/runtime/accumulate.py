"""Gradient accumulation: two programs on one State, one that sums up and one that applies."""

from __future__ import annotations

from typing import Any

import torch

from graphnet.runtime.bound import Bound
from graphnet.runtime.program import Program, taking_turns
from graphnet.runtime.training import TrainStep


class Accumulated(TrainStep):
    """step(x, y) -> loss of these rows; every `every`-th call applies the mean gradient over all
    rows since the last time, as one step on all of them would.

    The step counter counts calls. Sums, their number and their rows are state, and saved.
    """

    counts = ("pending", "pending_rows")

    def __init__(self, *, every: int, adding: Any, **kwargs: Any) -> None:
        """adding: stages and plan of the program that only sums up."""
        super().__init__(**kwargs)
        common = {k: v for k, v in kwargs.items() if k not in ("optimizer", "knobs", "net")}
        self.every = every
        self._adding = Program(**common | {"stages": adding.stages, "plan": adding.plan})
        self._ran: Program = self

    @property
    def ran(self) -> Program:
        return self._ran

    def _drawing(self, bound: Bound) -> None:
        """Two programs take turns, so each step is called."""

    @taking_turns
    def __call__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        index: torch.Tensor | None = None,
        epoch: int = 0,
    ) -> torch.Tensor:
        self._take_over()
        state = self.state
        last = state.pending + 1 >= self.every
        program = self._ran = self if last else self._adding
        rows = state.pending_rows + program.rows_of_all(program._feed(x, y, index, epoch))
        if last:
            self._hypers.set("rows", rows)
        program._step()
        state.pending, state.pending_rows = (0, 0) if last else (state.pending + 1, rows)
        return self._counted()
