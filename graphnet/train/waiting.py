"""What the steps of an epoch wait for: reading, decoding or the host."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORTH_SAYING = 0.1  # share of the time
KEPT = 2048  # steps whose times on a GPU are not added up yet: far more than are under way


class Waiting:
    """How long steps waited in an epoch of batches.

    On a CPU a step waits while its batch is fetched. On a GPU it may still have work then: there
    the time counts between the end of a step and the beginning of the next, by events.

    seconds, fetching  of the epoch in all; of these, in which the host fetched batches
    idle               in which no step ran
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds = self.fetching = self.idle = 0.0
        self._began = time.perf_counter()
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def fetch(self) -> Iterator[None]:
        """Around fetching a batch."""
        begin = time.perf_counter()
        yield
        spent = time.perf_counter() - begin
        self.fetching += spent
        self.idle += 0.0 if self.on_gpu else spent

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the call of a step."""
        if not self.on_gpu:
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))
        if len(self._events) > KEPT:
            self._add(self._events[: KEPT // 2 + 1])
            del self._events[: KEPT // 2]

    def finish(self) -> None:
        """At the end, when the device is done."""
        self._add(self._events)
        self._events = []
        self.seconds = time.perf_counter() - self._began

    def _add(self, events: list[tuple[Any, Any]]) -> None:
        for (_, end), (begin, _) in zip(events, events[1:], strict=False):
            self.idle += end.elapsed_time(begin) / 1e3

    def told(self, decoded: int, rows: int) -> str | None:
        """What the steps waited for, where it was more than a tenth of the time.

        decoded, rows  image files that were decoded in the epoch, of all that it read
        """
        share = self.idle / self.seconds if self.seconds else 0.0
        if share <= WORTH_SAYING:
            return None
        what = "the host"
        if 2 * self.fetching >= self.idle:
            what = "image files to be decoded" if 2 * decoded > rows else "batches to be read"
        return f"{share:.0%} of the time the step waited for {what}"
