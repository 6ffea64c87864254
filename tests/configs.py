"""Every configuration that a tuner would try for a net, each alone over memory filled with NaN and
held against the float64 oracle: on the GPU at full size, in the interpreter on a net cut down."""

from __future__ import annotations

import math

import graphnet as gn
from graphnet.api import lower
from graphnet.lowering.launch.config import TAPS, forced
from graphnet.lowering.tune.search import Trial, search


def step_of(net, shape, precision: str, target: str):
    """The plan of a training step whose updates do all that one can."""
    return lower(
        net, shape, target=target, precision=precision, loss=gn.CrossEntropyLoss(),
        optimizer=gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4),
    ).plan  # fmt: skip


def trials(net, shape, precision: str, target: str, loader: str, keep: int) -> list[Trial]:
    """What became of the `keep` likeliest configurations of each kernel, by one loader."""
    with forced(*TAPS, loader=loader):
        plan = step_of(net, shape, precision, target)
        # Without time left over, what is right is run once more for its time, not nine times.
        found = search(plan, gpu="h200", seconds=math.inf if keep > 1 else 0.0, keep=keep)
    kernels = {s.kernel for s in plan.launches}
    assert f"conv2d_wgrad_{loader}" in kernels, kernels
    assert {t.key for t in found.trials} and len({t.key for t in found.trials}) == found.keys
    return found.trials


def hold(net, shape, precision: str, target: str, loader: str, keep: int) -> None:
    """No configuration is wrong or fails; what spills is left to the tuner to refuse."""
    bad = [t for t in trials(net, shape, precision, target, loader, keep)
           if t.verdict not in ("right", "spills")]  # fmt: skip
    assert not bad, "\n".join(f"{t.kind} {t.shape} {t.config}: {t.verdict}, {t.error}" for t in bad)
