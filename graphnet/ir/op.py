"""The op contract: everything about one op is one object in one file.

An op is an instance of `Op`; `register` puts it into the table that every pass asks. Adding an op
touches three places: its file in `ops/`, its kernel, one row in `tests/cases.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from graphnet.errors import GraphError, UnsupportedOpError
from graphnet.ir.types import TensorType

if TYPE_CHECKING:
    import torch

    from graphnet.ir.graph import Builder, Eqn, Value


@dataclass(frozen=True)
class Attrs:
    """Base of the attributes of an op: a frozen dataclass, normalised when it is made.

    Fields are int, float, bool, str or tuples of these, so that they print and parse back.
    """

    def items(self) -> list[tuple[str, Any]]:
        """(name, value) of the fields that differ from their defaults, in order."""
        return [
            (f.name, getattr(self, f.name))
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]


NO_ATTRS = Attrs()


@dataclass(frozen=True)
class Cost:
    """What an equation must do: floating-point operations, and bytes moved at the least."""

    flops: int
    bytes: int


class Op:
    """One operation of the IR. Subclass, fill in, `register`.

    name         as it prints
    attrs_type   the dataclass of its attributes
    elementwise  results are made element by element; all have the shape of the largest operand
    joins        elementwise code that fuses with the kernels around it. What treats gradients does
                 not: only what makes a gradient and its update take it (`passes/fuse_update.py`)
    keeps        it joins the kernel that makes its operand even where others read the operand, too
    low          operands that may be bf16, where the others stay fp32; None where all are alike
    over_batch   of what reduces over the batch, the operand that says how many rows are live
    over_channels  operands of elementwise code that are vectors over axis 1
    mask         of a gradient op(v, dy): "output", "sign" or "input", see `ops/function.py`
    effect       "none", or "collective" (keeps its program order)
    optional     indices of results that may be left unread (`_`) and then cost nothing
    kernel       name of the template family in `kernels/`, or None when the op is a view
    """

    name: ClassVar[str]
    attrs_type: ClassVar[type[Attrs]] = Attrs
    elementwise: ClassVar[bool] = False
    joins: ClassVar[bool] = False
    keeps: ClassVar[bool] = False
    low: ClassVar[tuple[int, ...] | None] = None
    over_batch: ClassVar[int | None] = None
    over_channels: ClassVar[tuple[int, ...]] = ()
    mask: ClassVar[str] = ""
    effect: ClassVar[str] = "none"
    optional: ClassVar[tuple[int, ...]] = ()
    kernel: ClassVar[str | None] = None

    def infer(self, attrs: Any, *ins: TensorType) -> tuple[TensorType, ...]:
        """Types of all results; raises a typed error for what is not implemented."""
        raise UnsupportedOpError(f"op {self.name!r} has no type rule")

    def vjp(
        self,
        b: Builder,
        eqn: Eqn,
        cotangents: Sequence[Value | None],
        needs: Sequence[bool],
    ) -> Sequence[Value | None]:
        """Cotangents of the inputs, built with `b`.

        `cotangents[i]` is None where result i has none; `needs[i]` says whether input i asks for
        one, and nothing else may be built. Written with `eqn.outputs` where it can be, so that
        the inputs may die.
        """
        raise UnsupportedOpError(
            f"op {self.name!r} has no gradient",
            help="freeze what stands before it (p.trainable = False), or compile for inference",
        )

    def reference(self, attrs: Any, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The oracle: the plainest formula in torch, in the precision of its arguments."""
        raise UnsupportedOpError(f"op {self.name!r} has no reference")

    def cpu(self, attrs: Any, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A faster twin of `reference` for the cpu target."""
        return self.reference(attrs, *args)

    def flops(
        self, attrs: Any, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        """Floating-point operations; one per result element unless the op says otherwise."""
        return sum(o.numel for o in outs if o is not None)

    def cost(
        self, attrs: Any, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> Cost:
        """FLOPs, and each operand read once and each result written once."""
        moved = sum(t.bytes for t in (*ins, *outs) if t is not None)
        return Cost(self.flops(attrs, ins, outs), moved)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        """For elementwise ops: a Triton fp32 expression per result, over operand expressions.

        `ctx.coords` names the four index tensors, `ctx.shape` is the logical shape, and
        `ctx.uses(name)` asks for a helper of `graphnet.kernels`.
        """
        raise UnsupportedOpError(f"op {self.name!r} has no elementwise code")


_REGISTRY: dict[str, Op] = {}


def register(op_class: type[Op]) -> type[Op]:
    """Class decorator: makes the one instance and enters it under its name."""
    op = op_class()
    if op.name in _REGISTRY and type(_REGISTRY[op.name]) is not op_class:
        raise GraphError(f"op {op.name!r} is registered twice")
    _REGISTRY[op.name] = op
    return op_class


def get_op(name: str) -> Op:
    """The op of that name."""
    try:
        return _REGISTRY[name]
    except KeyError:
        raise UnsupportedOpError(
            f"unknown op {name!r}", help=f"known ops: {', '.join(sorted(_REGISTRY))}"
        ) from None


def all_ops() -> dict[str, Op]:
    """Name to op, sorted."""
    return dict(sorted(_REGISTRY.items()))


def numel(shape: Sequence[int]) -> int:
    return prod(shape)
