"""Where each value lies in the arena, by the partial order of the steps.

Two buffers may share memory only if every use of one comes before every write of the other on
every legal order, since branches may run at once; or if a step replaces one by the other, element
by element.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

ALIGN = 256  # bytes; what a fresh allocation on the device has
PACKINGS = 48  # tried; each takes well under a millisecond


@dataclass(frozen=True)
class Slot:
    """Bytes [offset, offset + size) of the arena."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class Life:
    """The steps that write and read a buffer."""

    size: int
    writers: tuple[int, ...]
    readers: tuple[int, ...] = ()


def round_up(n: int) -> int:
    """The next multiple of ALIGN, at least one."""
    return max(ALIGN, -(-n // ALIGN) * ALIGN)


def reachability(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """Per step the bitset of the steps that must come after it. Steps are in a legal order."""
    after: list[list[int]] = [[] for _ in range(count)]
    for a, b in edges:
        after[a].append(b)
    out = [0] * count
    for a in reversed(range(count)):
        for b in after[a]:
            out[a] |= out[b] | 1 << b
    return out


def precedes(first: Life, second: Life, reach: Sequence[int]) -> bool:
    """Whether every use of `first` comes before every write of `second`."""
    written = 0
    for w in second.writers:
        written |= 1 << w
    return all(reach[use] & written == written for use in (*first.writers, *first.readers))


def overlaid(
    lives: Mapping[str, Life], pairs: Iterable[tuple[int, str, str]], reach: Sequence[int]
) -> tuple[dict[str, Life], dict[str, str]]:
    """(lives with results merged into operands, result to the buffer whose memory it takes over).

    pairs  (step, operand, result) that the step reads and writes at one index, in step order. The
           result moves in where the step alone writes it and is the operand's last use.
    """
    merged, home = dict(lives), dict[str, str]()
    for step, operand, result in pairs:
        operand = home.get(operand, operand)
        a, b = merged.get(operand), merged.get(result)
        if a is None or b is None or a.size != b.size:
            continue
        if b.writers != (step,) or step in a.writers:
            continue
        if all(reach[use] >> step & 1 for use in {*a.writers, *a.readers} - {step}):
            writers, readers = (*a.writers, *b.writers), (*a.readers, *b.readers)
            merged[operand] = Life(a.size, writers, readers)
            home[result] = operand
            del merged[result]
    return merged, home


def assign(lives: Mapping[str, Life], reach: Sequence[int]) -> tuple[dict[str, Slot], int]:
    """(slot by buffer, bytes of the arena), the smallest of several packings.

    Each packs one buffer after the other into the tightest gap, first those beside which most
    bytes live. Then the topmost buffer moves to the front of the order, and all is packed again.
    """
    beside: dict[str, set[str]] = {n: set() for n in lives}
    for a, b in combinations(lives, 2):
        if not (precedes(lives[a], lives[b], reach) or precedes(lives[b], lives[a], reach)):
            beside[a].add(b)
            beside[b].add(a)
    crowd = {n: sum(lives[other].size for other in beside[n]) for n in lives}
    order = sorted(lives, key=lambda n: (-crowd[n], -lives[n].size, n))
    best, size = _packed(order, lives, beside)
    slots, top = best, size
    for _ in range(PACKINGS):
        last = next((n for n in order if slots[n].end == top), None)
        if last is None or last == order[0]:
            break
        order.remove(last)
        order.insert(0, last)
        slots, top = _packed(order, lives, beside)
        if top < size:
            best, size = slots, top
    return best, size


def _packed(
    order: Sequence[str], lives: Mapping[str, Life], beside: Mapping[str, set[str]]
) -> tuple[dict[str, Slot], int]:
    slots: dict[str, Slot] = {}
    for name in order:
        size = round_up(lives[name].size)
        taken = sorted((slots[n].offset, slots[n].end) for n in beside[name] & slots.keys())
        slots[name] = Slot(_tightest(taken, size), size)
    return slots, max((s.end for s in slots.values()), default=0)


def _tightest(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Offset of the smallest gap that holds `size`, else the end."""
    best, room, at = -1, 0, 0
    for start, end in taken:
        gap = start - at
        if gap >= size and (best < 0 or gap < room):
            best, room = at, gap
        at = max(at, end)
    return at if best < 0 else best
