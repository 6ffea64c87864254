"""The one fused op: its meaning, FLOPs and bytes are its body's; interior values are free."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphnet.errors import GraphError
from graphnet.ir.graph import Eqn
from graphnet.ir.op import Attrs, Cost, Op, get_op, register
from graphnet.ir.types import TensorType


@register
class Fused(Op):
    """Runs its body. Types come from the body, so this op is never inferred without one."""

    name = "fused"

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        raise GraphError("a fused equation needs its body")


def run_eqn(eqn: Eqn, args: Sequence[torch.Tensor], mode: str = "reference") -> tuple:
    """Results of one equation; unread ones are None. mode: "reference" or "cpu"."""
    if eqn.body is None:
        outs = getattr(get_op(eqn.op), mode)(eqn.attrs, *args)
        return tuple(o if v is not None else None for o, v in zip(outs, eqn.outputs, strict=False))
    env = dict(zip(eqn.body.input_values, args, strict=True))
    for e in eqn.body.eqns:
        outs = run_eqn(e, [env[v] for v in e.inputs], mode)
        env.update((v, o) for v, o in zip(e.outputs, outs, strict=True) if v is not None)
    return tuple(env[v] for v in eqn.body.returns)


def eqn_cost(eqn: Eqn) -> Cost:
    """FLOPs of an equation or of its body, and the bytes of its operands and read results."""
    flops = 0
    for e in eqn.plain:
        ins = [v.type for v in e.inputs]
        outs = [None if v is None else v.type for v in e.outputs]
        flops += get_op(e.op).flops(e.attrs, ins, outs)
    if eqn.op in ("reshape", "full"):
        return Cost(0, 0)
    moved = sum(v.type.bytes for v in dict.fromkeys((*eqn.inputs, *eqn.results)))
    return Cost(flops, moved)
