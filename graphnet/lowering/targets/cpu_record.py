"""The loss into its ring on the cpu target, and whether a step's updates may go ahead."""

from __future__ import annotations

import math

import torch

from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.targets.cpu_task import Call, Env, Slot, Task

Storage = dict[str, torch.Tensor]


def allowed(eqn: Eqn, storage: Storage) -> Task:
    """What a sticky `record_step` lets the updates look at, before anything is written."""
    held, (loss, *norm), go = storage[eqn.inputs[3].name], _recorded(eqn), eqn.results[3]
    nan = torch.tensor(float("nan"))

    def make(slot: Slot) -> Call:
        at, flags, into = slot(loss), [slot(v) for v in norm], slot(go)

        def call(env: Env) -> None:
            fine = not held and all(math.isfinite(env[i]) for i in flags)
            env[into] = env[at] if fine else nan

        return call

    return Task((loss, *norm), (go,), make, ())


def record(eqn: Eqn, storage: Storage) -> Task:
    """The loss into the ring, and the counters, in place."""
    names = [v.name for v in eqn.inputs]
    ring, step, reads = storage[names[0]], storage[names[2]], _recorded(eqn)
    held = storage[names[3]] if sticky(eqn) else None
    if held is not None:
        reads = (*reads, eqn.results[3])

    def make(slot: Slot) -> Call:
        at, *flags = (slot(v) for v in reads)

        def call(env: Env) -> None:
            fine = all(math.isfinite(env[i]) for i in flags)
            if held is None:
                ring[int(step) % len(ring)] = env[at] if fine else float("nan")
                step.add_(1)
                return
            norms = all(math.isfinite(env[i]) for i in flags[:-1])
            ring[(int(step) + int(held)) % len(ring)] = env[at] if norms else float("nan")
            (step if fine else held).add_(1)

        return call

    return Task(reads, eqn.results[:3], make, (eqn,))


def sticky(record: Eqn) -> bool:
    """Whether one step that was held back holds back all that follow."""
    return record.attrs.sticky  # type: ignore[attr-defined]


def _recorded(record: Eqn) -> tuple[Value, ...]:
    """The loss, and the norm where there is one."""
    return (record.inputs[1], *record.inputs[3 + sticky(record) :])
