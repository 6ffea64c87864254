"""Which launches of a plan run as one: a launch costs over a microsecond, whatever it does.

Of a step the longest path to the end of the plan is its distance. Steps of one distance are never
connected by a path, and where all that are joined have one distance, no circle can close: every
edge leads to a smaller one. So legality needs no search; data, reads before writes and the order of
writers are all edges. What nothing waits for, as the updates, has distance 0 and meets there. A
step that finds nobody at its distance may take a larger one, up to where what it waits for stands:
edges still lead to smaller ones.

A group pays where its members are small: what a launch of its own costs is a large part of their
time, and their programs find free processors beside each other. Large launches gain nothing, and
would take the registers of the most demanding member. All that a group touches is alive at once, so
what waits for the group stays in memory until then; small launches touch little.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from graphnet import config
from graphnet.lowering.launch.config import PROCESSORS, cdiv
from graphnet.lowering.launch.cost import floor_us
from graphnet.lowering.launch.group import GROUPS, group, outside
from graphnet.lowering.launch.steps import Launch, Step
from graphnet.lowering.plan.schedule import Edges, program_order

SMALL_US = 1.0  # by its floor; a launch costs 1.3 us (H100)
SMALL_PROGRAMS = 2 * PROCESSORS  # they all run at once, beside those of others
MOST = 8  # members: the compile time of a group is the sum of theirs

Alone = tuple[tuple[Launch, str], ...]


def small(step: Step) -> bool:
    """Whether a launch takes hardly longer than its start."""
    return (
        isinstance(step, Launch)
        and step.programs <= SMALL_PROGRAMS
        and floor_us(step.flops, step.bytes, step.math) <= SMALL_US
    )


def distances(count: int, edges: Edges) -> list[int]:
    """Of each step the number of edges on the longest path from it to the end."""
    order = program_order(count, edges)
    assert order is not None
    after: dict[int, list[int]] = defaultdict(list)
    for a, b in edges:
        after[a].append(b)
    out = [0] * count
    for k in reversed(order):
        out[k] = max((1 + out[b] for b in after[k]), default=0)
    return out


def grouped(steps: Sequence[Step], edges: Edges) -> tuple[list[Step], Edges, Alone]:
    """(the steps with groups in place of their members, in a legal order; their edges; small
    launches that are in no group, and why)."""
    levels: dict[int, dict[int, Launch]] = defaultdict(dict)
    alone: dict[Launch, str] = {}
    far = distances(len(steps), edges)
    for k, s in enumerate(steps):
        if not isinstance(s, Launch) or not small(s):
            continue
        why = f"GRAPHNET_DISABLE names {GROUPS}" if GROUPS in config.disabled() else outside(s)
        if why is None:
            levels[far[k]][k] = s
        else:
            alone[s] = why
    _meet(levels, far, edges)
    home = list(range(len(steps)))  # of each step the one in whose place it runs
    joined: dict[int, Launch] = {}
    for level in filter(None, levels.values()):
        for chosen in _shared_out(level):
            if len(chosen) > 1:
                joined[chosen[0]] = group([level[k] for k in chosen])
                for k in chosen:
                    home[k] = chosen[0]
            elif len(level) == 1:
                alone[level[chosen[0]]] = "nothing small may run at the same time"
            else:
                alone[level[chosen[0]]] = "what may run at the same time has other numbers of warps"
    moved = {(home[a], home[b]) for a, b in edges}
    order = [k for k in program_order(len(steps), moved) or () if home[k] == k]
    at = {k: n for n, k in enumerate(order)}
    return (
        [joined.get(k, steps[k]) for k in order],
        {(at[a], at[b]) for a, b in moved},
        tuple(alone.items()),
    )


def _meet(levels: dict[int, dict[int, Launch]], far: list[int], edges: Edges) -> None:
    """Moves launches that are alone at their distance to the next one where a group takes them."""
    for level in sorted(levels):
        if len(levels[level]) != 1:
            continue
        ((k, s),) = levels[level].items()
        least = min((far[a] for a, b in edges if b == k), default=len(far))
        for other in range(level + 1, least):
            fits = [m for m in levels.get(other, {}).values()
                    if 1 in (m.programs, s.programs) or m.num_warps == s.num_warps]  # fmt: skip
            if fits:
                far[k] = other
                levels[other][k] = levels[level].pop(k)
                break


def _shared_out(level: Mapping[int, Launch]) -> Iterator[list[int]]:
    """Launches that may run at once as groups of equal warps, and of one those that no group takes.
    What is one program joins the largest: it has no tiles that were chosen for its warps."""
    alike: dict[int, list[int]] = defaultdict(list)
    for k, s in level.items():
        if s.programs > 1:
            alike[s.num_warps].append(k)
    sorts = sorted(alike.values(), key=len, reverse=True) or [[]]
    sorts[0] += [k for k, s in level.items() if s.programs == 1]
    for members in sorts:
        size = cdiv(len(members), cdiv(len(members), MOST))
        for i in range(0, len(members), size):
            yield sorted(members[i : i + size])
