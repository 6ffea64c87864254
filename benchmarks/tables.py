"""Writes the tables of launch configurations: `python benchmarks/tables.py`.

For the headline workloads every key gets an entry: the measured one where there is one, else what
the rules say, marked as analytic. `graphnet tune ... --table FILE` adds measured entries.
"""

from __future__ import annotations

from collections.abc import Iterator

import graphnet as gn
from graphnet.api import lower
from graphnet.frontends.loading import input_shape, load_model
from graphnet.lowering.launch.config import Choice, analytic
from graphnet.lowering.tune import tables

GPU = "h200"
WORKLOADS = [
    (model, 128, precision)
    for model, precisions in (("lenet5", ("fp32", "tf32", "bf16")), ("alexnet", ("tf32", "bf16")))
    for precision in precisions
]


def asked(model: str, batch: int, precision: str) -> Iterator[Choice]:
    """What the training step of a workload asks `choose`."""
    net = load_model(model)
    sgd = gn.SGD(lr=0.01, momentum=0.9, weight_decay=5e-4)
    low = lower(
        net, input_shape(net, batch), target="cuda", precision=precision,
        loss=gn.CrossEntropyLoss(), optimizer=sgd,
    )  # fmt: skip
    for launch in low.plan.launches:
        yield from launch.choices


def entries() -> list[tables.Entry]:
    """The analytic entries of all workloads, each key once."""
    found = {c.key: c for w in WORKLOADS for c in asked(*w)}
    return [tables.Entry(*key, analytic(*key)) for key in found]


if __name__ == "__main__":
    path = tables.FOLDER / f"{GPU}.json"
    path.parent.mkdir(exist_ok=True)
    have = tables.read(path) if path.exists() else []
    measured = [e for e in have if e.source == "measured"]
    tables.write(path, GPU, [*entries(), *measured])
    print(f"{path}: {len(tables.read(path))} entries, {len(measured)} measured")
