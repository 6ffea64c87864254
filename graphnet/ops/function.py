"""Functions of one operand, element by element: one class says everything about one of them.

`function` registers two ops: the function, and `<name>_grad(v, dy)`, its gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from graphnet.errors import ShapeError
from graphnet.ir.graph import Builder, Eqn, Value
from graphnet.ir.op import Attrs, Op, register
from graphnet.ir.types import TensorType
from graphnet.ops.elementwise import floating


class Function(Op, ABC):
    """y = f(x). Fill in `reference`, `emit`, `pull` and `emit_pull`.

    reads  what the gradient reads: "output" is y, so that x may die; "sign" is y, of which only the
           sign counts; "input" is x
    """

    elementwise = joins = True
    kernel = "elementwise"
    reads: ClassVar[str] = "output"

    @abstractmethod
    def pull(self, attrs: Any, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        """dy f'(x) by v, which is y or x as `reads` says: the plainest formula."""

    def cpu_pull(self, attrs: Any, v: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        """A faster twin of `pull` for the cpu target."""
        return self.pull(attrs, v, dy)

    @abstractmethod
    def emit_pull(self, v: str, dy: str, attrs: Any, ctx: Any) -> str:
        """The same as a Triton fp32 expression."""

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        floating(self.name, ins[0])
        return (ins[0].with_shape(ins[0].shape),)

    def vjp(
        self, b: Builder, eqn: Eqn, cotangents: Sequence[Value | None], needs: Sequence[bool]
    ) -> Sequence[Value | None]:
        (dy,) = cotangents
        if dy is None or not needs[0]:
            return (None,)
        v = eqn.inputs[0] if self.reads == "input" else eqn.out
        return (b.one(f"{self.name}_grad", v, dy, attrs=eqn.attrs),)


class FunctionGrad(Op):
    """dx = dy f'(x). Made by `function`, one for each function."""

    elementwise = joins = True
    kernel = "elementwise"
    of: ClassVar[Function]

    def infer(self, attrs: Attrs, *ins: TensorType) -> tuple[TensorType, ...]:
        v, dy = ins
        if v.shape != dy.shape:
            raise ShapeError(f"{self.name}: {self.of.reads} {v} and gradient {dy} differ in shape")
        floating(self.name, v)
        floating(self.name, dy)
        return (dy.with_shape(dy.shape),)

    def reference(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.of.pull(attrs, *args),)

    def cpu(self, attrs: Attrs, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.of.cpu_pull(attrs, *args),)

    def emit(self, expr: Sequence[str], attrs: Any, ctx: Any) -> list[str]:
        v, dy = expr
        return [self.of.emit_pull(v, dy, attrs, ctx)]


def function(cls: type[Function]) -> type[Function]:
    """Class decorator: registers the function and its gradient."""
    register(cls)
    members = {
        "__doc__": f"dx = dy f'(x) of {cls.name}, by its {cls.reads}.", "name": f"{cls.name}_grad",
        "attrs_type": cls.attrs_type, "mask": cls.reads, "of": cls(),
    }  # fmt: skip
    register(type(f"{cls.__name__}Grad", (FunctionGrad,), members))
    return cls
