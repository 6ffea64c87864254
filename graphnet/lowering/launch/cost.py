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
    """Rates of one GPU: FLOP/s by `math`, bytes/s; its memory in bytes. `sources` says which were
    measured."""

    bf16: float
    tf32: float
    ieee: float
    bandwidth: float
    memory: float
    sources: str

    def flops(self, math: str) -> float:
        return getattr(self, math)


HOUSE = "h200"  # the GPU that floors, schedules and configurations are for
CEILINGS = {
    "h200": Ceiling(
        790e12, 495e12, 67e12, 4.3e12, 141e9, "bf16 and bandwidth measured; the rest: datasheet"
    ),
    "h100": Ceiling(
        798e12, 495e12, 67e12, 3.0e12, 80e9, "bf16 and bandwidth measured; the rest: datasheet"
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


def padded_flops(launch: Launch) -> int:
    """Arithmetic of a product's tiles, their padding counted; 0 for what is no product.

    Each program multiplies whole tiles over its whole part of the reduction.
    """
    c = dict(launch.constants)
    if "BK" not in c or "BM" not in c:
        return 0

    def blocks(n: int) -> int:
        return -(-n // c["BK"]) * c["BK"]

    programs = launch.programs
    if launch.kernel == "conv2d_tma":  # each pixel goes through the taps that lie in the image
        depth = c["C"]
        programs = programs // (c["OH"] * c["OW"]) * _reached(c)
    elif launch.kernel == "conv2d_wgrad_tma":
        depth = blocks(c["N"])
        columns = launch.grid[1] - int(c["HAS_BIAS"])
        programs = launch.grid[0] * columns // (c["R"] * c["S"]) * c["G"] * _reached(c)
    elif launch.kernel == "conv2d_taps":
        depth = c["R"] * c["S"] * blocks(c["C"])
    elif launch.kernel == "conv2d_forward":
        depth = blocks(c["C"] // c["G"] * c["R"] * c["S"])
    elif launch.kernel == "conv2d_dgrad":
        depth = blocks(c["K"] // c["G"] * c["R"] * c["S"])
    elif launch.kernel == "matmul":
        depth = blocks(c["K"])
    else:  # a weight gradient
        pixels = c["N"] * c.get("OH", 1) * c.get("OW", 1)
        depth = blocks(-(-blocks(pixels) // c["SPLIT"]))
        rows, columns, parts = launch.grid
        taps, linear = (launch.kernel == k for k in ("conv2d_wgrad_taps", "linear_wgrad"))
        alone = c["HAS_BIAS"] and (taps or (linear and c["C"] % c["BN"] == 0))
        programs = rows * (columns - int(bool(alone))) * parts
    return 2 * programs * c["BM"] * (c["BN"] + c.get("BT", 0)) * depth


def _reached(c: dict[str, int]) -> int:
    """Pairs of a pixel of the result and a filter tap whose pixel of the image exists."""

    def along(size: str, out: str, taps: str, stride: str, offset: int, step: int) -> int:
        starts = (o * c[stride] + offset for o in range(c[out]))
        return sum(0 <= s + t * step < c[size] for s in starts for t in range(c[taps]))

    if "PT" in c:
        steps = (-c["PT"], c["DH"]), (-c["PL"], c["DW"])
    else:
        steps = (c["OFFH"], c["STEPH"]), (c["OFFW"], c["STEPW"])
    return along("H", "OH", "R", "SH", *steps[0]) * along("W", "OW", "S", "SW", *steps[1])


def with_costs(work: Work, steps: list[Launch]) -> Iterator[Launch]:
    """The launches of an equation, each with its own work: every buffer that it touches once,
    workspaces included.

    The anchor's arithmetic is the first launch's, elementwise code that of the launch which holds
    it, and a second pass adds up what the first one left in the workspace.
    """
    e = work.eqn
    sizes = {work.name[v]: v.type.bytes for v in (*e.inputs, *e.results)}
    sizes |= {name: size for s in steps for name, size in s.scratch}
    math = getattr(work.anchors[0].attrs, "math", "ieee") if work.anchors else "ieee"
    holder = next((k for k, s in enumerate(steps) if s.epilogues), 0)
    for k, s in enumerate(steps):
        flops = sum(size // 4 for _, size in steps[0].scratch) if k else 0
        flops += sum(eqn_cost(a).flops for a in work.anchors) if k == 0 else 0
        flops += sum(eqn_cost(r).flops for r in work.rest) if k == holder else 0
        moved = s.bytes or sum(sizes[b] for b in {*s.reads, *s.writes})
        yield replace(
            s, where=e.where, flops=flops, bytes=moved, math="ieee" if k else math
        )  # fmt: skip
