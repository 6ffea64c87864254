"""The losses of a run's steps: when they are read, and what follows where one is not finite.

On the CPU each is read before the next step. Reading one from a GPU waits for it, so there several
are fetched together, after later steps have run: a copy of some is asked for, more steps are
launched, and then the copy is looked at, so that the GPU has work all the while.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from graphnet.runtime.diagnose import first_nonfinite, not_finite, of_all
from graphnet.runtime.training import TrainStep

if TYPE_CHECKING:
    from graphnet.train.trainer import Partial, Trainer

AT_MOST = 256  # losses fetched together; the device keeps 4,096
HELD = 256 << 20  # bytes of batches kept until their losses are known
EVERY_S = 0.5  # seconds between two fetches
PATIENCE = 50  # steps in a row that are not finite before a skipping run ends


@dataclass(frozen=True)
class Taken:
    """A step whose loss has not been fetched yet. `again` gives its batch, as the step took it;
    None where its loss is known."""

    rows: int
    loss: torch.Tensor
    again: Callable[[], Sequence[Any]] | None


@dataclass(frozen=True)
class _Asked:
    """Losses whose copy is under way, until `done`; None where it needs no time."""

    taken: list[Taken]
    copied: torch.Tensor
    done: torch.cuda.Event | None

    def values(self) -> list[float]:
        if self.done is not None:
            self.done.synchronize()
        return self.copied.tolist()


class Losses:
    """Collects the losses of a trainer's steps and tells them to its callbacks."""

    def __init__(self, trainer: Trainer, program: TrainStep) -> None:
        self.trainer, self.program = trainer, program
        self.pending: list[Taken] = []
        self.asked: _Asked | None = None
        self.held, self.fetched = 0, time.perf_counter()
        self.bad = 0  # steps in a row

    @property
    def at_once(self) -> bool:
        """Whether a loss is read before the next step."""
        return self.program.device.type == "cpu"

    def add(
        self, now: Partial, rows: int, loss: torch.Tensor, again: Callable[[], Any], holds: int = 0
    ) -> None:
        """The loss of the step that the trainer has just taken.

        again  gives the step's batch (x, y, ...) once more, and keeps `holds` bytes for that
        """
        known = self.at_once  # then nothing is kept: a loader's batches hold file descriptors
        self.pending.append(Taken(rows, loss, None if known else again))
        self.held += 0 if known else holds
        if known:
            if math.isfinite(value := loss.item()):
                self.bad = 0
            else:
                self._not_finite(value, self.trainer.step - 1)
        full = len(self.pending) == AT_MOST or 2 * self.held > HELD  # the others are being copied
        if full or time.perf_counter() - self.fetched > EVERY_S:
            if known:
                self.fetch(now)
            else:
                self._settle(now)
                self._ask()

    def fetch(self, now: Partial) -> None:
        """Adds all losses to the epoch's and tells the callbacks; waits for the device."""
        self._settle(now, last=True)

    def _ask(self) -> None:
        """Has the losses copied, behind what was launched so far."""
        pending, self.pending, self.held = self.pending, [], 0
        if pending:
            values = torch.stack([t.loss for t in pending]).double().to("cpu", non_blocking=True)
            done = torch.cuda.Event() if self.program.device.type == "cuda" else None
            if done is not None:
                done.record()
            self.asked = _Asked(pending, values, done)

    def _settle(self, now: Partial, *, last: bool = False) -> None:
        """Looks at the copy that was asked for; at the `last` time, or where a loss in it is not
        finite, also at all losses since."""
        first = self.trainer.step - len(self.pending)
        taken: list[Taken] = []
        losses: list[float] = []
        if self.asked is not None:
            taken, losses = self.asked.taken, self.asked.values()
            first, self.asked = first - len(taken), None
        if self.pending and (last or not all(map(math.isfinite, losses))):
            taken = [*taken, *self.pending]
            losses += torch.stack([t.loss for t in self.pending]).double().cpu().tolist()
            self.pending, self.held = [], 0
        if taken:
            self._count(now, taken, losses, first)
            self.trainer.heard = first + len(taken)
            if fine := [v for v in losses if math.isfinite(v)]:
                for c in self.trainer.callbacks:
                    c.on_losses(self.trainer, fine)
        self.fetched = time.perf_counter()

    def _count(
        self, now: Partial, pending: Sequence[Taken], losses: Sequence[float], first: int
    ) -> None:
        for at, (taken, value) in enumerate(zip(pending, losses, strict=True)):
            if math.isfinite(value):
                now.loss += taken.rows * value
                self.bad = self.bad if self.at_once else 0
                continue
            now.skipped, now.skipped_rows = now.skipped + 1, now.skipped_rows + taken.rows
            if not self.at_once:
                # Where no step behind it was finite, the guard has kept the state as it was: the
                # latest step, whose batch is still there, says what that one would.
                went_on = any(map(math.isfinite, losses[at:]))
                self._not_finite(value, first + at, taken.again if went_on else None)

    def _not_finite(self, value: float, step: int, again: Callable[[], Any] | None = None) -> None:
        """The policy. `again` gives the batch of the step, where later ones have overwritten it."""
        trainer, skipping = self.trainer, self.trainer.nonfinite == "skip"
        self.bad += 1
        last = not skipping or self.bad >= PATIENCE
        finding = None
        if self.at_once or last:
            finding = first_nonfinite(self.program.ran, again() if again else ())
            if trainer.group is not None and self.at_once:  # all are here, in the same step
                finding = of_all(trainer.group, finding)
        if not last:
            for c in trainer.callbacks:
                c.on_skip(trainer, step, finding)
            return
        text = f"the loss is {value} at step {step}"
        if skipping:
            text = f"{self.bad} steps in a row were not finite; {text}"
        with trainer.net.locating():
            raise not_finite(text, finding)
