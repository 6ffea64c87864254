"""Where each value lies in the arena, by the partial order of the steps.

Two buffers may share memory only if every use of one comes before every write of the other on
every legal order, since branches may run at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALIGN = 256  # bytes; what a fresh allocation on the device has


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


def assign(lives: Mapping[str, Life], reach: Sequence[int]) -> tuple[dict[str, Slot], int]:
    """(slot by buffer, bytes of the arena): the largest first, each into the tightest gap."""
    slots: dict[str, Slot] = {}
    order = sorted(lives, key=lambda n: (-lives[n].size, lives[n].writers[0], n))
    for name in order:
        life, size = lives[name], round_up(lives[name].size)
        taken = sorted(
            (s.offset, s.end)
            for other, s in slots.items()
            if not precedes(life, lives[other], reach) and not precedes(lives[other], life, reach)
        )
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
