"""What a launch has to do, and the least time for it under the ceilings of a measured GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from graphnet.errors import ConfigError
from graphnet.lowering.launch.steps import Launch
from graphnet.lowering.launch.work import Work
from graphnet.ops.fused import eqn_cost


@dataclass(frozen=True)
class Ceiling:
    """Rates of one GPU: FLOP/s by `math`, bytes/s; its memory in bytes; its processors. `sources`
    says which were measured."""

    bf16: float
    tf32: float
    ieee: float
    bandwidth: float
    memory: float
    sources: str
    processors: int = 132

    def flops(self, math: str) -> float:
        return getattr(self, math)


HOUSE = "h200"  # the GPU that floors and schedules are for
CEILINGS = {
    "h200": Ceiling(
        790e12, 495e12, 67e12, 4.3e12, 141e9, "bf16 and bandwidth measured; the rest: datasheet"
    ),
    "h100": Ceiling(
        724e12, 495e12, 67e12, 3.03e12, 80e9, "bf16 and bandwidth measured; the rest: datasheet"
    ),
}


def ceiling(gpu: str) -> Ceiling:
    """The rates of a GPU, by name."""
    if gpu not in CEILINGS:
        raise ConfigError(f"no ceilings for GPU {gpu!r}", help=f"one of {', '.join(CEILINGS)}")
    return CEILINGS[gpu]


def limits_us(flops: int, moved: int, math: str = "ieee", gpu: str = HOUSE) -> tuple[float, float]:
    """Microseconds that the arithmetic takes at the least, and the memory traffic."""
    rates = ceiling(gpu)
    return 1e6 * flops / rates.flops(math), 1e6 * moved / rates.bandwidth


def floor_us(flops: int, moved: int, math: str = "ieee", gpu: str = HOUSE) -> float:
    """Microseconds below which no kernel can do this work: the larger of arithmetic and memory."""
    return max(limits_us(flops, moved, math, gpu))


def with_costs(work: Work, steps: list[Launch]) -> Iterator[Launch]:
    """The launches of an equation, each with its own work: every buffer that it touches once,
    workspaces included.

    The anchor's arithmetic is the first launch's, elementwise code that of the launch which holds
    it, and a second pass adds up what the first one left in the workspace.
    """
    e, names = work.whole, {**(work.then.name if work.then else {}), **work.name}
    sizes = {names[v]: v.type.bytes for v in (*e.inputs, *e.results)}
    sizes |= {name: size for s in steps for name, size in s.scratch}
    math = getattr(work.anchors[0].attrs, "math", "ieee") if work.anchors else "ieee"
    holder = next((k for k, s in enumerate(steps) if s.epilogues), 0)
    first = holder if work.kept else 0  # statistics that were kept leave the rest to the last one
    for k, s in enumerate(steps):
        flops = sum(size // 4 for n, size in steps[0].scratch if n in s.reads) if k else 0
        flops += sum(eqn_cost(a).flops for a in work.anchors) if k == first else 0
        flops += sum(eqn_cost(r).flops for r in work.rest) if k == holder else 0
        moved = s.bytes or sum(sizes[b] for b in {*s.reads, *s.writes})
        yield replace(
            s, where=work.eqn.where, flops=flops, bytes=moved, math="ieee" if k else math
        )  # fmt: skip
