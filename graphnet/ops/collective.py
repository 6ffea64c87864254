"""Collectives: what the ranks of a step tell each other (torch.distributed's names).

Every rank runs the same graph, so every rank meets the same collectives in the same order: no pass
reorders, shares or drops one. With one rank each is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphnet.errors import ConfigError, ShapeError, UnsupportedOpError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import TensorType

Exchange = Callable[[torch.Tensor], Sequence[torch.Tensor]]
_EXCHANGE: ContextVar[tuple[Exchange, int] | None] = ContextVar("exchange", default=None)


@contextmanager
def exchanging(exchange: Exchange, rank: int) -> Iterator[None]:
    """Inside, references are those of this rank, and ask `exchange` for what all ranks hold in
    place of a tensor, rank 0 first."""
    token = _EXCHANGE.set((exchange, rank))
    try:
        yield
    finally:
        _EXCHANGE.reset(token)


def of_all(name: str, ranks: int, mine: torch.Tensor) -> Sequence[torch.Tensor]:
    """What every rank holds in place of this tensor."""
    if ranks == 1:
        return [mine]
    if (given := _EXCHANGE.get()) is None:
        raise UnsupportedOpError(
            f"{name} over {ranks} ranks is run by one process",
            help="run the step under torchrun, or compile it with group=None",
        )
    found = given[0](mine)
    if len(found) != ranks:
        raise ShapeError(f"{name} is written for {ranks} ranks and meets {len(found)}")
    return found


def _rank() -> int:
    given = _EXCHANGE.get()
    return 0 if given is None else given[1]


@dataclass(frozen=True)
class RanksAttrs(Attrs):
    """ranks: how many take part."""

    ranks: int = 1

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ConfigError(f"a collective of {self.ranks} ranks")


@dataclass(frozen=True)
class AxisAttrs(RanksAttrs):
    """axis: along which the parts of the ranks stand behind one another."""

    axis: int = 0


@dataclass(frozen=True)
class GatherAttrs(AxisAttrs):
    """alike: what reads the result is the same on all ranks, so that each knows the whole gradient
    and keeps its part of it. Otherwise the gradients of the ranks are summed."""

    alike: bool = False


class Collective(Op):
    """Base: all ranks take part, in the program's order."""

    effect = "collective"
    attrs_type: ClassVar[type[Attrs]] = AxisAttrs

    def flops(
        self, attrs: Any, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 0


@register
class AllReduce(Collective):
    """Each operand summed over the ranks, in the order of the ranks. Its operands are one bucket:
    they travel together."""

    name = "all_reduce"
    attrs_type = RanksAttrs

    def infer(self, attrs: RanksAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        if not ins or any(not t.dtype.is_float for t in ins):
            raise ShapeError(f"all_reduce sums floats, got {', '.join(map(str, ins)) or 'nothing'}")
        if len({t.dtype for t in ins}) > 1:
            raise ShapeError(f"one all_reduce has one element type, got {', '.join(map(str, ins))}")
        return ins

    def reference(self, attrs: RanksAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = []
        for t in args:
            first, *rest = of_all(self.name, attrs.ranks, t)
            total = first.clone()
            for other in rest:
                total = total + other
            out.append(total)
        return tuple(out)

    def flops(
        self, attrs: Any, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return (attrs.ranks - 1) * sum(t.numel for t in ins)


def _resized(t: TensorType, axis: int, size: int) -> TensorType:
    return t.with_shape((*t.shape[:axis], size, *t.shape[axis + 1 :]))


def _axis(name: str, axis: int, ins: Sequence[TensorType]) -> TensorType:
    """The one operand, which must have that axis."""
    if len(ins) != 1 or not 0 <= axis < len(ins[0].shape):
        raise ShapeError(f"{name} along axis {axis} does not fit {', '.join(map(str, ins))}")
    return ins[0]


@register
class AllGather(Collective):
    """The operands of all ranks behind one another along an axis."""

    name = "all_gather"
    attrs_type = GatherAttrs

    def infer(self, attrs: AxisAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        t = _axis(self.name, attrs.axis, ins)
        return (_resized(t, attrs.axis, attrs.ranks * t.shape[attrs.axis]),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,), a = cotangents, eqn.attrs
        assert isinstance(a, GatherAttrs)
        if dy is None or not needs[0]:
            return (None,)
        op = "own_part" if a.alike else "reduce_scatter"
        return (b.one(op, dy, attrs=AxisAttrs(a.ranks, a.axis)),)

    def reference(self, attrs: AxisAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.cat(list(of_all(self.name, attrs.ranks, args[0])), attrs.axis),)


class _Part(Collective):
    """Base of what gives a rank its part along an axis."""

    def infer(self, attrs: AxisAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        t = _axis(self.name, attrs.axis, ins)
        if t.shape[attrs.axis] % attrs.ranks:
            raise ShapeError(f"{t} has no {attrs.ranks} equal parts along axis {attrs.axis}")
        return (_resized(t, attrs.axis, t.shape[attrs.axis] // attrs.ranks),)


@register
class ReduceScatter(_Part):
    """The sum over the ranks, of which each keeps its part along an axis."""

    name = "reduce_scatter"

    def reference(self, attrs: AxisAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = of_all(self.name, attrs.ranks, args[0])
        total = found[0].clone()
        for other in found[1:]:
            total = total + other
        return (total.chunk(attrs.ranks, attrs.axis)[_rank()].clone(),)



@register
class OwnPart(_Part):
    """This rank's part of what all ranks hold alike. Nobody sends anything: it is here because only
    a group knows which rank this is."""

    name = "own_part"

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,), a = cotangents, eqn.attrs
        assert isinstance(a, AxisAttrs)
        if dy is None or not needs[0]:
            return (None,)
        return (b.one("all_gather", dy, attrs=GatherAttrs(a.ranks, a.axis)),)

    def reference(self, attrs: AxisAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (args[0].chunk(attrs.ranks, attrs.axis)[_rank()].clone(),)
