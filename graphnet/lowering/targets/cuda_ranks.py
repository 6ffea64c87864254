"""A step over several ranks on GPUs, as CUDA graphs with the collectives between them.

A collective runs on a stream of its own, behind the graph that fills its bucket and beside the ones
that follow; before a graph whose launches come behind it in the plan, the main stream waits. All
ranks cut the same plan, so they meet the same collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphnet.lowering.launch.steps import Collective
from graphnet.lowering.plan.plan import Plan

Segment = tuple[bool, bool, tuple[int, ...]]


def segments_of(plan: Plan) -> list[Segment]:
    """(whether it is a collective, whether it comes behind one that may still run, its steps), in
    the plan's order."""
    before: dict[int, set[int]] = {}
    for a, b in plan.edges:
        before.setdefault(b, set()).add(a)
    out: list[Segment] = []
    running: set[int] = set()  # steps that are, or stand behind, a collective not waited for
    open_steps: list[int] = []
    waits = False

    def close() -> None:
        nonlocal open_steps, waits
        if open_steps:
            out.append((False, waits, tuple(open_steps)))
        open_steps, waits = [], False

    for k, s in enumerate(plan.steps):
        behind = bool(before.get(k, set()) & running)
        if isinstance(s, Collective):
            close()
            out.append((True, False, (k,)))  # its stream keeps the order of collectives
            running.add(k)
            continue
        if behind:
            close()
            waits = True
            running.clear()  # the wait is for all of them
        open_steps.append(k)
    close()
    return out


class Segmented:
    """The segments as one call on fixed storage. `record` records the graphs, once.

    segment  gives the call of some steps: of launches one that records and replays them
    moved    (tensor, twin) where a tensor does not lie as the step reads it
    keep     what must live as long as the graphs
    """

    def __init__(
        self, segments: Sequence[Segment], segment: Callable[[Sequence[int]], Any],
        device: torch.device, moved: Sequence[tuple[torch.Tensor, torch.Tensor]], keep: object,
    ) -> None:  # fmt: skip
        self.device, self.moved, self.keep = device, moved, keep
        self.parts = [(together, waits, segment(steps)) for together, waits, steps in segments]
        self.beside = torch.cuda.Stream(device)

    def record(self) -> None:
        for together, _, part in self.parts:
            if not together:
                part.record()

    @torch.no_grad()
    def __call__(self) -> None:
        with torch.cuda.device(self.device):
            for original, twin in self.moved:
                twin.copy_(original)
            main = torch.cuda.current_stream()
            for together, waits, part in self.parts:
                if together:
                    self.beside.wait_stream(main)
                    with torch.cuda.stream(self.beside):
                        part()
                else:
                    if waits:
                        main.wait_stream(self.beside)
                    part()
            main.wait_stream(self.beside)
            for original, twin in self.moved:
                original.copy_(twin)
