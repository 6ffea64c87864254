"""Every variant and configuration that a tuner would try for a net, each alone over memory filled
with NaN and held against the float64 oracle: on the GPU at full size, in the interpreter on a net
cut down."""

from __future__ import annotations

import math

import graphnet as gn
from graphnet.api import lower
from graphnet.lowering.tune.search import Trial, search


def trials(net, shape, precision: str, target: str, keep: int) -> list[Trial]:
    """What became of the `keep` likeliest candidates of each problem, every variant among them, in
    front of updates that do all that one can."""
    low = lower(
        net, shape, target=target, precision=precision, loss=gn.CrossEntropyLoss(),
        optimizer=gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4),
    )  # fmt: skip
    # Without time left over, what is right is run once more for its time, not nine times.
    seconds = math.inf if keep > 1 else 0.0
    found = search(low.plan, low.kernels, gpu="h200", seconds=seconds, keep=keep, again=True)
    assert len({t.problem for t in found.trials}) == found.keys > 0
    return found.trials


def hold(net, shape, precision: str, target: str, keep: int) -> None:
    """No candidate is wrong or fails; what spills is left to the tuner to refuse."""
    bad = [t for t in trials(net, shape, precision, target, keep)
           if t.verdict not in ("right", "spills", "skipped")]  # fmt: skip
    assert not bad, "\n".join(
        f"{t.problem} {t.variant} {t.config}: {t.verdict}, {t.error}" for t in bad
    )
