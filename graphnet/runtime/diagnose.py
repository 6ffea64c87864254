"""Where a step stopped being finite: the layer, found by running its joint graph again, unfused.

The compiled step carries nothing for this. Its guard (`nonfinite=`) has left the state as it was,
and its inputs are still in their buffers: the ops' own formulas give the same numbers again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from graphnet.errors import NumericsError
from graphnet.ir.graph import Eqn, Input, Value
from graphnet.ir.op import get_op
from graphnet.ops.fused import run_eqn
from graphnet.passes.precision import derived
from graphnet.runtime.group import Group
from graphnet.runtime.program import Program

_BOOKS = ("record_step", "if_finite")  # they hide a bad value, or only repeat one


HELP = (
    "lower the learning rate, clip the gradients (clip_norm), or leave such steps out "
    '(nonfinite="skip")'
)


@dataclass(frozen=True)
class Finding:
    """The first thing that is not finite. `what` is the sentence, `layer` its display name."""

    layer: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{f'layer {self.layer}: ' if self.layer else ''}{self.what}"


def not_finite(text: str, found: Finding | None) -> NumericsError:
    """The error of a training step that was not finite: what happened, and what was found."""
    if found is None:
        return NumericsError(text, help=HELP)
    return NumericsError(
        f"{text}: {found.what}", layer=found.layer or None, where=found.where or None, help=HELP
    )


def first_nonfinite(program: Program, batch: Sequence[Any] = ()) -> Finding | None:
    """Of the step that the program ran last: input, then parameters, then each equation in order.

    batch  (x, y, ...) as that step took them, where a later one has overwritten them since
    None where the formulas stay finite: then another rank's rows made it so, or only the rounding
    of the compiled step overflowed, or a later step has changed what did.
    """
    if batch:
        program._feed(*batch)
    graph = program.stages.joint
    env: dict[Value, torch.Tensor] = {}
    params = {i.value.name: i for i in graph.inputs if i.role == "param"}
    for i in graph.inputs:
        if (held := _held(program, i)) is not None:
            env[i.value] = held
    inputs = [i for i in graph.inputs if i.role == "data" and i.value in env]
    for i in inputs:
        if bad := _kind(env[i.value]):
            rows = (~torch.isfinite(env[i.value].flatten(1))).any(1).nonzero()
            return Finding("", "", f"the input holds {bad} in row {int(rows[0])} of the batch")
    reader: dict[Value, Eqn] = {}
    for e in graph.eqns:
        for v in e.inputs:
            reader.setdefault(v, e)
    # A bad gradient spreads from its layer towards the input: the last one is where it began.
    for i in reversed(params.values()):
        if i.value in env and (bad := _kind(env[i.value])):
            what = f"the parameter {i.value.name} held {bad} before this step"
            return _found(reader.get(i.value), what)
    for e in graph.eqns:
        if e.op in _BOOKS or any(v not in env for v in e.inputs):
            continue
        if get_op(e.op).effect == "collective":  # each rank looks at its own rows
            continue
        outs = run_eqn(e, [env[v] for v in e.inputs], "cpu")
        for v, out in zip(e.outputs, outs, strict=False):
            if v is None or out is None:
                continue
            env[v] = out
            if bad := _kind(out):
                side = "gradient" if e.where.by == "autodiff" else "result"
                return _found(e, f"the {side} of {e.op} is the first to hold {bad}")
    return None


def of_all(group: Group, mine: Finding | None) -> Finding | None:
    """What the first rank that has found something found: the rows of the others may be fine."""
    for rank, found in enumerate(group.collect(mine)):
        if found is not None:
            return replace(found, what=f"{found.what}, on rank {rank}")
    return None


def _held(program: Program, i: Input) -> torch.Tensor | None:
    """The value of an input at the start of the step, on the CPU; None where the step has none."""
    name = i.value.name
    if i.role == "derived":  # laid out as its kernel wants it: made again instead
        return derived(name, program._storage[i.of].detach().cpu())
    tensor = program._storage.get(name)
    if tensor is None:
        return None
    value = tensor.detach().cpu()
    counted = name == "step" and "held" not in program._storage  # a sticky one stands still
    return value - 1 if counted else value


def _kind(t: torch.Tensor) -> str:
    """NaN or inf, whichever the tensor holds; an empty string for neither."""
    if not t.is_floating_point() or bool(torch.isfinite(t).all()):
        return ""
    return "NaN" if bool(torch.isnan(t).any()) else "inf"


def _found(e: Eqn | None, what: str) -> Finding:
    layers = e.where.layers if e is not None else ()
    return Finding(layers[0] if layers else "", e.where.place if e is not None else "", what)
