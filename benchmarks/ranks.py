"""What a second process costs: a training step on the cpu target in two processes of one thread
each, against one process of two threads, interleaved; and how long a step waits in collectives.

    python benchmarks/ranks.py                    # lenet5 at 128 images, alexnet at 16
    python benchmarks/ranks.py --rounds 5 lenet5:128

Both have the same images in a step. A round times each for at least a second; medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import graphnet as gn
from graphnet.runtime.group import Group

SECONDS = 1.0  # of a round
Batch = tuple[torch.Tensor, torch.Tensor]


def step_of(model: str, batch: int, ranks: int) -> tuple[Any, Batch]:
    """A step and a batch of this process."""
    torch.manual_seed(0)
    net = getattr(gn.models, model)()
    shape = (-(-batch // ranks), *net.input_shape)
    step = gn.compile(
        net, shape, target="cpu", loss=gn.CrossEntropyLoss(), optimizer=gn.SGD(0.01, momentum=0.9),
        group="world" if ranks > 1 else None,
    )  # fmt: skip
    return step, (torch.randn(shape), torch.randint(0, step.classes, shape[:1]))


def timed(step: Any, batch: Batch, steps: int) -> float:
    """Seconds a step."""
    start = time.perf_counter()
    for _ in range(steps):
        float(step(*batch))
    return (time.perf_counter() - start) / steps


class Waits:
    """How long this process has stood in collectives, and how many there were."""

    def __init__(self) -> None:
        self.seconds, self.calls, self._sum = 0.0, 0, Group.sum

    def sum(self, group: Group, t: torch.Tensor) -> Any:
        start = time.perf_counter()
        wait = self._sum(group, t)
        self.seconds, self.calls = self.seconds + time.perf_counter() - start, self.calls + 1

        def waiting() -> None:
            start = time.perf_counter()
            wait()
            self.seconds += time.perf_counter() - start

        return waiting


def process(rank: int, folder: str, model: str, batch: int, rounds: int) -> None:
    """Rank 0 also times the step of one process, while the other waits."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    waits = Waits()
    Group.sum = lambda group, t: waits.sum(group, t)  # type: ignore[method-assign]
    two = step_of(model, batch, 2)
    one = step_of(model, batch, 1) if rank == 0 else None
    told = torch.zeros(1, dtype=torch.int64)
    found: list[tuple[float, float, float, float]] = []
    for k in range(rounds + 1):
        alone = 0.0
        if one is not None:
            torch.set_num_threads(2)
            told[0] = max(1, int(SECONDS / timed(*one, 2)))
            alone = timed(*one, int(told))
            torch.set_num_threads(1)
        dist.broadcast(told, 0)
        timed(*two, 2)
        waits.seconds, waits.calls = 0.0, 0
        together, steps = timed(*two, int(told)), int(told)
        if k:  # the first warms up
            found.append((alone, together, waits.seconds / steps, waits.calls / steps))
    if rank == 0:
        alone, together, waited, calls = (statistics.median(v) for v in zip(*found, strict=True))
        ratio = sorted(b / a for a, b, *_ in found)
        print(
            f"{model} b{batch}: one process of 2 threads {1e3 * alone:.2f} ms, two of 1 thread "
            f"{1e3 * together:.2f} ms, {statistics.median(ratio):.2f} "
            f"({ratio[0]:.2f}-{ratio[-1]:.2f}) times as long; in {calls:.0f} collectives "
            f"{1e3 * waited:.2f} ms a step, {waited / together:.0%}"
        )
    dist.destroy_process_group()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("nets", nargs="*", default=["lenet5:128", "alexnet:16"])
    options.add_argument("--rounds", type=int, default=9)
    given = options.parse_args()
    print(f"{os.cpu_count()} processors, torch {torch.__version__}, {given.rounds} rounds")
    for net in given.nets:
        model, _, batch = net.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(process, (folder, model, int(batch), given.rounds), nprocs=2)


if __name__ == "__main__":
    main()
