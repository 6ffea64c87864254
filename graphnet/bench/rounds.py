"""Interleaved timing: in each round every contestant runs once, in an order that rotates.

Machines drift (clocks, neighbours), so times are compared within a round alone: a ratio is the
median over rounds of one contestant's time over the other's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Run = Callable[[int], None]  # runs n steps and returns when they are done


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Quartiles:
        if len(values) < 2:
            return Quartiles(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Quartiles(median, low, high)


@dataclass(frozen=True)
class Timing:
    """Times of one contestant.

    cold_s  the first step of all, with whatever is built at it
    warm_s  the second one
    ms      of a step, one figure a round
    """

    cold_s: float
    warm_s: float
    ms: tuple[float, ...]

    @property
    def steady(self) -> Quartiles:
        return Quartiles.of(list(self.ms))


def _seconds(run: Run, steps: int) -> float:
    start = time.perf_counter()
    run(steps)
    return time.perf_counter() - start


def measure(
    contestants: Mapping[str, Run],
    *,
    rounds: int,
    seconds: float,
    on_round: Callable[[dict[str, Timing]], None] = lambda times: None,
) -> dict[str, Timing]:
    """Times them all: `rounds` rounds that together take about `seconds`.

    `on_round` gets what there is after each round.
    """
    first = {name: (_seconds(run, 1), _seconds(run, 1)) for name, run in contestants.items()}
    guess = {name: min(_seconds(run, 1) for _ in range(3)) for name, run in contestants.items()}
    share = seconds / rounds / len(contestants)
    steps = {name: max(1, round(share / max(guess[name], 1e-7))) for name in contestants}
    names = list(contestants)
    ms: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds):
        at = k % len(names)
        for name in names[at:] + names[:at]:
            taken = _seconds(contestants[name], steps[name])
            ms[name].append(1e3 * taken / steps[name])
        times = {name: Timing(*first[name], tuple(ms[name])) for name in names}
        on_round(times)
    return times


def ratio(peer: Timing, ours: Timing) -> Quartiles:
    """How many times as long the peer takes, over the rounds."""
    return Quartiles.of([a / b for a, b in zip(peer.ms, ours.ms, strict=True)])
