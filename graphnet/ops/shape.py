"""Views and movement: reshape, slice, concat, relayout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphnet.errors import ShapeError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, numel, register
from graphnet.ir.types import TensorType, parse_layout


@dataclass(frozen=True)
class ReshapeAttrs(Attrs):
    shape: tuple[int, ...] = ()


class _Moves(Op):
    kernel: ClassVar[str | None] = "elementwise"

    def flops(
        self, attrs: Attrs, ins: Sequence[TensorType], outs: Sequence[TensorType | None]
    ) -> int:
        return 0


@register
class Reshape(_Moves):
    """The same elements in row-major order under another shape; a view."""

    name = "reshape"
    attrs_type = ReshapeAttrs
    kernel = None

    def infer(self, attrs: ReshapeAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        if numel(attrs.shape) != ins[0].numel:
            raise ShapeError(
                f"cannot view {ins[0]} ({ins[0].numel} elements) as {list(attrs.shape)}"
                f" ({numel(attrs.shape)})"
            )
        return (ins[0].with_shape(attrs.shape),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        if dy is None or not needs[0]:
            return (None,)
        return (b.one("reshape", dy, attrs=ReshapeAttrs(eqn.inputs[0].type.shape)),)

    def reference(self, attrs: ReshapeAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (args[0].reshape(attrs.shape),)


@dataclass(frozen=True)
class SliceAttrs(Attrs):
    axis: int = 0
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class SliceGradAttrs(SliceAttrs):
    size: int = 0


@register
class Slice(_Moves):
    """x[start:stop] along one axis."""

    name = "slice"
    attrs_type = SliceAttrs

    def infer(self, attrs: SliceAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        shape = list(ins[0].shape)
        if not 0 <= attrs.axis < len(shape):
            raise ShapeError(f"slice: {ins[0]} has no axis {attrs.axis}")
        if not 0 <= attrs.start < attrs.stop <= shape[attrs.axis]:
            raise ShapeError(
                f"slice {attrs.start}:{attrs.stop} does not lie in axis {attrs.axis} of {ins[0]}"
            )
        shape[attrs.axis] = attrs.stop - attrs.start
        return (ins[0].with_shape(tuple(shape)),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        if dy is None or not needs[0]:
            return (None,)
        a = eqn.attrs
        size = eqn.inputs[0].type.shape[a.axis]  # type: ignore[attr-defined]
        attrs = SliceGradAttrs(a.axis, a.start, a.stop, size)  # type: ignore[attr-defined]
        return (b.one("slice_grad", dy, attrs=attrs),)

    def reference(self, attrs: SliceAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (args[0].narrow(attrs.axis, attrs.start, attrs.stop - attrs.start),)


@register
class SliceGrad(_Moves):
    """dy among zeros: the gradient of slice."""

    name = "slice_grad"
    attrs_type = SliceGradAttrs

    def infer(self, attrs: SliceGradAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        shape = list(ins[0].shape)
        if shape[attrs.axis] != attrs.stop - attrs.start:
            raise ShapeError(f"gradient {ins[0]} does not fit {attrs.start}:{attrs.stop}")
        shape[attrs.axis] = attrs.size
        return (ins[0].with_shape(tuple(shape)),)

    def reference(self, attrs: SliceGradAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shape = list(args[0].shape)
        shape[attrs.axis] = attrs.size
        dx = args[0].new_zeros(shape)
        dx.narrow(attrs.axis, attrs.start, attrs.stop - attrs.start).copy_(args[0])
        return (dx,)


@dataclass(frozen=True)
class ConcatAttrs(Attrs):
    axis: int = 0


@register
class Concat(_Moves):
    """The operands one behind another along one axis."""

    name = "concat"
    attrs_type = ConcatAttrs

    def infer(self, attrs: ConcatAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        first = list(ins[0].shape)
        if not 0 <= attrs.axis < len(first):
            raise ShapeError(f"concat: {ins[0]} has no axis {attrs.axis}")
        total = 0
        for t in ins:
            rest = list(t.shape)
            total += rest[attrs.axis]
            rest[attrs.axis] = first[attrs.axis]
            if rest != first or t.dtype != ins[0].dtype:
                raise ShapeError(f"concat along axis {attrs.axis}: {t} does not fit {ins[0]}")
        first[attrs.axis] = total
        return (ins[0].with_shape(tuple(first)),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        axis, at, out = eqn.attrs.axis, 0, []  # type: ignore[attr-defined]
        for v, need in zip(eqn.inputs, needs, strict=True):
            stop = at + v.type.shape[axis]
            attrs = SliceAttrs(axis, at, stop)
            out.append(b.one("slice", dy, attrs=attrs) if need and dy is not None else None)
            at = stop
        return out

    def reference(self, attrs: ConcatAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.cat(args, attrs.axis),)


@dataclass(frozen=True)
class PadAttrs(Attrs):
    """before, after: what is added on both sides of each axis; none along the batch."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    value: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", tuple(self.before))
        object.__setattr__(self, "after", tuple(self.after))


@register
class Pad(_Moves):
    """x with `value` around it."""

    name = "pad"
    attrs_type = PadAttrs

    def infer(self, attrs: PadAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        (x,) = ins
        sides = (*attrs.before, *attrs.after)
        if len(attrs.before) != len(x.shape) or len(sides) != 2 * len(x.shape) or min(sides) < 0:
            raise ShapeError(f"pad by {attrs.before} and {attrs.after} does not fit {x}")
        whole = zip(attrs.before, x.shape, attrs.after, strict=True)
        return (x.with_shape(tuple(map(sum, whole))),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        if dy is None or not needs[0]:
            return (None,)
        before, shape = eqn.attrs.before, eqn.inputs[0].type.shape  # type: ignore[attr-defined]
        for axis, (start, size) in enumerate(zip(before, shape, strict=True)):
            if size != dy.type.shape[axis]:
                dy = b.one("slice", dy, attrs=SliceAttrs(axis, start, start + size))
        return (dy,)

    def reference(self, attrs: PadAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = zip(attrs.before, args[0].shape, attrs.after, strict=True)
        out = args[0].new_full(tuple(map(sum, whole)), attrs.value)
        inner = zip(attrs.before, args[0].shape, strict=True)
        out[tuple(slice(b, b + s) for b, s in inner)] = args[0]
        return (out,)

    def cpu(self, attrs: PadAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Laid as its operand: what is added to it then needs no copy."""
        last_first = zip(reversed(attrs.before), reversed(attrs.after), strict=True)
        sizes = [n for pair in last_first for n in pair]
        return (torch.constant_pad_nd(args[0], sizes, attrs.value),)


@dataclass(frozen=True)
class RelayoutAttrs(Attrs):
    layout: str = ""


@register
class Relayout(_Moves):
    """The same logical tensor in another storage layout; only the layout pass writes it. In a body
    the kernel that makes the tensor writes it in that layout, too."""

    name = "relayout"
    attrs_type = RelayoutAttrs

    def infer(self, attrs: RelayoutAttrs, *ins: TensorType) -> tuple[TensorType, ...]:
        return (ins[0].with_layout(parse_layout(attrs.layout)),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        return (cotangents[0] if needs[0] else None,)

    def reference(self, attrs: RelayoutAttrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (args[0],)

    def emit(self, expr: Sequence[str], attrs: Attrs, ctx: Any) -> list[str]:
        return [expr[0]]  # its store works out where it goes
