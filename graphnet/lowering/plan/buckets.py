"""Buckets: what one collective sums lies behind one another, so that gradients are written straight
into the memory that travels, and come back to where their updates read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from graphnet.lowering.launch.steps import Collective, Step
from graphnet.lowering.plan.memory import Life, Slot, round_up

Buckets = dict[str, dict[str, Slot]]


def bucketed(
    steps: Sequence[Step], lives: Mapping[str, Life]
) -> tuple[tuple[Step, ...], dict[str, Life], Buckets]:
    """(the steps with their buckets named; lives, in which a bucket stands for its members; of each
    bucket the places of its members in it).

    A collective has a bucket where all that it writes lies in the arena. What lies elsewhere is
    copied when it runs.
    """
    out, left, buckets = list(steps), dict(lives), Buckets()
    for k, s in enumerate(steps):
        if not isinstance(s, Collective) or s.op != "all_reduce" or len(s.outs) < 2:
            continue
        if not all(n in left for n in s.writes):
            continue
        name, at = f".bucket{len(buckets)}", 0
        places: dict[str, Slot] = {}
        for n in s.writes:
            size = round_up(left[n].size)
            places[n] = Slot(at, size)
            at += size
        members = [left.pop(n) for n in s.writes]
        writers = sorted({w for m in members for w in m.writers})
        readers = sorted({r for m in members for r in m.readers})
        left[name] = Life(at, tuple(writers), tuple(readers))
        buckets[name] = places
        out[k] = replace(s, bucket=name)
    return tuple(out), left, buckets


def opened(buckets: Buckets, arena: Mapping[str, Slot]) -> dict[str, Slot]:
    """Where the members of the buckets lie, from where the buckets do."""
    return {
        n: Slot(arena[name].offset + at.offset, at.size)
        for name, places in buckets.items()
        for n, at in places.items()
    }
