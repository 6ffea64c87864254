"""What runs beside the rest of a step: long updates bound by memory, and how wide they are there.

GRAPHNET_STREAMS says how. 0: nothing runs beside anything. 1: on a second stream, as wide as ever,
so that the GPU's own scheduler shares the processors. N: on a second stream, by N programs that
walk over all tiles, so that the other processors are left to the convolutions. The bits of results
are the same.
"""

from __future__ import annotations

from dataclasses import replace

from graphnet import config
from graphnet.lowering.launch.cost import HOUSE, limits_us
from graphnet.lowering.launch.steps import Launch

ASIDE_US = 15.0  # a shorter launch does not pay for the fork
WALKERS = "PROGRAMS"  # the constant of kernels whose programs can walk over tiles; 0 if they do not


def goes_aside(launch: Launch) -> bool:
    """Whether a launch is long and bound by memory, so that it pays beside one that computes."""
    compute, memory = limits_us(launch.flops, launch.bytes, launch.math, HOUSE)
    return memory >= ASIDE_US and memory > compute


def confined(launch: Launch) -> Launch:
    """A launch as wide as GRAPHNET_STREAMS lets it be: an update that goes aside and can walk gets
    N programs, or one for each tile where there are fewer."""
    n = config.streams()
    walks = dict(launch.constants).get(WALKERS) == 0 and launch.inplace and goes_aside(launch)
    if n < 2 or not walks:
        return launch
    programs = min(n, launch.programs)
    constants = tuple((k, programs if k == WALKERS else v) for k, v in launch.constants)
    return replace(launch, grid=(programs, 1, 1), constants=constants)
