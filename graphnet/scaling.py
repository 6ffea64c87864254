"""What a step over several ranks should take: a model, made of the plan and of rates on paper.

Launches last as `inspect` expects them to, collectives as a ring or a double binary tree does on a
link, whichever is shorter. Steps start when what they wait for has ended, as the plan's edges say.
Nothing here was measured with more than one GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, log2
from typing import Any

from graphnet.api import Lowered
from graphnet.errors import ConfigError
from graphnet.lowering.launch.steps import Collective, Launch
from graphnet.report import count, launch_times

# Of a collective, before its first message; and of each message from one GPU to the next: what
# NCCL's own model has for its protocol "Simple" (src/graph/tuning.cc).
START_US = 8.4
SHARE = 0.8  # of a link's rate that collectives reach; assumed
TOLD = 8  # bytes: the rows of each rank, and whether one stops


@dataclass(frozen=True)
class Link:
    """bytes_s: one direction of one GPU; hop_us: of a message to the next GPU."""

    bytes_s: float
    hop_us: float
    what: str


LINKS = {
    "nvlink": Link(450e9, 3.4, "NVLink 4, one direction"),
    "ib": Link(50e9, 14.0, "a port of 400 Gb/s InfiniBand for each GPU"),
    "eth": Link(12.5e9, 14.0, "a port of 100 Gb/s Ethernet for each GPU"),
}


def link_of(name: str) -> Link:
    """The link of that name; ConfigError for none."""
    if name not in LINKS:
        raise ConfigError(f"no link {name!r}", help=f"one of {', '.join(LINKS)}")
    return LINKS[name]


def ring_us(op: str, size: int, ranks: int, link: Link) -> float:
    """Microseconds of a ring: `size` bytes are those of the result of an all_reduce or an
    all_gather. An all_reduce passes (N - 1) / N of them twice, in 2 (N - 1) messages, the others
    once."""
    times = 2 if op == "all_reduce" else 1
    moved = times * (ranks - 1) / ranks * size / (SHARE * link.bytes_s)
    return START_US + 1e6 * moved + times * (ranks - 1) * link.hop_us


def tree_us(size: int, ranks: int, link: Link) -> float:
    """Microseconds of an all_reduce by a double binary tree: up and down, log2 N messages each."""
    moved = 2 * size / (SHARE * link.bytes_s)
    return START_US + 1e6 * moved + 2 * ceil(log2(ranks)) * link.hop_us


@dataclass(frozen=True)
class Exchange:
    """A collective of a step. hidden_us: of its `us`, those beside which launches run."""

    op: str
    tensors: int
    bytes: int
    ring_us: float
    us: float
    by: str
    start_us: float
    hidden_us: float


@dataclass(frozen=True)
class Scaling:
    """A step of one rank alone, and one of many. efficiency: how fast each of them is, as a part
    of one alone with the same batch."""

    ranks: int
    link: str
    single_us: float
    step_us: float
    exchanges: tuple[Exchange, ...]

    @property
    def efficiency(self) -> float:
        return self.single_us / self.step_us

    def as_dict(self) -> dict[str, Any]:
        rounded = lambda d: {k: round(v, 3) if isinstance(v, float) else v for k, v in d.items()}
        own = rounded(asdict(self) | {"efficiency": self.efficiency})
        return own | {"exchanges": [rounded(asdict(e)) for e in self.exchanges]}


def scaling(single: Lowered, several: Lowered, ranks: int, link: str, gpu: str) -> Scaling:
    """How a step over `ranks` compares with that of one, both lowered for the same batch of one."""
    how = link_of(link)
    alone, _ = _timeline(single, ranks, how, gpu)
    end, found = _timeline(several, ranks, how, gpu)
    told = _exchange("all_reduce", 1, TOLD, ranks, how)
    exchanges = (told, *found) if ranks > 1 else ()
    return Scaling(ranks, link, alone, end + (told.us if ranks > 1 else 0.0), exchanges)


def _exchange(op: str, tensors: int, size: int, ranks: int, link: Link) -> Exchange:
    ring = ring_us(op, size, ranks, link)
    tree = tree_us(size, ranks, link) if op == "all_reduce" else ring
    return Exchange(op, tensors, size, ring, min(ring, tree), "tree" if tree < ring else "ring",
                    0.0, 0.0)  # fmt: skip


def _timeline(
    low: Lowered, ranks: int, link: Link, gpu: str
) -> tuple[float, tuple[Exchange, ...]]:  # fmt: skip
    """(when the last step ends, the collectives)."""
    times = iter(launch_times(low, gpu))
    before: dict[int, list[int]] = {}
    for a, b in low.plan.edges:
        before.setdefault(b, []).append(a)
    ends: list[float] = []
    busy: list[tuple[float, float]] = []
    found: list[tuple[Exchange, float]] = []
    for k, s in enumerate(low.plan.steps):
        start = max((ends[a] for a in before.get(k, ())), default=0.0)
        if isinstance(s, Collective):
            e = _exchange(s.op, len(s.outs), s.bytes, ranks, link)
            found.append((e, start))
            ends.append(start + e.us)
            continue
        last = next(times) if isinstance(s, Launch) else 0.0
        busy.append((start, start + last))
        ends.append(start + last)
    return max(ends, default=0.0), tuple(_hidden(e, start, busy) for e, start in found)


def _hidden(e: Exchange, start: float, busy: Sequence[tuple[float, float]]) -> Exchange:
    beside = sum(max(0.0, min(b, start + e.us) - max(a, start)) for a, b in busy)
    return Exchange(
        e.op, e.tensors, e.bytes, e.ring_us, e.us, e.by, start, min(e.us, beside)
    )  # fmt: skip


def scaling_text(s: Scaling, gpu: str, batch: int) -> str:
    """The table of `inspect --ranks`."""
    link = link_of(s.link)
    lines = [
        f"{s.ranks} ranks of {batch} images, {s.link} ({link.what}: {count(link.bytes_s, 'B')}/s,"
        f" of which {SHARE:.0%} are taken to be reached); a model, not measured",
        f"{'collective':14} {'tensors':>7} {'bytes':>9} {'ring us':>9} {'takes us':>9} {'by':5}"
        f" {'starts us':>9} {'hidden us':>9}",
    ]
    lines += [
        f"{e.op:14} {e.tensors:7} {count(e.bytes, 'B'):>9} {e.ring_us:9.1f} {e.us:9.1f} {e.by:5}"
        f" {e.start_us:9.1f} {e.hidden_us:9.1f}"
        for e in s.exchanges
    ]
    rate = 1e6 * s.ranks * batch / s.step_us
    lines.append(
        f"a step of one rank {s.single_us:.0f} us, of {s.ranks} {s.step_us:.0f} us: efficiency"
        f" {s.efficiency:.1%}, {rate:,.0f} images/s on {gpu}"
    )
    return "\n".join(lines)

