"""Steps of the cpu target that behave as recorded ones of a GPU do, with their replays counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from graphnet.lowering.targets import cpu


class Recorded:
    """As `lowering.targets.cuda.Replayed`; `counts` holds the replays by their number of steps."""

    counts: Counter[int] = Counter()

    def __init__(self, once: Callable[[], None], steps: int = 1) -> None:
        self.once, self.steps = once, steps

    def record(self) -> None:
        """Nothing runs."""

    def __call__(self) -> None:
        self.counts[self.steps] += 1
        self.once()

    def behind(self, first: Recorded, times: int) -> Recorded:
        def once() -> None:
            for _ in range(times):
                first.once()
                self.once()

        return Recorded(once, times)


@contextmanager
def recorded(monkeypatch: Any, idle: bool = False) -> Iterator[Counter[int]]:
    """Inside, programs of target cpu are recorded; `idle` ones run nothing."""
    real = cpu.prepare

    def prepare(plan: Any, storage: Any) -> Recorded:
        run = real(plan, storage)
        return Recorded((lambda: None) if idle else run)

    Recorded.counts.clear()
    with monkeypatch.context() as m:
        m.setattr(cpu, "prepare", prepare)
        yield Recorded.counts
