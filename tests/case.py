"""What one row of the table of cases is, and how its operands are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import graphnet.ops  # noqa: F401  (fills the registry)
from graphnet.ir.op import NO_ATTRS, Attrs, get_op
from graphnet.ir.types import TensorType, f32

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One row.

    ins    operand types; f32 stands for "floating point", tests run it in other precisions too
    torch  the equivalent on the same operands: a tensor, or one per result (None: not compared)
    draw   makes operands that depend on each other; else `operands` draws each from its type
    exact  results are moved or selected, never rounded: compared bit by bit
    wrt    operands that have a gradient, None for an op that has none
    """

    op: str
    ins: tuple[TensorType, ...]
    torch: Callable[..., Any]
    attrs: Attrs = NO_ATTRS
    note: str = ""
    draw: Callable[[Case, torch.Generator, torch.dtype], Tensors] | None = None
    exact: bool = False
    wrt: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.attrs is NO_ATTRS:  # the op's own defaults
            object.__setattr__(self, "attrs", get_op(self.op).attrs_type())

    @property
    def id(self) -> str:
        return f"{self.op}-{self.note}" if self.note else self.op

    def operands(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensors:
        """Operands, the floating-point ones in `dtype`; the same for the same seed."""
        g = torch.Generator().manual_seed(seed)
        if self.draw is not None:
            return self.draw(self, g, dtype)
        return [fill(t, g, dtype) for t in self.ins]

    def expected(self, args: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """What torch gives, one entry per result."""
        out = self.torch(*args)
        return out if isinstance(out, tuple) else (out,)


def fill(t: TensorType, g: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Values that are distinct and away from 0, so that no maximum ties and no kink is hit."""
    if not t.dtype.is_float:
        return torch.randint(0, 3, t.shape, generator=g).to(t.dtype.torch)
    n = t.numel
    spread = (torch.randperm(n, generator=g).double() + 0.5 - n / 2) * (4 / max(n, 8))
    return spread.reshape(t.shape).to(dtype)


def attrs(op: str, **fields: Any) -> Attrs:
    return get_op(op).attrs_type(**fields)


def f(*shape: int) -> TensorType:
    return TensorType(f32, shape)


def pulled_back(fn: Callable[..., torch.Tensor], primal: Tensors, dy: torch.Tensor) -> Tensors:
    """torch's own gradients of `fn` at `primal`, for the gradient ops."""
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_() for p in primal]
        return list(torch.autograd.grad(fn(*leaves), leaves, dy))
