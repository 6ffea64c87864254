"""A model of how long launches take, to order what a search tries.

It only orders candidates, so that a search spends its time on the likely ones: padded arithmetic
at an efficiency that grows with the tile, whole waves of programs, memory traffic, a fixed cost a
launch. How well its order fits the measured one is printed with every result.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphnet.lowering.launch.config import ITEMSIZE, PROCESSORS, SHARED_BYTES, Config
from graphnet.lowering.launch.cost import ceiling
from graphnet.lowering.launch.steps import Launch

LAUNCH_US = 1.5
REGISTERS, THREADS = 65536, 2048  # of a processor
ADDRESSES = 72  # registers of a thread beside its accumulators, about


def predict_us(steps: Sequence[object], gpu: str) -> float:
    """Microseconds for the launches of one equation, by the model."""
    return sum(_launch_us(s, gpu) for s in steps if isinstance(s, Launch))


def _launch_us(launch: Launch, gpu: str) -> float:
    rates = ceiling(gpu)
    c = dict(launch.constants)
    threads = 32 * launch.num_warps
    memory = 1e6 * launch.bytes / rates.bandwidth
    memory /= min(1.0, launch.programs / PROCESSORS)
    if not launch.padded:
        return LAUNCH_US + max(memory, 1e6 * launch.flops / rates.ieee)
    bm, bn = c["BM"], c["BN"] + c.get("BT", 0)
    tile = Config(bm, bn, c["BK"], num_warps=launch.num_warps, num_stages=launch.num_stages)
    shared = tile.shared_bytes(ITEMSIZE.get(launch.math, 4))
    registers = min(255, tile.accumulators + ADDRESSES) * threads
    resident = max(1, min(THREADS // threads, REGISTERS // registers, SHARED_BYTES // shared))
    slots = PROCESSORS * resident
    waves = -(-launch.programs // slots)
    # A tile of BM x BN loads BM + BN for each step of its reduction.
    reuse = bm * bn / (bm + bn)
    rate = rates.flops(launch.math) * reuse / (reuse + 32) * (1 - 0.3 / launch.num_stages)
    compute = 1e6 * launch.padded / rate * waves * slots / launch.programs
    return LAUNCH_US + max(compute, memory)


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's: of the ranks, ties sharing theirs. None below three pairs or without spread."""
    if len(predicted) < 3:
        return None
    from scipy.stats import spearmanr

    rho = float(spearmanr(predicted, measured).statistic)
    return None if rho != rho else rho
