"""The steps that were held back because one before them was not finite (`nonfinite="auto"`).

The device counts them (`record_step`). On the CPU the count is read after each step. Reading it
from a GPU would wait for the step, so there a copy is asked for at times and looked at later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

EVERY_S = 0.01  # seconds between two copies from a GPU; one is under way at a time


class Copies:
    """Copies of a number on a GPU, made behind what runs there, without waiting for it."""

    def __init__(self, number: torch.Tensor) -> None:
        self.number = number
        self._into = torch.zeros((), dtype=number.dtype, pin_memory=True)
        self._done = torch.cuda.Event()

    def ask(self) -> None:
        """Starts a copy of what the number is once all that was launched so far has run."""
        with torch.cuda.device(self.number.device):
            self._into.copy_(self.number, non_blocking=True)
            self._done.record()

    def arrived(self) -> float | None:
        """What the copy holds, None where it is still under way."""
        return float(self._into) if self._done.query() else None


class Held:
    """How many steps were held back, the first bad one included, as far as the host knows."""

    def __init__(self, count: torch.Tensor, copies: Any = None) -> None:
        """copies: as `Copies`; None where the count lies on the CPU."""
        self.count = count
        self.copies = copies or (Copies(count) if count.device.type == "cuda" else None)
        self.program: Callable[[], Any] = lambda: None  # the one that ran last, if it is there
        self.behind = False  # steps may have run since the last answer
        self._asked: int | None = None  # the host's count of steps when a copy was asked for
        self._when = 0.0

    def heard(self, steps: int, *, wait: bool = False) -> tuple[int, int]:
        """(steps held back, the host's count of steps when that was so), 0 for as long as no answer
        has arrived.

        steps  done by now, as the host counts
        wait   for the device, to be sure
        """
        if wait or self.copies is None:
            self._asked, self.behind = None, False
            return int(self.count), steps
        self.behind = True
        found = (0, steps)
        if self._asked is not None and (number := self.copies.arrived()) is not None:
            found, self._asked = (int(number), self._asked), None
        now = time.perf_counter()
        if self._asked is None and now - self._when >= EVERY_S:
            self._asked, self._when = steps, now
            self.copies.ask()
        return found

    def forget(self) -> None:
        """The count starts again: a copy that is under way says nothing any more."""
        self._asked, self.behind = None, False
