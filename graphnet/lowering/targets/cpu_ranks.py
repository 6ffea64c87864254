"""Collectives on the cpu target: each starts when its operands are there and runs beside the tasks
behind it; what reads its results waits for it."""

from __future__ import annotations

from typing import Any

import torch

from graphnet.ir.graph import Eqn, Value
from graphnet.ir.op import get_op
from graphnet.ir.types import TensorType, f32
from graphnet.lowering.targets.collectives import Group, exchanged
from graphnet.lowering.targets.cpu_task import Call, Env, Slot, Task


def is_collective(e: Eqn) -> bool:
    """Whether all ranks have to meet at an equation."""
    return get_op(e.op).effect == "collective"


def tasks_of(eqns: list[Eqn], group: Group | None) -> tuple[dict[int, Task], list[Task]]:
    """(by id of each collective the task that starts it; the tasks that wait, in order). Each
    starts behind the one before it, so that all ranks agree on their order."""
    starts: dict[int, Task] = {}
    waits: list[Task] = []
    before: tuple[Value, ...] = ()
    for k, e in enumerate(e for e in eqns if is_collective(e)):
        begun = Value(f".begun{k}", TensorType(f32, ()))
        if e.op == "all_reduce":
            start, wait = _summed(e, begun, before, group)
        else:
            start, wait = _moved(e, begun, before, group)
        starts[id(e)] = start
        waits.append(wait)
        before = (begun,)
    return starts, waits


def _summed(
    e: Eqn, begun: Value, before: tuple[Value, ...], group: Group | None
) -> tuple[Task, Task]:
    """A bucket: one flat tensor for as long as the program lives, of which every gradient is a
    part, filters channels-last as their parameters are."""
    sizes = [v.type.numel for v in e.inputs]
    flat = torch.zeros(sum(sizes), dtype=e.inputs[0].type.dtype.torch)
    parts = [_laid(p, v.type.shape) for p, v in zip(flat.split(sizes), e.inputs, strict=True)]

    def start(slot: Slot) -> Call:
        ins, at = [slot(v) for v in e.inputs], slot(begun)

        def call(env: Env) -> None:
            for part, i in zip(parts, ins, strict=True):
                part.copy_(env[i])
            env[at] = None if group is None else group.sum(flat)

        return call

    def wait(slot: Slot) -> Call:
        at, outs = slot(begun), [slot(v) for v in e.results]

        def call(env: Env) -> None:
            if env[at] is not None:
                env[at]()
            for part, o in zip(parts, outs, strict=True):
                env[o] = part

        return call

    return (
        Task((*e.inputs, *before), (begun,), start, (e,)),
        Task((begun,), e.results, wait, ()),
    )  # fmt: skip


def _laid(flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) != 4:
        return flat.view(shape)
    n, c, h, w = shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def _moved(
    e: Eqn, begun: Value, before: tuple[Value, ...], group: Group | None
) -> tuple[Task, Task]:
    """A gather, a scatter or a part, which ends before the next task."""
    a: Any = e.attrs

    def start(slot: Slot) -> Call:
        i, at = slot(e.inputs[0]), slot(begun)

        def call(env: Env) -> None:
            env[at] = exchanged(e.op, a, env[i].contiguous(), group)

        return call

    def wait(slot: Slot) -> Call:
        at, o = slot(begun), slot(e.out)

        def call(env: Env) -> None:
            env[o] = env[at]

        return call

    return (
        Task((e.inputs[0], *before), (begun,), start, (e,)),
        Task((begun,), e.results, wait, ()),
    )  # fmt: skip
