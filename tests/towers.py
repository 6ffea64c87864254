"""Two towers for tests: the nets, and two ranks as threads of one process, which meet at a barrier
in place of gloo. Each has a net and programs of its own, as processes have."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import graphnet as gn
from graphnet.errors import ConfigError
from graphnet.runtime.group import Group, group_of


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
        self.first, self.stopping, self._host = rank == 0, False, None

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


def tiny() -> Any:
    """A net that the interpreter runs in a moment."""
    return gn.Sequential(
        gn.Conv2d(2, 8, 3, padding=1), gn.ReLU(), gn.LocalResponseNorm(3, k=2.0, groups=2),
        gn.MaxPool2d(2), gn.Conv2d(8, 8, 3, padding=1), gn.ReLU(), gn.Flatten(),
        gn.Dropout(0.5), gn.Linear(72, 10),
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


HOW = {"target": "cpu", "loss": gn.CrossEntropyLoss(), "seed": 3}
ROWS, STEPS = 4, 3


def sgd() -> Any:
    return gn.SGD(lr=0.05, momentum=0.9, weight_decay=5e-4)


def parts(group: Any) -> dict[str, Any]:
    return {} if group is None else {"group": group, "towers": True}


def kept(net: Any, step: Any) -> tuple[Any, Any]:
    """The net and the optimizer's state as a checkpoint holds them."""
    return net.state_dict(), step.optimizer.state_dict()


def results(
    group: Any, make: Callable[[], Any] = small, image: tuple[int, ...] = IMAGE,
    steps: int = STEPS, **how: Any,
) -> dict[str, Any]:  # fmt: skip
    """Logits, loss, gradients and what some steps make of a net, on one process or a rank."""
    net, shape, how = made(make), (ROWS, *image), {**HOW, **how}
    joined = group_of(group)
    if joined is not None and joined.rank:  # what rank 0 has wins
        for p in net.parameters():
            p.data = p.data + 1
    x, y = batches(1, ROWS, image)[0]
    found = {"logits": {"": gn.compile(net, shape, target="cpu", **parts(group))(x)}}
    plain = gn.compile(net, shape, grads=True, **HOW, **parts(group))
    loss, found["gradients"] = plain(x, y)
    step = gn.compile(net, shape, optimizer=sgd(), **how, **parts(group))
    losses = [step(x, y).clone() for x, y in batches(steps, ROWS, image)]
    found["losses"] = {"": torch.stack([loss, *losses])}
    found["params"], found["slots"] = kept(net, step)
    return found


def worst(got: Any, want: Any) -> dict[str, float]:
    """For each kind of result, how far its tensors are from what is wanted."""
    return {k: far(got[k], want[k]) for k in want}


def _alexnet(group: Any) -> dict[str, Any]:
    net = lambda: gn.models.alexnet_2012(norm_groups=2)
    return results(group, net, (3, 227, 227), steps=2)


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    try:
        torch.save(_alexnet("world"), f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


def full_size() -> list[dict[str, float]]:
    """How far alexnet_2012 on each of two gloo processes is from one process."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (folder,), nprocs=2)
        want = _alexnet(None)
        return [worst(torch.load(os.path.join(folder, str(r))), want) for r in range(2)]
