"""Elementwise ops of the cpu target that write over an operand nobody reads any more.

A step on a CPU is bound by memory where channels are few, and a result that takes a place in cache
saves the allocation and a third of the traffic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphnet.ir.graph import Eqn, Value
from graphnet.lowering.targets.cpu_task import Call, Env, Slot, Task

Readers = Callable[[Value], list[Eqn]]
_aten: Any = torch.ops.aten

# What makes a tensor of its own, of which no other value is a view.
_FRESH = (
    "batch_norm", "batch_norm_grad", "normalize", "conv2d", "conv2d_dgrad", "avgpool2d_grad",
    "maxpool2d_grad", "add", "relu", "relu_grad", "batch_norm_elemt", "batch_norm_grad_elemt",
)  # fmt: skip


def _add(args: list[torch.Tensor], k: int) -> torch.Tensor:
    return args[k].add_(args[1 - k])


def _relu(args: list[torch.Tensor], k: int) -> torch.Tensor:
    return args[0].relu_()


def _relu_grad(args: list[torch.Tensor], k: int) -> torch.Tensor:
    y, dy = args
    if dy.stride() != y.stride():  # a copy and a pass are half of a pass over two layouts
        dy = torch.empty_like(y).copy_(dy)
    return _aten.threshold_backward.grad_input(dy, y, 0, grad_input=dy)


# The ops, and which operands each can write over.
_OVER: dict[str, tuple[tuple[int, ...], Callable[[list[torch.Tensor], int], torch.Tensor]]] = {
    "relu": ((0,), _relu), "add": ((0, 1), _add), "relu_grad": ((1,), _relu_grad),
}  # fmt: skip


def dies(v: Value, eqn: Eqn, made: dict[Value, Eqn], read_by: Readers) -> bool:
    """Whether the equation may write over an operand: it is a tensor of its own, read there last.

    made     the equation of each value
    read_by  the readers of a value; an empty list where it leaves the graph
    """
    fresh = v in made and made[v].op in _FRESH and v == made[v].outputs[0]
    return fresh and read_by(v) == [eqn] and eqn.inputs.count(v) == 1


def over(eqn: Eqn, made: dict[Value, Eqn], read_by: Readers) -> Task | None:
    """The equation over an operand that dies there; None where it has none."""
    if eqn.op not in _OVER or eqn.outputs[0] is None:
        return None
    places, run = _OVER[eqn.op]
    alike = [k for k in places if eqn.inputs[k].type == eqn.out.type]
    at = next((k for k in alike if dies(eqn.inputs[k], eqn, made, read_by)), None)
    return None if at is None else _task(eqn, at, run)


def _task(eqn: Eqn, k: int, run: Callable[[list[torch.Tensor], int], torch.Tensor]) -> Task:
    def make(slot: Slot) -> Call:
        ins, at = [slot(v) for v in eqn.inputs], slot(eqn.out)

        def call(env: Env) -> None:
            env[at] = run([env[i] for i in ins], k)

        return call

    return Task(eqn.inputs, (eqn.out,), make, (eqn,))
