"""Which launches of a plan run as one: a launch costs over a microsecond, whatever it does.

Of a step the longest path to the end of the plan is its distance. Steps of one distance are never
connected by a path, and where all that are joined have one distance, no circle can close: every
edge leads to a smaller one. So legality needs no search; data, reads before writes and the order of
writers are all edges. What nothing waits for, as the updates, has distance 0 and meets there. A
step that finds nobody at its distance may take a larger one, up to where what it waits for stands:
edges still lead to smaller ones.

Before that, what is one program and waits for what is one program takes its turn in the same one:
the mean of a loss and its record. It has to be the next step, so that no other path connects both,
and may wait for nothing else, so that what waits for the first one waits no longer.

A group pays where its members are small: what a launch of its own costs is a large part of their
time, and their programs find free processors beside each other. Large launches gain nothing, and
would take the registers of the most demanding member; one that is not too large may be host to
small ones. Hosts, and what takes turns, were not chosen by a measurement of them alone. All
that a group touches is alive at once, so what waits for the group stays in memory until then; small
launches touch little.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graphnet import config
from graphnet.lowering.launch.config import PROCESSORS, cdiv
from graphnet.lowering.launch.cost import floor_us
from graphnet.lowering.launch.group import GROUPS, group, outside
from graphnet.lowering.launch.steps import Launch, Step
from graphnet.lowering.plan.schedule import Edges, program_order

SMALL_US = 1.0  # by its floor; a launch costs 1.3 us (H100)
HOST_US = 4.0
SMALL_PROGRAMS = 2 * PROCESSORS  # they all run at once, beside those of others
MOST = 8  # members: the compile time of a group is the sum of theirs

Alone = tuple[tuple[Launch, str], ...]


def small(step: Step, most: float = SMALL_US) -> bool:
    """Whether a launch takes hardly longer than its start."""
    return (
        isinstance(step, Launch)
        and step.programs <= SMALL_PROGRAMS
        and floor_us(step.flops, step.bytes, step.math) <= most
    )


@dataclass(frozen=True)
class Unit:
    """Launches that run one after the other in one program, or a launch alone."""

    steps: tuple[int, ...]
    launches: tuple[Launch, ...]

    @property
    def single(self) -> bool:
        return self.launches[0].programs == 1

    @property
    def measured(self) -> bool:
        """Whether a measurement of a launch alone chose one of them."""
        return any(s.choice is not None and s.choice.source == "measured" for s in self.launches)

    @property
    def turns(self) -> bool:
        """Whether it can be followed in its program, or follow."""
        return self.single and not self.host and not self.measured

    @property
    def warps(self) -> int:
        return max(s.num_warps for s in self.launches)

    @property
    def host(self) -> bool:
        return not small(self.launches[0])

    def beside(self, other: Unit) -> bool:
        """Whether both may be in one group, as far as programs and warps go: what is one program
        may have more warps than were chosen for it, others may not."""
        if self.single and other.single:
            return not (self.host and other.host)
        if self.single or other.single:
            one, more = (self, other) if self.single else (other, self)
            return one.warps <= more.warps
        return self.warps == other.warps and not (self.host or other.host)


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
    units: dict[int, Unit] = {}  # by the step in whose place it runs
    alone: dict[Launch, str] = {}
    for k, s in enumerate(steps):
        if not isinstance(s, Launch) or not small(s, HOST_US):
            continue
        why = f"GRAPHNET_DISABLE names {GROUPS}" if GROUPS in config.disabled() else outside(s)
        if why is not None and small(s):
            alone[s] = why
        elif why is None and (small(s) or not Unit((k,), (s,)).measured):
            units[k] = Unit((k,), (s,))
    home = list(range(len(steps)))
    _take_turns(units, home, edges)
    far = distances(len(steps), _moved(edges, home))
    _meet(units, far, _moved(edges, home))
    joined: dict[int, Launch] = {}
    for members in _shared_out(units, far):
        first = units[members[0]]
        if len(members) > 1 or len(first.launches) > 1:
            joined[members[0]] = group([units[k].launches for k in members])
            for k in members:
                for step in units[k].steps:
                    home[step] = members[0]
        elif not first.host:
            others = [k for k in units if far[k] == far[members[0]] and not units[k].host]
            alone[first.launches[0]] = (
                "what may run at the same time has other numbers of warps" if len(others) > 1
                else "nothing small may run at the same time"
            )  # fmt: skip
    moved = _moved(edges, home)
    order = [k for k in program_order(len(steps), moved) or () if home[k] == k]
    at = {k: n for n, k in enumerate(order)}
    return (
        [joined.get(k, steps[k]) for k in order],
        {(at[a], at[b]) for a, b in moved},
        tuple(alone.items()),
    )


def _moved(edges: Edges, home: Sequence[int]) -> Edges:
    """The edges between what runs in the places of steps."""
    return {(home[a], home[b]) for a, b in edges if home[a] != home[b]}


def _take_turns(units: dict[int, Unit], home: list[int], edges: Edges) -> None:
    """Joins single programs with the next step where that is one, too."""
    while True:
        now = _moved(edges, home)
        far = distances(len(home), now)
        pair = next(
            ((a, b) for a, b in sorted(now)
             if a in units and b in units and units[a].turns and units[b].turns
             and far[a] == far[b] + 1
             and all(c == a or (c, a) in now for c, d in now if d == b)
             and len(units[a].steps) + len(units[b].steps) <= MOST), None,
        )  # fmt: skip
        if pair is None:
            return
        first, second = units[pair[0]], units.pop(pair[1])
        units[pair[0]] = Unit(first.steps + second.steps, first.launches + second.launches)
        for k in second.steps:
            home[k] = pair[0]


def _meet(units: dict[int, Unit], far: list[int], edges: Edges) -> None:
    """Moves what is alone at its distance to the next one where a group takes it."""
    for k in sorted((k for k in units if not units[k].host), key=lambda k: far[k]):

        def takes(distance: int, k: int = k) -> bool:
            others = (o for o in units if o != k and far[o] == distance)
            return any(units[k].beside(units[o]) for o in others)

        least = min((far[a] for a, b in edges if b == k), default=len(far))
        if not takes(far[k]):
            far[k] = next((d for d in range(far[k] + 1, least) if takes(d)), far[k])


def _shared_out(units: dict[int, Unit], far: Sequence[int]) -> Iterator[list[int]]:
    """The units by groups. At each distance those of equal warps are one, with one host; what is
    one program joins the largest, or else a host."""
    levels: dict[int, list[int]] = defaultdict(list)
    for k in sorted(units):
        levels[far[k]].append(k)
    for level in levels.values():
        alike: dict[int, list[int]] = defaultdict(list)
        for k in level:
            if not (units[k].single or units[k].host):
                alike[units[k].warps].append(k)
        hosts = []
        for k in (k for k in level if units[k].host):
            small_ones = alike.get(units[k].warps, [])
            if small_ones and not any(units[o].host for o in small_ones):
                small_ones.append(k)  # they run beside its first programs
            else:
                hosts.append([k])
        sorts = sorted(alike.values(), key=len, reverse=True) + hosts
        for k in level:
            if units[k].single and not units[k].host:
                fits = (s for s in sorts if all(units[k].beside(units[o]) for o in s))
                into = next(fits, None)
                if into is None:
                    sorts.append([k])
                else:
                    into.append(k)
        for members in map(sorted, sorts):
            size = cdiv(len(members), cdiv(len(members), MOST))
            yield from (members[i : i + size] for i in range(0, len(members), size))
