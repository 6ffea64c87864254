"""Two towers for tests: the nets, and two ranks as threads of one process, which meet at a barrier
in place of gloo. Each has a net and programs of its own, as processes have."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

import graphnet as gn
from graphnet.errors import ConfigError
from graphnet.runtime.group import Group


class _Meeting:
    """Where the threads of all ranks show one another what they hold."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.held: list[Any] = [None] * ranks

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.held[rank] = value
        self.barrier.wait()
        found = list(self.held)
        self.barrier.wait()
        return found


class Thread(Group):
    """A rank that is a thread."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.meeting, self.rank, self.ranks = meeting, rank, len(meeting.held)
        self.first, self.stopping = rank == 0, False

    def gather(self, t: torch.Tensor) -> list[torch.Tensor]:
        return self.meeting.exchange(self.rank, t.contiguous().clone())

    def sum(self, t: torch.Tensor) -> Callable[[], None]:
        t.copy_(torch.stack(self.gather(t)).sum(0))
        return lambda: None

    def collect(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, value)

    def tell(self, value: Any) -> Any:
        return self.collect(value)[0]

    def agree(self, facts: Any, help: str = "") -> None:
        first, *rest = self.collect({k: str(v) for k, v in facts.items()})
        if any(other != first for other in rest):
            raise ConfigError("the ranks do not run the same step")

    def share(self, tensors: Any) -> None:
        for t in tensors:
            t.copy_(self.gather(t.detach())[0])


def both(work: Callable[[Any], Any], ranks: int = 2) -> list[Any]:
    """What `work` gives on each rank; what a rank raises is raised."""
    meeting = _Meeting(ranks)
    found: list[Any] = [None] * ranks
    errors: list[BaseException | None] = [None] * ranks

    def run(rank: int) -> None:
        try:
            found[rank] = work(Thread(meeting, rank))
        except BaseException as error:
            errors[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(r,)) for r in range(ranks)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    raised = [e for e in errors if e is not None]
    for error in raised:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if raised:
        raise raised[0]
    return found


def small(num_classes: int = 10, dropout: float = 0.5) -> Any:
    """alexnet_2012 with an eighth of the channels, for 3x67x67: the same layers in the same order,
    norms within each half."""
    norm = lambda: gn.LocalResponseNorm(5, k=2.0, alpha=1e-2, alpha_mode="sum", groups=2)
    return gn.Sequential(
        gn.Conv2d(3, 12, 11, 4), gn.ReLU(), norm(), gn.MaxPool2d(3, 2),
        gn.Conv2d(12, 32, 5, padding=2, groups=2), gn.ReLU(), norm(), gn.MaxPool2d(3, 2),
        gn.Conv2d(32, 48, 3, padding=1), gn.ReLU(),
        gn.Conv2d(48, 48, 3, padding=1, groups=2), gn.ReLU(),
        gn.Conv2d(48, 32, 3, padding=1, groups=2), gn.ReLU(), gn.MaxPool2d(3, 2), gn.Flatten(),
        gn.Linear(32, 64), gn.ReLU(), gn.Dropout(dropout),
        gn.Linear(64, 64), gn.ReLU(), gn.Dropout(dropout), gn.Linear(64, num_classes),
    )  # fmt: skip


IMAGE = (3, 67, 67)
_drawing = threading.Lock()


def made(make: Callable[[], Any] = small) -> Any:
    """A net with the same values each time: threads share torch's generator."""
    with _drawing:
        torch.manual_seed(0)
        return make()


def batches(steps: int, rows: int, image: tuple[int, ...] = IMAGE) -> list[Any]:
    """Batches, of which the last one is smaller."""
    g = torch.Generator().manual_seed(1)
    sizes = [rows] * (steps - 1) + [rows - 1]
    return [
        (torch.randn(n, *image, generator=g), torch.randint(0, 10, (n,), generator=g))
        for n in sizes
    ]


def far(got: Any, want: Any) -> float:
    """The largest relative norm of the difference between tensors of the same names."""
    assert got.keys() == want.keys()
    norm = lambda t: float(t.double().norm())
    return max(norm(got[k] - want[k]) / max(norm(want[k]), 1e-12) for k in want)
