"""How targets run collectives: on a group that `prepare` is given (`runtime/group.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from graphnet.lowering.launch.codegen import Ref
from graphnet.lowering.launch.steps import Collective

Wait = Callable[[], None]


class Group(Protocol):
    """The processes of a step."""

    rank: int
    ranks: int

    def sum(self, t: torch.Tensor) -> Wait:
        """Starts to sum a contiguous tensor over the ranks, in place; the call that waits for
        it."""

    def gather(self, t: torch.Tensor) -> Sequence[torch.Tensor]:
        """What every rank holds in place of a tensor, rank 0 first."""


def collective(
    step: Collective, tensor: Callable[[Ref], torch.Tensor], group: Group | None
) -> Callable[[], Any]:
    """A collective as a call, which ends when its results are there."""
    ins = [tensor(Ref(n, t.dtype.name)) for n, t in step.ins]
    outs = [tensor(Ref(n, t.dtype.name)) for n, t in step.outs]
    if step.op == "all_reduce":
        moved = [(i, o) for i, o in zip(ins, outs, strict=True) if i.data_ptr() != o.data_ptr()]
        flat = tensor(Ref(step.bucket, step.dtype.name)) if step.bucket else None
        return lambda: _sum(moved, outs, flat, group)
    (x,), (out,) = ins, outs
    (_, taken), (_, made) = step.ins[0], step.outs[0]

    def run() -> None:
        out.view(made.shape).copy_(exchanged(step.op, step.attrs, x.view(taken.shape), group))

    return run


def exchanged(op: str, attrs: Any, mine: torch.Tensor, group: Group | None) -> torch.Tensor:
    """The result of a gather, a scatter or a part of a contiguous tensor; a scatter adds in the
    order of the ranks."""
    own = 0 if group is None else group.rank
    if op == "own_part":
        return mine.chunk(attrs.ranks, attrs.axis)[own]
    parts = [mine] if group is None else list(group.gather(mine))
    if op == "all_gather":
        return torch.cat(parts, attrs.axis)
    first, *rest = (p.chunk(attrs.ranks, attrs.axis)[own] for p in parts)
    total = first.clone()
    for part in rest:
        total += part
    return total


def _sum(
    moved: Sequence[tuple[torch.Tensor, torch.Tensor]], outs: Sequence[torch.Tensor],
    flat: torch.Tensor | None, group: Group | None,
) -> None:  # fmt: skip
    """Sums over ranks in place, all in one message."""
    for source, into in moved:
        into.copy_(source)
    if group is None:
        return
    if flat is not None or len(outs) == 1:
        group.sum(outs[0] if flat is None else flat)()
        return
    flat = torch.cat(list(outs))
    group.sum(flat)()
    for out, part in zip(outs, flat.split([o.numel() for o in outs]), strict=True):
        out.copy_(part)
