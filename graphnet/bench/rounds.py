"""Interleaved timing: in each round every contestant runs once, in an order that rotates.

Machines drift (clocks, neighbours), so times are compared within a round alone: a ratio is the
median over rounds of one contestant's time over the other's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Run = Callable[[int], None]  # issues n steps; on a GPU it may return before they are done
WARM_STEPS = 5  # after the first one
HOST_STEPS = 8  # too few to fill the queue of a GPU, which would make the host wait


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Quartiles:
        if len(values) < 2:
            return Quartiles(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Quartiles(median, low, high)


@dataclass
class Contestant:
    """Something to be timed, started: built and run for the first time.

    cold_s      from nothing to the end of the first step: building, compiling, capturing
    warm_ms     of each of the next few steps
    peak_bytes  on a GPU: most memory held at once from the building on; else None
    """

    name: str
    kind: str
    run: Run
    device: torch.device
    cold_s: float = 0.0
    warm_ms: tuple[float, ...] = ()
    peak_bytes: int | None = None

    def seconds(self, steps: int) -> float:
        """Time of n steps, to their end on the device."""
        begin = time.perf_counter()
        self.run(steps)
        wait(self.device)
        return time.perf_counter() - begin

    def host_us(self) -> float | None:
        """Microseconds of the host for a step; None where the host computes it as well."""
        if self.device.type == "cpu":
            return None
        wait(self.device)
        begin = time.perf_counter()
        self.run(HOST_STEPS)
        taken = time.perf_counter() - begin
        wait(self.device)
        return 1e6 * taken / HOST_STEPS


@dataclass
class Timing:
    """Times of a step, one figure a round; `host_us` is empty where the host is the device."""

    ms: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)

    @property
    def steady(self) -> Quartiles:
        return Quartiles.of(self.ms)


def wait(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start(name: str, kind: str, build: Callable[[], Run], device: torch.device) -> Contestant:
    """Builds a contestant and runs its first steps."""
    held = 0
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    made = Contestant(name, kind, build(), device)
    made.run(1)
    wait(device)
    made.cold_s = time.perf_counter() - begin
    made.warm_ms = tuple(1e3 * made.seconds(1) for _ in range(WARM_STEPS))
    if device.type == "cuda":
        made.peak_bytes = torch.cuda.max_memory_allocated(device) - held
    return made


def measure(
    contestants: Sequence[Contestant],
    *,
    rounds: int,
    seconds: float,
    on_round: Callable[[dict[str, Timing]], None] = lambda times: None,
    on_failure: Callable[[Contestant, Exception], None] | None = None,
) -> dict[str, Timing]:
    """Times them all: `rounds` rounds that together take about `seconds`.

    on_round    gets what there is after each round
    on_failure  is told of a contestant that fails, and that leaves; without it the error is raised
    """
    share = seconds / rounds / len(contestants)
    steps = {c.name: max(1, round(share / max(1e-3 * min(c.warm_ms), 1e-7))) for c in contestants}
    times = {c.name: Timing() for c in contestants}
    left = list(contestants)
    for k in range(rounds):
        at = k % len(left)
        for c in [*left[at:], *left[:at]]:
            try:
                host, taken = c.host_us(), c.seconds(steps[c.name])
            except Exception as error:
                if on_failure is None:
                    raise
                on_failure(c, error)
                left.remove(c)
                del times[c.name]
                continue
            times[c.name].ms.append(1e3 * taken / steps[c.name])
            times[c.name].host_us += [] if host is None else [host]
        on_round(times)
    return times


def sentence(error: Exception) -> str:
    """An error on one line, cut to what a table can hold."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def ratio(peer: Timing, ours: Timing) -> Quartiles:
    """How many times as long the peer takes, over the rounds."""
    return Quartiles.of([a / b for a, b in zip(peer.ms, ours.ms, strict=True)])


def best(times: Mapping[str, Timing], names: Sequence[str]) -> str:
    """The quickest of the named contestants."""
    return min(names, key=lambda name: times[name].steady.median)
