"""The order in which the steps run, and which of them may run at once.

One stream by default: a total order lets buffers share memory by launch order. The order is chosen
for memory: of the steps that can run, the one that leaves least behind. A weight gradient so runs
as soon as its operands are complete, and they die there.

Over several ranks time comes first: steps run in the order of the collectives that wait for them,
so that messages travel beside the rest of backward, and what no collective waits for runs last.

A second stream holds what the budget says overlaps: long memory-bound steps that end in the state
(the update of a fully connected layer, bound by traffic) beside the rest, which is bound by
arithmetic. They wait for what they need, and the end of the step waits for them. GRAPHNET_STREAMS=0
leaves all of it on one stream.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from graphnet import config
from graphnet.lowering.launch.aside import goes_aside
from graphnet.lowering.launch.steps import Collective, Launch, Step

Edges = set[tuple[int, int]]


def _links(count: int, edges: Edges) -> tuple[list[list[int]], list[int]]:
    after: list[list[int]] = [[] for _ in range(count)]
    missing = [0] * count
    for a, b in edges:
        after[a].append(b)
        missing[b] += 1
    return after, missing


def program_order(count: int, edges: Edges) -> list[int] | None:
    """The order nearest to the program's that keeps the edges; None for a cycle."""
    after, missing = _links(count, edges)
    ready = [k for k in range(count) if not missing[k]]
    heapq.heapify(ready)
    out = []
    while ready:
        k = heapq.heappop(ready)
        out.append(k)
        for b in after[k]:
            missing[b] -= 1
            if not missing[b]:
                heapq.heappush(ready, b)
    return out if len(out) == count else None


def _turns(steps: Sequence[Step], edges: Edges) -> list[int]:
    """When each step should run, small ones first; all are alike without a collective. A step runs
    in the turn of the first collective that waits for it; those that none waits for come last, in
    the order of the collectives before them."""
    sums = [k for k, s in enumerate(steps) if isinstance(s, Collective)]
    number = {k: n for n, k in enumerate(sums)}
    order = program_order(len(steps), edges) if sums else None
    if order is None:
        return [0] * len(steps)
    after, _ = _links(len(steps), edges)
    none = len(sums)
    first = [number.get(k, none) for k in range(len(steps))]
    behind = [number.get(k, -1) for k in range(len(steps))]
    for k in reversed(order):
        first[k] = min([first[k], *(first[b] for b in after[k])])
    for k in order:
        for b in after[k]:
            behind[b] = max(behind[b], behind[k])
    return [f if f < none else none + 1 + b for f, b in zip(first, behind, strict=True)]


def memory_order(steps: Sequence[Step], edges: Edges, sizes: Mapping[str, int]) -> list[int]:
    """A legal order: always the ready step that adds least to the live bytes of `sizes`, of those
    whose turn it is (`_turns`).

    `sizes` are the buffers that die: name to bytes. Ties keep the program's order.
    """
    after, missing = _links(len(steps), edges)
    uses = {name: sum(name in (*s.reads, *s.writes) for s in steps) for name in sizes}
    live: set[str] = set()
    ready = {k for k in range(len(steps)) if not missing[k]}
    out: list[int] = []
    turns = _turns(steps, edges)

    def added(k: int) -> tuple[int, int, int]:
        touched = {n for n in (*steps[k].reads, *steps[k].writes) if n in sizes}
        born = sum(sizes[n] for n in touched if n not in live)
        dead = sum(sizes[n] for n in touched if uses[n] == 1)
        return turns[k], born - dead, k

    while ready:
        k = min(ready, key=added)
        ready.remove(k)
        out.append(k)
        for name in {n for n in (*steps[k].reads, *steps[k].writes) if n in sizes}:
            live.add(name)
            uses[name] -= 1
        for b in after[k]:
            missing[b] -= 1
            if not missing[b]:
                ready.add(b)
    return out


def streams_of(steps: Sequence[Step], edges: Edges) -> tuple[int, ...]:
    """The stream of each step: 1 for collectives or, where there are none, for long memory-bound
    steps that nothing waits for, else 0."""
    if config.streams() == 0:
        return (0,) * len(steps)
    waited = {a for a, _ in edges}
    if any(isinstance(s, Collective) for s in steps):
        waited |= set(range(len(steps)))  # a message must not wait for an update before it
    return tuple(
        int(
            isinstance(s, Collective)
            or (isinstance(s, Launch) and k not in waited and goes_aside(s))
        )
        for k, s in enumerate(steps)
    )


def chained(streams: Sequence[int], edges: Edges) -> Edges:
    """The edges, and those between neighbours of one stream."""
    out = set(edges)
    last: dict[int, int] = {}
    for k, stream in enumerate(streams):
        if stream in last:
            out.add((last[stream], k))
        last[stream] = k
    return out
