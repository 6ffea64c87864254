"""Configurations worth trying for a kernel, and a model of how long each would take.

The model only orders candidates, so that a search spends its time on the likely ones: padded
arithmetic at an efficiency that grows with the tile, whole waves of programs, memory traffic, a
fixed cost a launch. How well its order fits the measured one is printed with every result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from graphnet.lowering.launch.config import (
    NORMS,
    PROCESSORS,
    PRODUCTS,
    SHARED_BYTES,
    TAPS,
    UPDATE_ACCUMULATORS,
    WGRADS,
    Choice,
    Config,
    analytic,
    next_power,
)
from graphnet.lowering.launch.cost import ceiling, padded_flops
from graphnet.lowering.launch.steps import Launch

ITEMSIZE = {"bf16": 2, "tf32": 4, "ieee": 4}
ACCUMULATORS = 128  # a thread; more than that spills beside addresses
LAUNCH_US = 1.5
REGISTERS, THREADS = 65536, 2048  # of a processor
ADDRESSES = 72  # registers of a thread beside its accumulators, about


def candidates(choice: Choice, update: bool = False) -> list[Config]:
    """Distinct configurations for the key of a choice, the rules' own first.

    update  the launch ends in an optimizer update, whose epilogue takes registers
    """
    first = analytic(*choice.key)
    found = dict.fromkeys([first, *_grid(choice, first)])
    return [c for c in found if c == first or _fits(c, choice, update)]


def _fits(c: Config, choice: Choice, update: bool) -> bool:
    if choice.kind not in (*PRODUCTS, *WGRADS):
        return True
    most = UPDATE_ACCUMULATORS if update and c.SPLIT == 1 else ACCUMULATORS
    shared = c.shared_bytes(ITEMSIZE.get(choice.precision, 4))
    return c.accumulators <= most and shared <= SHARED_BYTES


def _grid(choice: Choice, first: Config) -> Iterator[Config]:
    kind, shape = choice.kind, choice.shape
    if kind in (*PRODUCTS, *WGRADS):
        yield from _products(choice, first)
    elif kind in NORMS:
        for bm, bk, parts, warps in product((1, 2, 4, 8, 16), (4, 8, 16), (2, 4, 8), (4, 8)):
            if bm * first.BN <= 4096:
                yield replace(first, BM=bm, BK=bk, SPLIT=parts * PROCESSORS, num_warps=warps)
    elif kind in ("cross_entropy", "multi_margin"):
        for bm in (1, 2, 4, 8, 16, 32, 64, 128):
            if bm <= next_power(shape[0]) and bm * first.BN <= 16384:
                programs = min(-(-shape[0] // bm), PROCESSORS)
                yield replace(first, BM=bm, SPLIT=programs)
                yield replace(first, BM=bm, SPLIT=1)
    else:
        for block, warps in product((64, 128, 256, 512, 1024, 2048), (1, 2, 4, 8)):
            if block <= max(32, next_power(shape[0])) and block >= 32 * warps:
                yield replace(first, BLOCK=block, num_warps=warps)


def _products(choice: Choice, first: Config) -> Iterator[Config]:
    m, n, k, _ = choice.shape
    low = choice.precision == "bf16"
    wgrad = choice.kind in WGRADS
    rows = [b for b in (16, 32, 64, 128, 256) if b <= max(16, next_power(m))]
    columns = [(b, 0) for b in (16, 32, 64, 128, 256) if b <= max(16, next_power(n))]
    if choice.kind in TAPS:
        columns += [(64, 32), (128, 16), (128, 64)]
    depths = [b for b in (16, 32, 64, 128) if b <= max(16, next_power(k))]
    if choice.precision == "ieee":
        depths = [b for b in depths if b <= 32]
    splits = (1, 2, 4, 8, 16, 32) if wgrad else (1,)
    loaders = ("", "tma") if choice.kind in TAPS and low else ("",)
    for bm, (bn, bt), bk, split in product(rows, columns, depths, splits):
        if bn + bt > 2 * next_power(n) or bm * bn < 256 or (split > 1 and k // split < 2 * bk):
            continue
        if low and bm < 64 and m >= 64:
            continue  # wgmma takes at least 64 rows
        for warps, stages, loader in product((4, 8), (2, 3, 4), loaders):
            yield replace(
                first, BM=bm, BN=bn, BT=bt, BK=bk, SPLIT=split, num_warps=warps, num_stages=stages,
                loader=loader,
            )  # fmt: skip


# ---- the model -------------------------------------------------------------------------------


def predict_us(steps: Sequence[object], gpu: str) -> float:
    """Microseconds for the launches of one equation, by the model."""
    return sum(_launch_us(s, gpu) for s in steps if isinstance(s, Launch))


def _launch_us(launch: Launch, gpu: str) -> float:
    rates = ceiling(gpu)
    c = dict(launch.constants)
    threads = 32 * launch.num_warps
    memory = 1e6 * launch.bytes / rates.bandwidth
    memory /= min(1.0, launch.programs / PROCESSORS)
    flops = padded_flops(launch)
    if not flops:
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
    compute = 1e6 * flops / rate * waves * slots / launch.programs
    return LAUNCH_US + max(compute, memory)


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's: of the ranks, ties sharing theirs. None below three pairs or without spread."""
    if len(predicted) < 3:
        return None
    from scipy.stats import spearmanr

    rho = float(spearmanr(predicted, measured).statistic)
    return None if rho != rho else rho
