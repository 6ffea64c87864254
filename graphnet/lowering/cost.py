"""Ceilings of the GPUs that were measured, and the least time of a launch under them."""

from __future__ import annotations

from dataclasses import dataclass

from graphnet.errors import ConfigError


@dataclass(frozen=True)
class Ceiling:
    """Rates of one GPU: FLOP/s by `math`, bytes/s. `sources` says which were measured."""

    bf16: float
    tf32: float
    ieee: float
    bandwidth: float
    sources: str

    def flops(self, math: str) -> float:
        return getattr(self, math)


CEILINGS = {
    "h200": Ceiling(
        790e12, 495e12, 67e12, 4.3e12, "bf16 and bandwidth measured; tf32, ieee: datasheet"
    ),
    "h100": Ceiling(
        798e12, 495e12, 67e12, 3.0e12, "bf16 and bandwidth measured; tf32, ieee: datasheet"
    ),
}


def floor_us(flops: int, moved: int, math: str = "ieee", gpu: str = "h100") -> float:
    """Microseconds below which no kernel can do this work: the larger of arithmetic and memory."""
    if gpu not in CEILINGS:
        raise ConfigError(f"no ceiling for {gpu!r}", help=f"known: {', '.join(CEILINGS)}")
    ceiling = CEILINGS[gpu]
    return 1e6 * max(flops / ceiling.flops(math), moved / ceiling.bandwidth)
